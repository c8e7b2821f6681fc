"""A watched joint whose position comes seldom, on a topic of its own: a motion must not begin at an old position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, ramp, toy_contract
from session_rig import Rig

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.safety_state import State

SOURCE = {"topic": "hand/joint_states", "joints": ["finger"], "timeout_s": 1.0}
EVERY = 8
"""Control periods between two positions of the finger: 0.4 s."""
SPEED_M_S = 0.04


class SlowRig(Rig):
    """The finger is watched and moves; its positions come every 0.4 s."""

    def __init__(self, timeout_s: float = 1.0) -> None:
        contract = toy_contract(sensors={"joint_sources": [SOURCE | {"timeout_s": timeout_s}]})
        shoulder, finger = contract.joints
        super().__init__(replace(contract, joints=(shoulder, replace(finger, max_tracking_error=0.03))))
        self.fed = 0
        self.policy.infer = self.infer

    def infer(self, observation, noise=None, seed=0) -> ActionChunk:
        """The shoulder stands, the finger opens from where the policy commands it, whatever is seen of it."""
        actions = ramp(observation.state[1], 0.0)
        actions[:, 1] = np.clip(self.position()[1] + SPEED_M_S * 0.05 * np.arange(1, 9), 0.0, 0.04)
        return ActionChunk(actions[:, ::-1], 0.05, 0.05)

    def feed(self) -> None:
        super().feed()
        self.fed += 1
        if self.fed % EVERY == 1:
            self.tell()

    def tell(self) -> None:
        """A position of the finger."""
        self.session.buffer.add_joints(["finger"], [self.position()[1]], self.now, self.now, "hand/joint_states")


@pytest.fixture
def moving():
    rig = SlowRig()
    rig.stands_at = [0.0, 0.005]
    while rig.fed % EVERY != 7 or rig.session.motion.plan is None:
        rig.tick()
    assert rig.state is State.OK and rig.speed > 0.5 * SPEED_M_S
    yield rig
    rig.close()


def test_hold_after_a_clock_jump_begins_at_the_command_and_not_at_an_old_position(moving: SlowRig) -> None:
    commanded = moving.session.motion.plan.sample(moving.now)[0][1]
    measured = moving.session.buffer.joint_sample()[1][1]
    assert commanded - measured > 0.2 * SPEED_M_S, "the last measured position is old"
    moving.now -= 10**9
    message = moving.session.clock_jumped(moving.now)
    assert message is not None
    fingers = [point.positions[1] for point in message.points]
    assert commanded - 1e-3 <= min(fingers) and max(fingers) <= commanded + 2e-3


@pytest.mark.parametrize("jump", [True, False], ids=["clock jump", "restart"])
def test_motion_begins_anew_only_when_every_source_told_where_the_arm_stands(moving: SlowRig, jump: bool) -> None:
    """A position from before the jump is forgotten, and so is one from while the arm still braked."""
    if jump:
        moving.now -= 10**9
        moving.session.clock_jumped(moving.now)
    else:
        moving.session.restart(moving.now)
    moving.fed = 1  # the next one by itself comes 0.4 s later
    asked = []
    plain = moving.policy.infer
    moving.policy.infer = lambda *given, **more: (asked.append(moving.now), plain(*given, **more))[1]
    moving.now += PERIOD_NS
    moving.tell()  # while the finger brakes
    told_ns = moving.now
    for _ in range(EVERY - 2):
        moving.tick()
    assert moving.session.motion.plan is None and not asked, "it stands, and nobody has told where"
    stands = moving.stands_at[1]
    while not asked:
        moving.tick()
    assert asked[0] > told_ns + 4 * PERIOD_NS
    while moving.session.motion.plan is None:
        moving.tick()
    assert moving.session.motion.plan.positions[0, 1] == pytest.approx(stands, abs=1e-6)
    assert moving.state is State.OK


def test_clock_jump_of_an_arm_that_has_not_moved_does_not_wait_for_the_old_time() -> None:
    rig = SlowRig()
    rig.session.clock_jumped(rig.now - 100 * 10**9)
    rig.now -= 100 * 10**9
    rig.fed = 0
    rig.run(6)
    assert rig.state is State.OK and rig.session.motion.plan is not None
    rig.close()


def test_motion_does_not_begin_at_a_position_that_came_after_the_joint_states(moving: SlowRig) -> None:
    """The sample of all joints, at which a motion begins, has it with the next message of most joints only."""
    moving.session.restart(moving.now)
    moving.fed = 1
    moving.now += PERIOD_NS
    moving.tell()  # while it brakes
    for _ in range(5):
        moving.tick()
    assert moving.session.motion.plan is None
    moving.now += PERIOD_NS
    Rig.feed(moving)
    moving.now += 2_000_000
    moving.tell()
    assert not moving.session.request(moving.now + 1_000_000)
    moving.now += PERIOD_NS - 2_000_000
    Rig.feed(moving)
    assert moving.session.request(moving.now)
    moving.wait()
    assert moving.session.collect(moving.now)
    assert moving.session.motion.plan.positions[0, 1] == pytest.approx(moving.stands_at[1], abs=1e-6)


def test_clock_that_steps_back_unnoticed_does_not_keep_the_arm_waiting() -> None:
    """Without a report of a jump, the time at which the arm stood is in the future then."""
    rig = Rig()
    rig.run(10)
    rig.session.restart(rig.now)
    rig.sensors.remove("joints")
    rig.run(12)
    assert rig.session.motion.plan is None
    rig.sensors.add("joints")
    rig.now -= 600 * 10**9
    rig.session.restart(rig.now)
    rig.session.start(rig.now)
    rig.run(100)
    assert rig.session.motion.plan is not None and rig.state is State.OK
    rig.close()


def test_waiting_for_positions_at_rest_says_so() -> None:
    rig = SlowRig(timeout_s=5.0)
    rig.run(12)
    rig.session.restart(rig.now)
    rig.now += PERIOD_NS
    rig.tell()  # while it brakes
    rig.tell = lambda: None  # the source is silent from now on, and not stale yet
    rig.run(40)
    assert rig.session.motion.plan is None
    assert any("not every joint was measured since" in text for text in rig.session.notices.texts)
    rig.close()

"""What leaves the node obeys every limit and every rule of the controller, whatever the policy says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from fault_checks import run_until
from robot_fixtures import PERIOD_NS, T0, contract_dict, ramp, toy_contract
from session_rig import NAMES, Rig

from omega_qvla_ros import jtc
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.guard import ChunkRejected, MotionGuard
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.trajectory import JointTrajectory, Plan, TrajectoryPoint, still_plan


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.run(10)
    yield made
    made.close()


def with_mode(mode: str, **limits: object) -> RobotContract:
    return toy_contract(limits={"mode": mode, **limits})


def targets(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return T0 + PERIOD_NS * np.arange(1, len(actions) + 1, dtype=np.int64), actions


def limited(guard: MotionGuard, actions: np.ndarray, start: float = 0.0) -> Plan:
    return guard.limit(still_plan(T0, np.array([start, 0.02]), PERIOD_NS), *targets(actions))


def dense(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, speeds and accelerations of both joints at 1 kHz, by sampling and differences."""
    times_ns = np.arange(plan.times_ns[0], plan.end_ns, 1_000_000)
    samples = [plan.sample(int(time_ns)) for time_ns in times_ns]
    positions, speeds = (np.array([sample[k] for sample in samples]) for k in (0, 1))
    return positions, speeds, np.diff(speeds, axis=0) * 1e3


def test_fault_16_arm_outside_its_limits_may_come_back_but_not_go_further() -> None:
    rig = Rig()
    rig.stands_at = [1.2, 0.02]  # the limit is 1.0
    rig.policy.step = 0.05
    rig.run(20)
    plan = rig.session.motion.plan
    assert plan is None or dense(plan)[0][:, 0].max() <= 1.2 + 1e-9
    for _, message in rig.sent:
        assert max(point.positions[0] for point in message.points) <= 1.2 + 1e-9
    rig.policy.step = -0.05
    rig.session.reset_fault()
    rig.run(40)
    assert rig.state is State.OK and rig.position()[0] < 1.0
    rig.close()


def test_fault_16_guard_takes_an_outer_start_inwards_at_any_distance() -> None:
    guard = MotionGuard(toy_contract())
    positions, _, _ = dense(limited(guard, ramp(1.3, -0.05), start=1.3))
    assert (np.diff(positions[:, 0]) <= 1e-12).all() and positions[-1, 0] < 1.3


def test_fault_22_default_clamps_and_counts_by_joint() -> None:
    guard = MotionGuard(toy_contract())
    plan = limited(guard, ramp(0.85, 0.05), start=0.85)
    positions, _, _ = dense(plan)
    assert positions[:, 0].max() <= 1.0 + 1e-9
    assert guard.counters.clamped_position["shoulder"] == 1 and "finger" not in guard.counters.clamped_position


def test_fault_22_far_outside_is_a_fault_not_an_inaccuracy() -> None:
    """A quarter of the range of 2.0 beyond the limit of 1.0."""
    guard = MotionGuard(toy_contract())
    beyond = ramp(1.0, 0.0)
    beyond[3, 0] = 1.51
    with pytest.raises(ChunkRejected, match=r"target 1.5100 of joint 'shoulder' is outside \[-1.0000, 1.0000\]"):
        limited(guard, beyond, start=1.0)
    assert guard.counters.rejected["position"] == 1


def test_fault_22_reject_mode_refuses_the_whole_chunk() -> None:
    guard = MotionGuard(with_mode("reject"))
    with pytest.raises(ChunkRejected, match="'shoulder' is outside"):
        limited(guard, ramp(0.85, 0.05), start=0.85)


def test_fault_23_small_jump_is_blended_over_the_blend_time(rig: Rig) -> None:
    """The next chunk begins elsewhere by less than the largest jump; the command goes there smoothly."""
    before = rig.session.motion.plan.sample(rig.now)[0][0]
    rig.position = lambda: [before + 0.1, 0.02]
    rejected = dict(rig.session.guard.counters.rejected)
    steps = []
    for _ in range(6):
        here = rig.session.motion.plan.sample(rig.now)[0][0]
        rig.tick()
        steps.append(rig.session.motion.plan.sample(rig.now)[0][0] - here)
    assert rig.state is State.OK and dict(rig.session.guard.counters.rejected) == rejected
    assert max(np.abs(steps)) <= 2.0 * 0.05 + 1e-9  # velocity limit x period


def test_fault_23_jump_beyond_the_limit_is_refused_and_holds(rig: Rig) -> None:
    accepted = rig.session.scheduler.accepted
    before = rig.session.motion.plan.sample(rig.now)[0][0]
    infer = rig.policy.infer

    def jumping(*args: object, **kwargs: object):
        chunk = infer(*args, **kwargs)
        chunk.actions[4:, 1] += 0.4  # 2.0 rad/s x 0.05 s x 1.5 = 0.15 rad
        return chunk

    rig.policy.infer = jumping
    run_until(rig, State.HOLD)
    assert rig.session.scheduler.accepted <= accepted + 1
    assert "joint 'shoulder' would jump by" in rig.session.safety.reasons[0]
    assert rig.session.guard.counters.rejected["jump"] == 1
    rig.run(5)
    assert rig.speed == 0.0 and abs(rig.position()[0] - before) < 0.2


def test_fault_22_scale_mode_clamps_positions_and_refuses_what_is_far_outside() -> None:
    guard = MotionGuard(with_mode("scale"))
    assert dense(limited(guard, ramp(0.85, 0.05), start=0.85))[0][:, 0].max() <= 1.0 + 1e-9
    assert guard.counters.clamped_position["shoulder"] == 1
    beyond = ramp(1.0, 0.0)
    beyond[3, 0] = 1.51
    with pytest.raises(ChunkRejected, match="'shoulder' is outside"):
        limited(guard, beyond, start=1.0)


@pytest.mark.parametrize("step", [0.11, 0.14])
def test_fault_24_speed_over_the_limit_inside_a_chunk_is_never_passed_silently(step: float) -> None:
    """2.2 and 2.8 rad/s where 2.0 are allowed."""
    guard = MotionGuard(toy_contract())
    _, speeds, _ = dense(limited(guard, ramp(-0.9, step), start=-0.9))
    assert np.abs(speeds[:, 0]).max() <= 2.0 + 1e-6
    assert guard.counters.clamped_velocity["shoulder"] == 1
    with pytest.raises(ChunkRejected, match="'shoulder' would move at"):
        limited(MotionGuard(with_mode("reject")), ramp(-0.9, step), start=-0.9)


@pytest.mark.parametrize("step", [0.11, 0.14])
def test_fault_24_scale_mode_takes_longer_for_a_chunk_that_is_too_fast(step: float) -> None:
    guard = MotionGuard(with_mode("scale"))
    plan = limited(guard, ramp(-0.9, step), start=-0.9)
    positions, speeds, accelerations = dense(plan)
    assert plan.end_ns > targets(ramp(-0.9, step))[0][-1] and guard.counters.stretched == 1
    assert np.abs(speeds[:, 0]).max() <= 2.0 + 1e-6 and np.abs(accelerations[:, 0]).max() <= 10.0 * (1 + 1e-3)
    assert positions[-1, 0] > -0.9 + 6 * step  # the same way, later


@pytest.mark.parametrize("mode", ["clamp", "scale", "reject"])
def test_fault_24_acceleration_over_the_limit_inside_a_chunk_is_never_passed_silently(mode: str) -> None:
    """To and fro by 0.04 rad in every period: slow enough, but 64 rad/s^2 where 10 are allowed."""
    guard, shaking = MotionGuard(with_mode(mode)), ramp(0.0, 0.0)
    shaking[::2, 0] = 0.04
    if mode == "reject":
        with pytest.raises(ChunkRejected, match="'shoulder' would accelerate with .* the limit is 10.000/s.2"):
            limited(guard, shaking)
        return
    accelerations = dense(limited(guard, shaking))[2]
    assert np.abs(accelerations[:, 0]).max() <= 10.0 * (1 + 1e-3)
    assert guard.counters.clamped_acceleration["shoulder"] == 1 or guard.counters.stretched == 1


def plain(*points: TrajectoryPoint, stamp_ns: int = T0) -> JointTrajectory:
    return JointTrajectory(NAMES, stamp_ns, points)


def point(time_ns: int, velocity: float = 0.0) -> TrajectoryPoint:
    return TrajectoryPoint(np.array([0.1, 0.02]), time_ns, np.array([velocity, 0.0]))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (plain(point(PERIOD_NS), stamp_ns=T0 - 2 * PERIOD_NS), "in the past"),
        (plain(point(PERIOD_NS), point(PERIOD_NS)), "not strictly increasing"),
        (plain(point(PERIOD_NS, 0.1)), "velocity of the last point is not zero"),
        (plain(), "no points"),
        (JointTrajectory(("shoulder", "shoulder"), T0, (point(1),)), "occurs twice"),
    ],
)
def test_fault_40_what_a_controller_would_refuse_is_caught_before_it_is_sent(
    rig: Rig, message: JointTrajectory, words: str
) -> None:
    assert words in jtc.validate(message, T0, NAMES)
    published = rig.session.motion.counters.published
    assert rig.session.motion._checked(message, T0) is None
    assert sum(rig.session.motion.invalid.values()) == 1
    assert rig.session.motion.counters.published == published


def test_fault_40_counter_stays_zero_over_holds_restarts_jumps_and_late_chunks(rig: Rig) -> None:
    random = np.random.default_rng(0)
    for k in range(400):
        rig.policy.step = float(random.uniform(-0.12, 0.12))
        rig.policy.fault = np.nan if random.random() < 0.05 else None
        if k % 23 == 7:
            rig.session.stop(rig.now)
        if k % 23 == 15:
            rig.session.reset_fault()
            rig.session.start(rig.now)
        if k % 41 == 40:
            rig.session.restart(rig.now)
        rig.tick()  # checks every message with the rules of the controller
    assert rig.session.motion.counters.published > 100
    assert sum(rig.session.motion.invalid.values()) == 0


def test_contract_numbers_of_this_file() -> None:
    """The jumps and speeds above are measured against these."""
    limits = toy_contract().joint_limits()
    assert (limits.max_velocity[0], limits.position_max[0]) == (2.0, 1.0) and limits.max_jump[0] == pytest.approx(0.15)
    assert contract_dict()["control_rate_hz"] == 20.0 and replace(toy_contract()).limits.mode == "clamp"

"""A configured policy on a robot, with an injected clock and a policy that can do everything wrong."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, toy_contract, toy_spec
from session_rig import DEADLINE_S, NAMES, FakePolicy, Rig

from omega_qvla_core.errors import ConfigError, InstructionError
from omega_qvla_core.noise import inference_seed
from omega_qvla_ros import jtc
from omega_qvla_ros.motion import HOLD_REPEATS
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.session import PolicySession, SessionOptions
from omega_qvla_ros.trajectory import REST_NS


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


def test_moves_smoothly_and_keeps_planning(rig: Rig) -> None:
    messages = rig.run(40)
    assert rig.state is State.OK
    assert all(message is not None for message in messages[2:])
    assert rig.session.scheduler.accepted >= 18  # every second of 40 periods
    positions = [rig.session.motion.plan.sample(rig.now)[0][0]]
    assert 0.5 < positions[0] < 1.0
    assert rig.session.motion.counters.exhausted == 0


def test_every_inference_has_a_noise_of_its_own_and_a_restart_repeats_them(rig: Rig) -> None:
    """One noise for all could hold an arm for good where that noise leads nowhere."""
    rig.run(20)
    seeds = [seed for _, seed in rig.policy.seen]
    assert len(set(seeds)) == len(seeds) > 2
    rig.session.restart(rig.now)
    rig.run(20)
    assert rig.policy.seen[len(seeds)][1] == seeds[0]


def test_policy_sees_its_own_joint_order_the_instruction_and_the_seed(rig: Rig) -> None:
    rig.session.noise_seed = 5
    rig.run(2)
    observation, seed = rig.policy.seen[0]
    np.testing.assert_array_equal(observation.state, [0.02, 0.0])
    assert observation.instruction == "go" and seed == inference_seed(5, 0)
    assert set(observation.images) == {"front", "wrist"} and observation.images["front"].shape == (64, 64, 3)


def test_contract_and_checkpoint_must_fit() -> None:
    with pytest.raises(ConfigError, match="state names"):
        policy = FakePolicy()
        policy.spec = toy_spec(state_names=("finger", "elbow"))
        PolicySession(toy_contract(), policy, SessionOptions(2, 0.1), lambda m, k: m, lambda: None)


@pytest.mark.parametrize(("stream", "bound_s"), [("front", 0.25), ("wrist", 0.25), ("joints", 0.1)])
def test_stopped_sensor_holds_within_its_timeout_and_one_period_and_resumes(
    rig: Rig, stream: str, bound_s: float
) -> None:
    rig.run(10)
    stopped_at = rig.now
    rig.sensors.remove(stream)
    while rig.state is not State.HOLD:
        rig.tick()
        assert rig.now - stopped_at <= bound_s * 1e9 + 2 * PERIOD_NS
    assert rig.now - stopped_at <= bound_s * 1e9 + PERIOD_NS + 1
    held = rig.sent[-1][1]
    assert any(stream in reason or "joint_states" in reason for reason in rig.session.safety.reasons)
    assert rig.run(2)[-1].end_ns == held.end_ns  # repeated with the same stamps
    assert rig.run(10)[-1] is None  # then silent
    assert rig.speed == 0.0
    rig.sensors.add(stream)
    rig.run(2)
    assert rig.state is State.HOLD
    rig.run(4)
    assert rig.state is State.OK and rig.speed > 0.0


def test_nothing_moves_before_every_stream_is_there_and_the_topic_is_named(rig: Rig) -> None:
    rig.sensors.remove("wrist")
    assert rig.run(110) == [None] * 110
    assert rig.policy.seen == []
    reasons = "; ".join(rig.session.safety.reasons)
    assert "nothing received on 'wrist/image_raw'" in reasons and "QoS" in reasons


@pytest.mark.parametrize("fault", [np.nan, np.inf, 2.0, ValueError("broken")])
def test_policy_fault_holds_retries_and_latches_at_the_third(rig: Rig, fault: object) -> None:
    rig.run(10)
    rig.policy.fault = fault
    before = rig.session.scheduler.accepted
    holds = 0
    for _ in range(60):
        was = rig.state
        rig.tick()
        holds += was is State.OK and rig.state is not State.OK
    assert rig.state is State.LATCHED and holds == 3
    assert rig.session.scheduler.accepted == before
    assert rig.speed == 0.0
    for _, message in rig.sent:
        assert np.isfinite([point.positions for point in message.points]).all()
    rig.policy.fault = None
    assert rig.run(20)[-1] is None and rig.state is State.LATCHED
    assert rig.session.reset_fault()
    rig.run(10)
    assert rig.state is State.OK and rig.speed > 0.0


def test_one_fault_is_forgiven(rig: Rig) -> None:
    rig.run(10)
    rig.policy.fault = np.nan
    while rig.state is State.OK:
        rig.tick()
    rig.policy.fault = None
    held_at = rig.now
    while rig.state is not State.OK:
        rig.tick()
    assert 0.5e9 <= rig.now - held_at <= 0.5e9 + 2 * PERIOD_NS
    rig.run(6)
    assert rig.session.safety.consecutive_errors == 0 and rig.speed > 0.0


def test_hanging_inference_holds_and_its_result_is_dropped() -> None:
    rig = Rig(inference_timeout_s=0.05)
    rig.run(10)
    accepted = rig.session.scheduler.accepted
    rig.policy.block = threading.Event()
    while not rig.session.worker.busy:
        rig.tick()
    deadline = time.monotonic() + DEADLINE_S
    while rig.state is not State.HOLD and time.monotonic() < deadline:
        rig.now += 1  # simulated time may stand still; a hang is measured in wall time
        rig.step()
    assert rig.state is State.HOLD and "has not returned" in rig.session.safety.reasons[0]
    rig.run(30)
    assert rig.state is State.HOLD and rig.speed == 0.0 and len(rig.policy.seen) > 0
    block, rig.policy.block = rig.policy.block, None
    block.set()
    rig.wait()
    rig.run(1)
    assert rig.session.scheduler.accepted == accepted
    rig.run(8)
    assert rig.session.scheduler.accepted > accepted and rig.state is State.OK
    rig.session.close()


def test_slow_inference_runs_the_plan_out_smoothly_and_resumes(rig: Rig) -> None:
    rig.run(10)
    rig.policy.block = threading.Event()
    messages = rig.run(20)
    assert messages[-1] is None and rig.state is State.DEGRADED and rig.speed == 0.0
    assert "the plan ran out" in rig.session.safety.reasons[0]
    block, rig.policy.block = rig.policy.block, None
    block.set()
    rig.wait()
    rig.run(6)
    assert rig.state is State.OK and rig.speed > 0.0


def test_policy_that_is_always_late_is_latched_with_numbers(rig: Rig) -> None:
    for _ in range(toy_contract().safety.max_late_chunks):
        rig.policy.block = threading.Event()
        while not rig.session.worker.busy:
            rig.tick()
        rig.run(12)  # a chunk lasts 8 periods
        block, rig.policy.block = rig.policy.block, None
        block.set()
        rig.wait()
    rig.tick()
    assert rig.state is State.LATCHED
    assert "5 chunks in a row were late" in rig.session.safety.reasons[0]
    assert "a chunk lasts 0.40 s" in rig.session.safety.reasons[0]


def test_instruction_change_voids_chunks_under_way_and_plans_at_once(rig: Rig) -> None:
    rig.run(10)
    rig.policy.block = threading.Event()
    while not rig.session.worker.busy:
        rig.tick()
    rig.session.set_instruction("touch the red cube", rig.now)
    left_s = (rig.session.motion.plan.end_ns - rig.now) * 1e-9
    assert left_s <= 2 * 0.05 + 0.25  # one execution horizon and the way to rest
    block, rig.policy.block = rig.policy.block, None
    block.set()
    rig.wait()
    rig.tick()
    assert rig.session.scheduler.dropped["task"] == 1
    rig.run(2)
    assert rig.policy.seen[-1][0].instruction == "touch the red cube"


def test_refused_instruction_holds_until_another_one_comes(rig: Rig) -> None:
    rig.run(4)
    rig.policy.fault = InstructionError("the instruction has 40 words, at most 16 fit")
    rig.run(40)
    assert rig.state is State.HOLD and "40 words" in rig.session.safety.reasons[0]
    rig.policy.fault = None
    rig.session.set_instruction("go on", rig.now)
    rig.run(6)
    assert rig.state is State.OK and rig.speed > 0.0


def test_no_instruction_no_motion() -> None:
    rig = Rig()
    rig.session.instruction = ""
    assert rig.run(10) == [None] * 10
    assert rig.state is State.DEGRADED and "instruction" in rig.session.safety.reasons[0]
    rig.session.close()


def test_stop_and_start(rig: Rig) -> None:
    rig.run(10)
    rig.session.stop(rig.now)
    rig.run(10)
    assert rig.state is State.HOLD and rig.speed == 0.0
    rig.session.start(rig.now)
    rig.run(6)
    assert rig.state is State.OK and rig.speed > 0.0


def test_deactivate_returns_a_decelerating_hold(rig: Rig) -> None:
    rig.run(10)
    rig.now += 5_000_000
    position, velocity = rig.session.motion.plan.sample(rig.now + 10_000_000)  # when the message can be there
    message = rig.session.deactivate(rig.now)
    assert velocity[0] > 0.0 and message is not None
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    end = message.points[-1].positions[0]
    assert end - position[0] == pytest.approx(velocity[0] ** 2 / 20.0, abs=2e-3)
    assert rig.run(10)[-1] is None


def test_restart_brakes_and_begins_at_the_measured_position(rig: Rig) -> None:
    rig.run(10)
    rig.session.restart(rig.now)
    message = rig.session.motion.tick(rig.now)
    assert message is not None and message.end_ns - REST_NS - rig.now <= 4 * PERIOD_NS
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    rig.run(3)
    assert rig.speed == 0.0 and rig.session.motion.braking
    stands_at = rig.position()[0]
    assert stands_at > 0.1
    rig.run(3)
    assert rig.state is State.OK and rig.session.motion.plan.positions[0, 0] == pytest.approx(stands_at)


@pytest.mark.parametrize("first", ["restart", "start", "clock"])
@pytest.mark.parametrize("then", ["stop", "deactivate", "sensors"])
def test_arm_stops_whatever_follows_a_restart(rig: Rig, first: str, then: str) -> None:
    """The controller has the old window until a hold reaches it, so a hold is sent before the plan is forgotten."""
    rig.run(10)
    assert rig.speed > 0.1
    position = rig.session.motion.plan.sample(rig.now)[0][0]
    if first == "clock":
        rig.now -= 10**9
        sent = [rig.session.clock_jumped(rig.now)]
    else:
        getattr(rig.session, first)(rig.now)
        sent = []
    if then == "stop":
        rig.session.stop(rig.now)
    elif then == "deactivate":
        sent.append(rig.session.deactivate(rig.now))
    rig.sensors.clear()
    sent += rig.run(8)
    holds = [message for message in sent if message is not None]
    assert len(holds) == HOLD_REPEATS
    for message in holds:
        np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
        assert abs(message.points[-1].positions[0] - position) < 0.05
    assert rig.state is State.HOLD and rig.session.motion.plan is None


def test_clock_that_jumped_back(rig: Rig) -> None:
    rig.run(10)
    rig.now -= 100 * 10**9
    message = rig.session.clock_jumped(rig.now)
    assert message is not None and message.stamp_ns == 0 and jtc.validate(message, rig.now, NAMES) is None
    rig.run(12)
    assert rig.state is State.OK and rig.speed > 0.0


@pytest.mark.parametrize(("step", "words"), [(0.07, "away from its command"), (0.04, "for 2 s")])
def test_blocked_arm_is_held_and_latched_at_the_third_loss(step: float, words: str) -> None:
    shoulder, finger = toy_contract().joints
    # Lost before the next chunk, which would be a jump: it starts where the arm is.
    rig = Rig(
        replace(toy_contract(), joints=(replace(shoulder, max_tracking_error=0.15 if step > 0.05 else 0.3), finger))
    )
    rig.policy.step = step
    rig.session.scheduler.execution_horizon_steps = 8 if step > 0.05 else 2
    rig.position = lambda: [0.0, 0.02]
    holds = 0
    for _ in range(60 * 20):
        was = rig.state
        rig.tick()
        holds += was is State.OK and rig.state in (State.HOLD, State.LATCHED)
        if rig.state is State.HOLD and rig.session.motion.counters.tracking_lost:
            assert "'shoulder'" in rig.session.safety.reasons[0] and words in rig.session.safety.reasons[0]
    assert rig.state is State.LATCHED and holds == 3 and rig.speed == 0.0
    assert "3 tracking losses in a row" in rig.session.safety.reasons[0]
    assert rig.run(5) == [None] * 5
    del rig.position  # free again
    rig.policy.step = 0.02
    rig.session.reset_fault()
    rig.run(25)
    assert rig.state is State.OK and rig.session.motion.tracking.losses == 0
    rig.close()


def test_activation_clears_latched_faults(rig: Rig) -> None:
    rig.session.safety.latch("policy", "3 policy errors in a row")
    rig.session.deactivate(rig.now)
    assert rig.state is State.LATCHED
    rig.session.activate()
    rig.session.start(rig.now)
    rig.run(6)
    assert rig.state is State.OK


def test_real_time_chunking_tells_the_policy_what_it_has_to_continue() -> None:
    contract = toy_contract(chunk={"method": "rtc", "execution_horizon_steps": 2, "blend_time_s": 0.1})
    rig = Rig(contract)
    seen = []
    plain = rig.policy.infer

    def infer(observation, noise=None, seed=0, committed=None):
        seen.append((observation.state[1], committed))
        return plain(observation, noise, seed)

    rig.policy.infer = infer
    rig.run(20)
    assert seen[0][1] is None and len(seen) > 4 and rig.state is State.OK
    for position, committed in seen[2:]:
        assert committed is not None and committed.actions.shape[1] == 2
        assert 1 <= committed.delay_steps <= len(committed.actions)
        assert abs(committed.actions[0, 1] - position) < 0.1  # the checkpoint's order: finger, shoulder
    assert rig.session.scheduler.blend_time_s == 0.1  # what guidance leaves over is blended
    rig.close()


def test_withdrawn_chunk_degrades_and_one_that_leaves_ends_it(rig: Rig) -> None:
    rig.run(10)
    rig.age_ns = 90_000_000
    while not rig.session.motion.counters.withdrawn:
        rig.tick()
    assert rig.state is State.DEGRADED
    assert any("ready after 90 ms, 0 ms were allowed for" in reason for reason in rig.session.safety.reasons)
    rig.age_ns = 0
    rig.run(6)
    assert rig.state is State.OK and rig.session.motion.counters.withdrawn == 1


def test_chunks_that_are_always_withdrawn_latch_and_say_what_to_do(rig: Rig) -> None:
    rig.run(10)
    most = toy_contract().safety.max_late_chunks
    for count in range(1, most + 1):
        assert rig.state is not State.LATCHED
        rig.age_ns = 150_000_000 + count * 10_000_000  # planning that takes longer than is ever allowed for
        while rig.session.motion.counters.withdrawn < count:
            rig.tick()
    assert rig.state is State.LATCHED
    reason = rig.session.safety.reasons[0]
    assert (
        f"{most} chunks in a row were late" in reason and "too busy to plan in time; take other work off it" in reason
    )
    rig.run(6)
    assert rig.speed == 0.0
    rig.session.reset_fault()
    rig.age_ns = 0
    rig.run(8)
    assert rig.state is State.OK and rig.speed > 0.0


def test_chunk_that_leaves_breaks_the_row_of_those_that_were_withdrawn(rig: Rig) -> None:
    rig.run(10)
    for count in range(1, 2 * toy_contract().safety.max_late_chunks):
        rig.age_ns = 150_000_000
        while rig.session.motion.counters.withdrawn < count:
            rig.tick()
        rig.age_ns = 0
        accepted = rig.session.scheduler.accepted
        while rig.session.scheduler.accepted == accepted:
            rig.tick()
    assert rig.state is State.OK


def test_hold_that_leaves_instead_of_a_chunk_breaks_no_row(rig: Rig) -> None:
    rig.run(10)
    rig.age_ns = 150_000_000
    while not rig.session.motion.counters.withdrawn:
        rig.tick()
    rig.age_ns = 0
    while rig.session.collect(rig.now) is False:
        rig.now += PERIOD_NS
        rig.feed()
        rig.session.request(rig.now)
        rig.wait()
    rig.session.motion.hold(rig.now)
    assert rig.session.in_time(rig.session.motion.tick(rig.now), rig.now, 0) is not None
    assert any(
        "a chunk was late; the newest was not planned in time" in reason for reason in rig.session.safety.reasons
    )

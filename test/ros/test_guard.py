"""The guard: numbers that may not reach the arm, and the state machine of what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, ramp, toy_contract

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.guard import ChunkRejected, LimitScales, MotionGuard
from omega_qvla_ros.safety_state import SafetyState, State
from omega_qvla_ros.splines import segment_peak_accelerations, segment_peak_speeds, segment_ranges
from omega_qvla_ros.trajectory import Plan, still_plan

START = np.array([0.0, 0.02])
S = 1_000_000_000


def guard(mode: str = "clamp", reject_beyond: float | None = 0.25) -> MotionGuard:
    return MotionGuard(toy_contract(limits={"mode": mode, "reject_beyond_range": reject_beyond}))


def times(count: int = 8) -> np.ndarray:
    return T0 + np.arange(1, count + 1) * PERIOD_NS


def limit(which: MotionGuard, targets: np.ndarray, head: Plan | None = None) -> Plan:
    return which.limit(head or still_plan(T0, START, PERIOD_NS), times(len(targets)), targets)


def test_targets_within_the_limits_pass_unchanged() -> None:
    watched = guard()
    speeding_up = ramp(0.0, 0.0)
    speeding_up[:, 0] = 0.5 * 4.0 * (0.05 * np.arange(1, 9)) ** 2  # 4 rad/s^2, 10 allowed
    plan = limit(watched, speeding_up)
    np.testing.assert_allclose(plan.positions[2:], speeding_up)
    counters = watched.counters
    assert not counters.clamped_position and not counters.clamped_velocity and not counters.clamped_acceleration


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    actions = ramp(0.0, 0.01)
    actions[3, 1] = bad
    watched = guard()
    with pytest.raises(ChunkRejected, match="action 3 of joint 'finger'") as caught:
        watched.check_actions(actions, 8)
    assert caught.value.kind == "not_finite" and watched.counters.rejected["not_finite"] == 1


@pytest.mark.parametrize("shape", [(7, 2), (8, 3), (16,)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ChunkRejected, match="expected"):
        guard().check_actions(np.zeros(shape), 8)


def test_position_is_clamped_and_counted_by_name() -> None:
    watched = guard()
    targets = ramp(0.0, 0.0)
    targets[:, 1] = 0.042
    plan = limit(watched, targets)
    assert plan.positions[:, 1].max() <= 0.04
    assert watched.counters.clamped_position == {"finger": 1}


def test_position_far_outside_is_a_fault() -> None:
    targets = ramp(0.0, 0.0)
    targets[:, 1] = 0.055  # 0.015 beyond a range of 0.04
    with pytest.raises(ChunkRejected, match="target 0.0550 of joint 'finger' is outside"):
        limit(guard(), targets)


def test_reject_mode_refuses_position_and_velocity() -> None:
    targets = ramp(0.0, 0.0)
    targets[:, 1] = 0.0401
    with pytest.raises(ChunkRejected, match="finger") as caught:
        limit(guard("reject"), targets)
    assert caught.value.kind == "position"
    with pytest.raises(ChunkRejected, match="'shoulder' would move at .*the limit is 2.000/s") as caught:
        limit(guard("reject"), ramp(0.0, 0.12))
    assert caught.value.kind == "velocity"


def test_speed_is_clamped_including_the_peaks_inside_segments() -> None:
    watched = guard()
    plan = limit(watched, ramp(0.0, 0.14))  # 2.8 rad/s wanted, 2 allowed
    peaks = segment_peak_speeds(plan.times_ns, plan.positions, plan.velocities)
    assert peaks[:, 0].max() <= 2.0 * (1 + 1e-6)
    assert plan.positions[-1, 0] > 0.59  # 0.2 s from rest to 2 rad/s, then 0.2 s: 0.6 is as far as anything gets
    assert watched.counters.clamped_velocity == {"shoulder": 1}


def test_jump_is_refused_and_named() -> None:
    with pytest.raises(
        ChunkRejected, match="'shoulder' would jump by 0.2000 in 0.050 s .from 0.0000 to 0.2000"
    ) as caught:
        limit(guard(), ramp(0.15, 0.05))
    assert caught.value.kind == "jump"
    targets = ramp(0.0, 0.0)
    targets[4:, 0] = 0.2
    with pytest.raises(ChunkRejected, match="jump"):
        limit(guard(), targets)


def test_joint_with_its_own_jump_limit_may_jump_but_not_faster_than_its_speed() -> None:
    targets = ramp(0.0, 0.0, finger=0.04)
    plan = limit(guard(), targets)  # the finger's limit is its whole range
    assert np.abs(np.diff(plan.positions[:, 1])).max() <= 0.2 * 0.05 * (1 + 1e-9)


def test_arm_outside_its_limits_may_only_come_back() -> None:
    outside = still_plan(T0, np.array([1.2, 0.02]), PERIOD_NS)
    plan = limit(guard(), ramp(1.0, 0.01), head=outside)
    assert plan.positions[0, 0] == 1.2
    assert (np.diff(plan.positions[:, 0]) <= 0).all()
    assert plan.positions[-1, 0] < 1.03


def test_head_keeps_its_velocity() -> None:
    head = Plan(
        np.array([T0 - PERIOD_NS, T0]), np.array([[-0.05, 0.02], [0.0, 0.02]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    )
    plan = limit(guard(), ramp(0.0, 0.05), head=head)
    np.testing.assert_array_equal(plan.velocities[1], [1.0, 0.0])


def test_states_are_ordered_by_severity() -> None:
    safety = SafetyState()
    assert safety.state is State.OK and safety.may_move
    safety.warn("late", "slow")
    assert safety.state is State.DEGRADED and safety.may_move
    safety.hold("front", "'front/image_raw' is stale")
    assert safety.state is State.HOLD and not safety.may_move
    safety.latch("policy", "broken")
    assert safety.state is State.LATCHED
    assert list(safety.reasons) == ["broken", "'front/image_raw' is stale", "slow"]
    assert safety.reset() == ["broken"]
    assert safety.state is State.HOLD
    safety.release("front")
    safety.warn("late", None)
    assert safety.state is State.OK and not safety.reasons


def test_policy_error_holds_half_a_second_and_the_third_in_a_row_latches() -> None:
    safety = SafetyState()
    for k in range(2):
        now = T0 + k * S
        safety.policy_error("NaN", now)
        assert safety.state is State.HOLD
        safety.update(now + S // 2 - 1)
        assert safety.state is State.HOLD
        safety.update(now + S // 2)
        assert safety.state is State.OK
    safety.policy_error("NaN", T0 + 2 * S)
    assert safety.state is State.LATCHED
    safety.update(T0 + 10 * S)
    assert safety.state is State.LATCHED and "3 policy errors in a row" in safety.reasons[0]
    safety.reset()
    assert safety.state is State.OK


def test_success_in_between_resets_the_count() -> None:
    safety = SafetyState()
    for k in range(5):
        safety.policy_error("late", T0 + k * S)
        safety.policy_success()
    assert safety.state is State.HOLD


def test_joint_that_is_close_to_its_limit_stops_there_and_the_others_go_on() -> None:
    """The plan that is being executed would have braked; the new one begins in the middle of that."""
    position, velocity = np.array([[0.0, 0.0005]] * 2), np.array([[1.0, -0.04]] * 2)
    position[0] -= velocity[0] * 0.05
    head = Plan(np.array([T0 - PERIOD_NS, T0]), position, velocity)
    plan = limit(guard(), ramp(0.0, 0.05, finger=0.0), head=head)
    assert len(plan.times_ns) == 2 + 8 + 1
    assert plan.times_ns[2] == pytest.approx(T0 + 2 * 0.0005 / 0.04 * S, abs=1)
    assert plan.positions[2, 1] == pytest.approx(0.0, abs=1e-9)
    assert plan.velocities[2, 1] == pytest.approx(0.0, abs=1e-6)
    assert plan.velocities[2, 0] == pytest.approx(1.0)


def accelerations(plan: Plan) -> np.ndarray:
    return segment_peak_accelerations(plan.times_ns, plan.positions, plan.velocities)


def zigzag() -> np.ndarray:
    """0.8 rad/s there and back in turns: 32 rad/s^2 and more, 10 allowed; no step is a jump, none is too fast."""
    targets = ramp(0.0, 0.0)
    targets[:, 0] = 0.04 * (np.arange(1, 9) % 2)
    return targets


def test_acceleration_inside_a_chunk_is_clamped_and_counted_by_name() -> None:
    watched = guard()
    plan = limit(watched, zigzag())
    assert accelerations(plan).max(axis=0)[0] <= 10.0 * (1 + 1e-6)
    assert watched.counters.clamped_acceleration == {"shoulder": 1}
    assert not watched.counters.clamped_velocity
    assert plan.positions[1:, 0].min() >= -1e-12 and plan.positions[:, 0].max() <= 0.04 + 1e-12


def test_reject_mode_refuses_acceleration_with_joint_value_and_limit() -> None:
    watched = guard("reject")
    with pytest.raises(ChunkRejected, match="'shoulder' would accelerate with .* the limit is 10.000/s.2") as caught:
        limit(watched, zigzag())
    assert caught.value.kind == "acceleration"
    assert watched.counters.rejected_joints == {"acceleration.shoulder": 1}


def test_scale_mode_slows_the_whole_chunk_down_and_keeps_its_path() -> None:
    """Twice the allowed speed once it is under way: the same points, half as fast, for every joint."""
    moving = np.array([[-0.05, 0.02], [0.0, 0.02]])
    head = Plan(np.array([T0 - PERIOD_NS, T0]), moving, np.array([[1.0, 0.0], [1.0, 0.0]]))
    contract = toy_contract(limits={"mode": "scale"})
    watched = MotionGuard(replace(contract, joints=(replace(contract.joints[0], max_jump=0.3), contract.joints[1])))
    targets = np.stack([0.1 * np.arange(1, 9) - 0.05, 0.02 + 0.001 * np.arange(1, 9)], axis=1)
    targets[:, 0] = np.concatenate([[0.05], 0.05 + 0.13 * np.arange(1, 8)])
    plan = limit(watched, targets, head=head)
    assert watched.counters.stretched == 1
    assert plan.end_ns > times()[-1]
    speeds = segment_peak_speeds(plan.times_ns, plan.positions, plan.velocities)
    assert speeds[:, 0].max() <= 2.0 * (1 + 1e-6) and accelerations(plan)[1:, 0].max() <= 10.0 * (1 + 1e-6)
    np.testing.assert_allclose(plan.positions[-1], targets[-1], atol=2e-3)


def test_scale_mode_refuses_what_it_would_have_to_slow_down_too_much() -> None:
    contract = toy_contract(limits={"mode": "scale"})
    watched = MotionGuard(replace(contract, joints=(replace(contract.joints[0], max_jump=3.0), contract.joints[1])))
    targets = ramp(0.0, 0.0)
    targets[:, 0] = 0.9 * (-1.0) ** np.arange(8)
    with pytest.raises(ChunkRejected, match="slowed down .* times for joint 'shoulder'"):
        limit(watched, targets)


def test_limits_can_only_be_tightened() -> None:
    watched = guard()
    for name in ("position", "velocity", "acceleration"):
        for value in (0.0, -0.5, 1.01, np.nan):
            with pytest.raises(ConfigError, match=f"the {name} limit scale is"):
                watched.set_limit_scales(LimitScales(**{name: value}))
    assert watched.limit_scales == LimitScales()
    watched.set_limit_scales(LimitScales(position=0.5, velocity=0.5, acceleration=0.25))
    plan = limit(watched, np.clip(ramp(0.0, 0.07), None, 0.5))
    assert plan.positions[:, 0].max() <= 0.5
    assert segment_peak_speeds(plan.times_ns, plan.positions, plan.velocities)[:, 0].max() <= 1.0 * (1 + 1e-6)
    assert accelerations(plan)[1:, 0].max() <= 2.5 * (1 + 1e-6)
    watched.set_limit_scales(LimitScales())
    np.testing.assert_array_equal(watched.limits.max_velocity, watched.contract_limits.max_velocity)


def test_arm_that_is_too_fast_for_lowered_limits_brakes_into_them_and_keeps_the_contracts() -> None:
    """1.5 rad/s, 0.15 rad before the limit: 10 rad/s^2 can stop there, the lowered 2 rad/s^2 cannot."""
    watched = guard()
    watched.set_limit_scales(LimitScales(acceleration=0.2, velocity=0.5))
    position, velocity = np.array([[0.775, 0.02], [0.85, 0.02]]), np.array([[1.5, 0.0]] * 2)
    head = Plan(np.array([T0 - PERIOD_NS, T0]), position, velocity)
    plan = limit(watched, ramp(0.85, 0.02), head=head)
    _, high = segment_ranges(plan.times_ns, plan.positions, plan.velocities)
    assert high[:, 0].max() <= 1.0 + 1e-9
    assert accelerations(plan)[1:, 0].max() <= 10.0 * (1 + 1e-6)
    assert abs(plan.velocities[-1, 0]) <= 1.0

"""Spline arithmetic, plans, holds and windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_fixtures import PERIOD_NS, T0, toy_contract

from omega_qvla_ros import jtc
from omega_qvla_ros.splines import (
    hermite,
    knot_velocities,
    nanoseconds,
    segment_peak_accelerations,
    segment_peak_speeds,
    segment_ranges,
)
from omega_qvla_ros.trajectory import REST_NS, Plan, brakable_velocity, hold_plan, still_plan, stop_knots, window

LIMITS = toy_contract().joint_limits()
NAMES = ("shoulder", "finger")
value = st.floats(-1.0, 1.0, allow_nan=False)


def moving_plan(speed: float = 1.0) -> Plan:
    """The shoulder moves at constant speed for 8 periods, then brakes."""
    times = T0 + np.arange(9) * PERIOD_NS
    positions = np.stack([-0.4 + speed * 0.05 * np.arange(9), np.full(9, 0.02)], axis=1)
    velocities = np.tile([speed, 0.0], (9, 1))
    return Plan(times, positions, velocities).then(*stop_knots(int(times[-1]), positions[-1], velocities[-1], LIMITS))


@given(st.lists(value, min_size=4, max_size=4), st.floats(0.01, 1.0))
def test_peak_speed_and_range_bound_the_dense_cubic(states: list[float], duration_s: float) -> None:
    p0, v0, p1, v1 = (np.array([x]) for x in states)
    times = np.array([0, nanoseconds(duration_s)])
    positions, velocities = np.vstack([p0, p1]), np.vstack([v0, v1])
    duration_s = times[1] * 1e-9
    samples = [hermite(t, duration_s, p0, v0, p1, v1) for t in np.linspace(0.0, duration_s, 101)]
    dense_p = np.array([p[0] for p, _ in samples])
    dense_v = np.array([v[0] for _, v in samples])
    peak = segment_peak_speeds(times, positions, velocities)[0, 0]
    low, high = segment_ranges(times, positions, velocities)
    scale = 1.0 + 1.0 / duration_s
    assert np.abs(dense_v).max() <= peak + 1e-9 * scale
    assert dense_p.min() >= low[0, 0] - 1e-9 and dense_p.max() <= high[0, 0] + 1e-9
    assert peak <= np.abs(dense_v).max() + 0.01 * scale
    assert high[0, 0] <= dense_p.max() + 0.01


def test_knot_velocity_is_the_parabolas_bounded_by_the_differences_and_zero_where_the_direction_changes() -> None:
    times = np.array([0, 1, 2, 3, 4, 5]) * 1_000_000_000
    positions = np.array([0.0, 1.0, 3.0, 2.0, 0.0, -0.1])[:, None]
    velocities = knot_velocities(times, positions, np.array([0.5]))
    np.testing.assert_allclose(velocities[:, 0], [0.5, 1.5, 0.0, -1.5, -0.3, -0.1])  # -1.05 would be 10 x the slope


def test_motion_of_constant_acceleration_is_drawn_exactly() -> None:
    times = np.array([0.0, 0.1, 0.15, 0.3])
    positions = (0.5 * 3.0 * times**2)[:, None]
    times_ns = np.array([nanoseconds(float(t)) for t in times])
    velocities = knot_velocities(times_ns, positions, np.array([0.0]))
    velocities[-1] = 3.0 * times[-1]
    np.testing.assert_allclose(segment_peak_accelerations(times_ns, positions, velocities), 3.0)


def test_states_are_the_sampled_cubic_with_its_acceleration() -> None:
    plan = moving_plan()
    times_ns = np.arange(T0 - 10_000_000, plan.end_ns + 20_000_000, 13_000_000)
    positions, velocities, accelerations = plan.states(times_ns)
    for k, time_ns in enumerate(times_ns):
        np.testing.assert_array_equal(positions[k], plan.sample(int(time_ns))[0])
        np.testing.assert_array_equal(velocities[k], plan.sample(int(time_ns))[1])
    assert accelerations[0, 0] == 0.0 and accelerations[-1, 0] == 0.0
    assert accelerations[:, 0].min() == pytest.approx(-10.0)


def test_plan_is_cut_at_a_knot_or_well_behind_it() -> None:
    plan = moving_plan()
    for offset, expected in ((0, 0), (1, 1_000_000), (999_999, 1_000_000), (-400_000, 0), (25_000_000, 25_000_000)):
        assert plan.free_time(T0 + PERIOD_NS + offset) == T0 + PERIOD_NS + expected


def test_stop_lies_half_v_t_beyond_and_the_slowest_joint_sets_the_time() -> None:
    velocity = np.array([1.0, 0.04])
    times, positions, velocities = stop_knots(T0, np.array([0.0, 0.02]), velocity, LIMITS)
    t = 1.0 / 10.0  # shoulder: 1 rad/s at 10 rad/s^2; the finger alone would need 0.02 s
    assert list(times) == [T0 + nanoseconds(t)]
    np.testing.assert_allclose(positions[-1], [0.0 + 1.0 * t / 2, 0.02 + 0.04 * t / 2])
    np.testing.assert_array_equal(velocities[-1], 0.0)


def test_joint_near_its_limit_stops_there_before_the_others() -> None:
    times, positions, velocities = stop_knots(T0, np.array([0.0, 0.039]), np.array([1.0, 0.1]), LIMITS)
    assert len(times) == 2
    np.testing.assert_allclose(positions[:, 1], 0.04, atol=1e-9)
    assert velocities[0, 1] == pytest.approx(0.0, abs=1e-6) and velocities[0, 0] > 0.5


def test_brakable_velocity_stops_exactly_at_the_limit() -> None:
    velocity = brakable_velocity(np.array([0.95, 0.0]), np.array([2.0, -0.1]), LIMITS)
    assert velocity[0] == pytest.approx(np.sqrt(2 * 10.0 * 0.05))
    assert velocity[1] == 0.0


@settings(deadline=None)
@given(st.floats(-1.0, 1.0), st.floats(0.0, 0.04), st.floats(-2.0, 2.0), st.floats(-0.2, 0.2))
def test_stop_never_leaves_the_position_limits(p: float, g: float, v: float, w: float) -> None:
    position = np.array([p, g])
    velocity = brakable_velocity(position, np.array([v, w]), LIMITS)
    times, positions, velocities = stop_knots(T0, position, velocity, LIMITS)
    plan = Plan(np.array([T0]), position[None], velocity[None]).then(times, positions, velocities)
    low, high = segment_ranges(plan.times_ns, plan.positions, plan.velocities)
    assert (low >= LIMITS.position_min - 1e-8).all() and (high <= LIMITS.position_max + 1e-8).all()
    assert (np.diff(plan.times_ns) > 0).all()
    np.testing.assert_array_equal(plan.velocities[-1], 0.0)


def test_committed_part_is_the_same_curve() -> None:
    plan = moving_plan()
    cut_ns = T0 + 130_000_000
    cut = plan.committed(cut_ns, cut_ns - PERIOD_NS)
    assert cut.times_ns[0] == T0 + PERIOD_NS and cut.end_ns == cut_ns
    for time_ns in range(int(cut.times_ns[0]), cut_ns, 7_000_000):
        np.testing.assert_allclose(cut.sample(time_ns), plan.sample(time_ns), atol=1e-12)


def test_hold_decelerates_from_the_command_and_outlasts_three_repetitions() -> None:
    plan = moving_plan(speed=2.0)
    now = T0 + 130_000_000
    hold = hold_plan(plan, now - PERIOD_NS, now, LIMITS, PERIOD_NS, 4)
    np.testing.assert_allclose(hold.sample(now)[0], plan.sample(now)[0])
    np.testing.assert_allclose(hold.sample(now)[1], plan.sample(now)[1])
    expected = plan.sample(now)[0][0] + 2.0 * 0.2 / 2
    assert hold.positions[-1, 0] == pytest.approx(expected)
    assert hold.end_ns > now + 3 * PERIOD_NS
    np.testing.assert_array_equal(hold.velocities[-1], 0.0)


def test_window_starts_one_period_back_and_is_accepted_by_the_controller() -> None:
    plan = moving_plan()
    now = T0 + 130_000_000
    trajectory = window(plan, now, NAMES, PERIOD_NS)
    assert trajectory.stamp_ns == T0 + PERIOD_NS
    assert trajectory.points[0].time_from_start_ns == 0
    assert trajectory.end_ns == plan.end_ns + REST_NS  # a message that is delivered late is still taken
    assert jtc.validate(trajectory, now, NAMES) is None
    assert jtc.validate(trajectory, plan.end_ns + 1, NAMES) is None
    assert jtc.validate(trajectory, plan.end_ns + REST_NS + 1, NAMES) is not None


def test_repeated_windows_do_not_disturb_a_running_controller() -> None:
    plan = moving_plan()
    executor = jtc.TrajectoryExecutor(NAMES)
    executor.hold(plan.positions[0])
    for now in range(T0, plan.end_ns, 10_000_000):
        if (now - T0) % PERIOD_NS == 0:
            assert executor.accept(window(plan, now, NAMES, PERIOD_NS), now) is None
        position, _ = executor.sample(now, np.array([9.0, 9.0]), np.zeros(2))
        np.testing.assert_allclose(position, plan.sample(now)[0], atol=1e-12)


def test_still_plan_is_at_rest() -> None:
    plan = still_plan(T0, np.array([0.1, 0.02]), PERIOD_NS)
    np.testing.assert_array_equal(plan.sample(T0 + 12345)[0], [0.1, 0.02])
    np.testing.assert_array_equal(plan.sample(T0 - 20_000_000)[1], 0.0)

"""The follower: whatever the targets, the motion is within every limit at every instant and can be stopped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from robot_fixtures import PERIOD_NS, T0

from omega_qvla_ros.contract import JointLimits
from omega_qvla_ros.follower import follow
from omega_qvla_ros.splines import knot_velocities, segment_peak_accelerations, segment_peak_speeds, segment_ranges
from omega_qvla_ros.trajectory import Plan, brakable_velocity, stop_knots

UNIT = st.floats(0.0, 1.0)


def limits(low: float = -1.0, high: float = 1.0, speed: float = 2.0, acceleration: float = 10.0) -> JointLimits:
    one = np.ones(1)
    return JointLimits(low * one, high * one, speed * one, acceleration * one, one, one)


def reference(box: JointLimits, start: tuple[float, float], targets: list[float], first_ns: int = PERIOD_NS) -> Plan:
    times = T0 + np.concatenate([[0], first_ns + PERIOD_NS * np.arange(len(targets))])
    positions = np.array([start[0], *targets])[:, None]
    velocities = knot_velocities(times, positions, np.array([start[1]]))
    velocities[-1] = brakable_velocity(positions[-1], velocities[-1], box)
    return Plan(times, positions, velocities)


def with_stop(plan: Plan, box: JointLimits) -> Plan:
    return plan.then(*stop_knots(plan.end_ns, plan.positions[-1], plan.velocities[-1], box))


def check(plan: Plan, box: JointLimits, speed_slack: float = 0.0) -> None:
    """The cubic itself, by its closed forms and densely."""
    numbers = (plan.times_ns, plan.positions, plan.velocities)
    low, high = segment_ranges(*numbers)
    assert low.min() >= box.position_min[0] - 1e-8 and high.max() <= box.position_max[0] + 1e-8
    assert segment_peak_speeds(*numbers).max() <= box.max_velocity[0] * (1 + 1e-6) + speed_slack
    spans_s = np.diff(plan.times_ns) * 1e-9
    rounding = 100 * np.finfo(float).eps / spans_s[:, None] ** 2  # positions of size 1 in a segment that short
    over = segment_peak_accelerations(*numbers) - rounding
    assert over.max() <= box.max_acceleration[0] * (1 + 1e-6)
    times_ns = np.linspace(plan.times_ns[0], plan.end_ns - 1, 150).astype(np.int64)
    positions, velocities, _ = plan.states(times_ns)
    assert np.isfinite(positions).all()
    dense_s = np.diff(times_ns)[:, None] * 1e-9
    change = np.abs(np.diff(velocities, axis=0))
    assert (change <= box.max_acceleration[0] * dense_s * (1 + 1e-5) + 1e-6).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(UNIT, st.sampled_from([0.0, 1.0])), min_size=1, max_size=12),
    UNIT,
    st.floats(-1.0, 1.0),
    st.floats(0.25, 1.25),
    st.sampled_from([(-1.0, 1.0, 2.0, 10.0), (0.0, 0.04, 0.15, 1.5), (-2.8, 2.8, 3.0, 60.0), (0.0, 0.04, 0.2, 2.0)]),
)
def test_any_targets_from_any_state_that_can_stop(shares, start, speed, first, numbers) -> None:
    box = limits(*numbers)
    width = box.position_max[0] - box.position_min[0]
    at = box.position_min[0] + start * width
    moving = float(brakable_velocity(np.array([at]), np.array([speed * box.max_velocity[0]]), box)[0])
    targets = [box.position_min[0] + share * width for share in shares]
    plan = follow(reference(box, (at, moving), targets, int(first * PERIOD_NS)), box, box)
    assert plan.positions[0, 0] == at and plan.velocities[0, 0] == moving
    check(with_stop(plan, box), box)
    for time_ns in np.linspace(T0, plan.end_ns - 1, 4).astype(np.int64):  # a hold may come at any time
        position, velocity = (
            plan.sample(int(time_ns)) if time_ns < plan.end_ns else (plan.positions[-1], plan.velocities[-1])
        )
        check(with_stop(Plan(np.array([time_ns]), position[None], velocity[None]), box), box)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(UNIT, min_size=2, max_size=8), st.floats(0.1, 1.0), st.floats(0.1, 1.0), UNIT, st.floats(-1.0, 1.0))
@example([0.0] * 5, 0.1, 1.0, 0.01, -1.0)
def test_lowered_limits_are_braked_into_and_the_contracts_are_kept(shares, speed, acceleration, start, moving) -> None:
    hard = limits()
    box = limits(speed=2.0 * speed, acceleration=10.0 * acceleration)
    at = np.array([2.0 * start - 1.0])
    velocity = float(brakable_velocity(at, np.array([2.0 * moving]), hard)[0])
    plan = follow(reference(box, (float(at[0]), velocity), [2.0 * share - 1.0 for share in shares]), box, hard)
    check(plan, hard)
    velocities, slack = plan.velocities[:, 0], box.max_velocity[0] * 1e-9
    too_fast = np.abs(velocities) > box.max_velocity[0] + slack
    back = velocities * velocity < 0.0
    # Faster than lowered: braking from the start on, or on the way back from the contract's limit, where a joint that
    # can stop, but not in whole segments, turns round in one.
    for fast in (np.flatnonzero(too_fast & ~back), np.flatnonzero(too_fast & back)):
        assert (np.diff(fast) == 1).all() and (np.diff(np.abs(velocities[fast])) < 0).all()
    if (too_fast & back).any():
        room = 1.0 + at[0] if velocity < 0.0 else 1.0 - at[0]
        assert velocity * velocity / 20.0 + abs(velocity) * PERIOD_NS / 2e9 > room
        assert not back[np.flatnonzero(too_fast & back)[0] - 1]


def test_stop_of_some_microseconds_brakes_no_harder_than_any_other() -> None:
    """At 2e-8 rad from the limit, as fast as can be braked there: 63 us, of which a nanosecond is a share."""
    box = limits()
    at = np.array([-1.0 + 2e-8])
    velocity = brakable_velocity(at, np.array([-2.0]), box)
    check(with_stop(Plan(np.array([T0]), at[None], velocity[None]), box), box)


def test_reference_that_fits_is_followed_exactly() -> None:
    box = limits()
    wave = [0.3 * np.sin(4.0 * 0.05 * k) for k in range(1, 16)]
    ref = reference(box, (0.0, 1.2), wave)
    plan = follow(ref, box, box)
    np.testing.assert_array_equal(plan.positions, ref.positions)
    np.testing.assert_array_equal(plan.velocities, ref.velocities)


def test_step_is_approached_as_fast_as_the_limits_allow_without_overshoot_and_without_swinging() -> None:
    box = limits()
    plan = follow(reference(box, (0.0, 0.0), [0.8] * 20), box, box)
    assert plan.positions[:, 0].max() <= 0.8 + 1e-12
    assert (np.diff(plan.positions[:, 0]) >= -1e-12).all()
    best_s = 0.8 / 2.0 + 2.0 / 10.0  # trapezoid
    near = int(np.argmax(plan.positions[:, 0] > 0.8 - 0.01)) * 0.05
    assert near <= best_s + 0.35
    assert plan.positions[-1, 0] == pytest.approx(0.8, abs=5e-3)


def test_sudden_stop_that_lies_ahead_is_braked_for_in_time() -> None:
    """0.1 rad per period, then nothing: 2 rad/s need 0.2 rad at 10 rad/s^2."""
    box = limits()
    plan = follow(reference(box, (-0.5, 2.0), [-0.4, -0.3, -0.2, -0.1, 0.0] + [0.0] * 10), box, box)
    _, high = segment_ranges(plan.times_ns, plan.positions, plan.velocities)
    assert high.max() <= 1e-9
    assert plan.positions[-1, 0] == pytest.approx(0.0, abs=1e-3)


def test_noise_on_a_slow_motion_is_smoothed_and_not_amplified() -> None:
    box = limits()
    rng = np.random.default_rng(0)
    clean = 0.5 * 0.05 * np.arange(1, 60)
    noisy = np.minimum(clean - 0.9, 1.0) + rng.normal(0.0, 0.02, 59)
    ref = reference(box, (-0.9, 0.0), list(noisy))
    plan = follow(ref, box, box)
    error = plan.positions[1:, 0] - (clean - 0.9)
    assert np.abs(error[5:]).max() < 0.07
    assert np.std(np.diff(plan.velocities[:, 0])) < 0.9 * np.std(np.diff(ref.velocities[:, 0]))


def test_joint_outside_its_limits_only_comes_back() -> None:
    box = limits()
    for targets in ([1.0] * 8, [0.5] * 8):
        plan = follow(reference(box, (1.3, 0.0), targets), box, box)
        assert (np.diff(plan.positions[:, 0]) <= 0).all()
        assert segment_peak_accelerations(plan.times_ns, plan.positions, plan.velocities).max() <= 10.0 * (1 + 1e-6)

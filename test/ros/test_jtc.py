"""The rules of a stock joint_trajectory_controller: what it rejects and how it moves."""

from __future__ import annotations

import numpy as np
import pytest
from robot_fixtures import T0

from omega_qvla_ros.jtc import TrajectoryExecutor, validate
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

NAMES = ("a", "b")
S = 1_000_000_000
ZERO = np.zeros(2)


def point(t_s: float, positions, velocities=(), accelerations=(), effort=()) -> TrajectoryPoint:
    arrays = [np.array(x, dtype=float) for x in (positions, velocities, accelerations, effort)]
    return TrajectoryPoint(arrays[0], round(t_s * S), arrays[1], arrays[2], arrays[3])


def trajectory(*points: TrajectoryPoint, stamp_ns: int = T0, names=NAMES) -> JointTrajectory:
    return JointTrajectory(tuple(names), stamp_ns, points)


GOOD = point(1.0, [1, 2], [0, 0])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (trajectory(GOOD, names=()), "no joint names"),
        (trajectory(GOOD, names=("a",)), "1 joints, the controller has 2"),
        (trajectory(GOOD, names=("a", "c")), "unknown joint 'c'"),
        (trajectory(GOOD, names=("a", "a")), "joint 'a' occurs twice and joint 'b' is missing"),
        (trajectory(), "no points"),
        (trajectory(point(1.0, [1, 2], [0, 0.1])), "velocity of the last point is not zero.*'b'"),
        (trajectory(point(0.0, [1]), GOOD), "point 0 has 1 positions"),
        (trajectory(point(0.0, []), GOOD), "point 0 has 0 positions"),
        (trajectory(point(0.0, [1, 2], [1]), GOOD), "point 0 has 1 velocities"),
        (trajectory(point(0.0, [1, 2], [1, 1], [1]), GOOD), "point 0 has 1 accelerations"),
        (trajectory(point(0.0, [1, 2], effort=[1, 1]), GOOD), "effort"),
        (trajectory(GOOD, GOOD), "not strictly increasing at point 1"),
        (trajectory(point(-1.0, [1, 2]), GOOD), "negative"),
        (trajectory(GOOD, stamp_ns=T0 - 2 * S), "in the past"),
    ],
)
def test_rejected(message: JointTrajectory, reason: str) -> None:
    found = validate(message, T0, NAMES)
    assert found is not None
    assert __import__("re").search(reason, found), found


@pytest.mark.parametrize(
    "message",
    [
        trajectory(GOOD),
        trajectory(GOOD, names=("b", "a")),
        trajectory(point(0.0, [0, 0]), GOOD),
        trajectory(point(0.0, [0, 0], [5, 5]), GOOD),
        trajectory(point(1.0, [1, 2])),
        trajectory(GOOD, stamp_ns=T0 - S),  # ends exactly now
        trajectory(GOOD, stamp_ns=0),
        trajectory(point(0.5, [np.nan, 1e9]), GOOD),  # not the controller's work
    ],
)
def test_accepted(message: JointTrajectory) -> None:
    assert validate(message, T0, NAMES) is None


def run(executor: TrajectoryExecutor, t_s: float, measured=ZERO) -> np.ndarray:
    return executor.sample(T0 + round(t_s * S), np.array(measured, dtype=float), ZERO)[0]


def test_holds_the_measured_position_until_told() -> None:
    executor = TrajectoryExecutor(NAMES)
    np.testing.assert_array_equal(run(executor, 0.0, [0.3, 0.4]), [0.3, 0.4])
    np.testing.assert_array_equal(run(executor, 1.0, [9, 9]), [0.3, 0.4])


def test_joint_order_of_the_message_does_not_matter() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(1.0, [2, 1]), names=("b", "a")), T0)
    run(executor, 0.0)
    np.testing.assert_allclose(run(executor, 2.0), [1, 2])


def test_rejected_message_leaves_the_present_one_running() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(1.0, [1, 1])), T0)
    assert run(executor, 0.0) is not None
    assert executor.accept(trajectory(), T0) is not None
    np.testing.assert_allclose(run(executor, 0.5), [0.5, 0.5])


def test_stamp_zero_starts_at_the_first_sample() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(1.0, [1, 1]), stamp_ns=0), T0)
    np.testing.assert_allclose(run(executor, 5.0), [0, 0])
    np.testing.assert_allclose(run(executor, 5.5), [0.5, 0.5])


def test_first_point_at_zero_with_stamp_zero_is_a_step() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(0.0, [1, 1]), stamp_ns=0), T0)
    np.testing.assert_allclose(run(executor, 0.0), [1, 1])


def test_future_stamp_replaces_at_once_and_starts_from_the_measured_state() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(10.0, [10, 10])), T0)
    run(executor, 0.0)
    np.testing.assert_allclose(run(executor, 2.0), [2, 2])
    executor.accept(trajectory(point(0.0, [4, 4]), point(1.0, [4, 4]), stamp_ns=T0 + 4 * S), T0 + 2 * S)
    np.testing.assert_allclose(run(executor, 2.0, [1.0, 1.0]), [1, 1])  # measured, not the old tail
    np.testing.assert_allclose(run(executor, 3.0), [2.5, 2.5])


def test_from_desired_state() -> None:
    executor = TrajectoryExecutor(NAMES, interpolate_from_desired_state=True)
    executor.accept(trajectory(point(10.0, [10, 10])), T0)
    run(executor, 0.0)
    run(executor, 2.0)
    executor.accept(trajectory(point(0.0, [4, 4]), stamp_ns=T0 + 4 * S), T0 + 2 * S)
    np.testing.assert_allclose(run(executor, 2.0, [1.0, 1.0]), [2, 2])


def test_past_stamp_samples_in_the_middle_of_a_segment() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(0.0, [0, 0]), point(2.0, [2, 2]), stamp_ns=T0 - S), T0)
    np.testing.assert_allclose(run(executor, 0.5, [9, 9]), [1.5, 1.5])


def test_end_is_held_with_zero_velocity() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(1.0, [1, 2])), T0)
    run(executor, 0.0)
    position, velocity = executor.sample(T0 + 9 * S, ZERO, ZERO)
    np.testing.assert_allclose(position, [1, 2])
    np.testing.assert_array_equal(velocity, 0)


def test_interpolation_order_follows_the_derivatives() -> None:
    """Linear with positions, cubic with velocities, quintic with accelerations: midpoints known in closed form."""
    ends = {
        "linear": (point(0.0, [0, 0]), point(2.0, [2, 4]), [1.0, 2.0]),
        "cubic": (point(0.0, [0, 0], [1, 0]), point(2.0, [2, 4], [0, 0]), [1.25, 2.0]),
        # p(1) = (p0 + p1)/2 + T (v0 - v1) 5/32 + T^2 (a0 + a1)/64 with T = 2
        "quintic": (point(0.0, [0, 0], [1, 0], [2, 0]), point(2.0, [2, 4], [0, 0], [0, 4]), [1.4375, 2.25]),
    }
    for name, (first, last, middle) in ends.items():
        executor = TrajectoryExecutor(NAMES)
        executor.accept(trajectory(first, last), T0)
        np.testing.assert_allclose(run(executor, 1.0), middle, err_msg=name)


def test_quintic_meets_its_end_states() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(
        trajectory(point(0.0, [0, 1], [1, -1], [2, 0]), point(1.5, [2, 4], [0.5, 0], [0, 3]), point(3, [0, 0], [0, 0])),
        T0,
    )
    executor.sample(T0, ZERO, ZERO)
    just_before = executor.sample(T0 + 1_499_999_999, ZERO, ZERO)
    np.testing.assert_allclose(just_before[0], [2, 4], atol=1e-6)
    np.testing.assert_allclose(just_before[1], [0.5, 0], atol=1e-6)


def test_hold_drops_the_trajectory() -> None:
    executor = TrajectoryExecutor(NAMES)
    executor.accept(trajectory(point(1.0, [1, 2])), T0)
    run(executor, 0.0)
    executor.hold(np.array([0.2, 0.3]))
    np.testing.assert_array_equal(run(executor, 0.9), [0.2, 0.3])

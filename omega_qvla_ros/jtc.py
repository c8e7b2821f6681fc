"""The rules of a stock joint_trajectory_controller (ros2_controllers 4.42 Jazzy, 5.17 Kilted) in plain Python.

Two users: the simulator bridge, whose controller this is, and the policy node, which checks every message before it
is sent, because the real controller refuses silently. Only the topic interface with the default options is covered:
no partial joints, no velocity at the end, no effort interface, ``interpolation_method: splines``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from omega_qvla_ros.splines import hermite, seconds
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

MAX_END_VELOCITY = float(np.finfo(np.float32).eps)
"""Last velocity that counts as zero, rad/s or m/s; the controller compares with the epsilon of a float."""


def validate(trajectory: JointTrajectory, now_ns: int, joint_names: Sequence[str]) -> str | None:
    """Whether a controller for ``joint_names`` accepts a trajectory.

    NaN, limits and jumps are not checked, exactly as in the controller: that is the guard's work. A joint that occurs
    twice is refused although the controller does not look at it: another joint would have no command.

    Args:
        trajectory: The message.
        now_ns: The controller's clock.
        joint_names: The controller's joints, any order.

    Returns:
        None if it is accepted, else the reason.
    """
    for check in (_check_joints, _check_points, _check_sizes):
        reason = check(trajectory, joint_names)
        if reason is not None:
            return reason
    return _check_times(trajectory, now_ns)


def _check_joints(trajectory: JointTrajectory, joint_names: Sequence[str]) -> str | None:
    if not trajectory.joint_names:
        return "no joint names"
    if len(trajectory.joint_names) != len(joint_names):
        return f"{len(trajectory.joint_names)} joints, the controller has {len(joint_names)}"
    unknown = [name for name in trajectory.joint_names if name not in joint_names]
    if unknown:
        return f"unknown joint {unknown[0]!r}; the controller has {', '.join(joint_names)}"
    missing = [name for name in joint_names if name not in trajectory.joint_names]
    if missing:
        twice = next(name for name in trajectory.joint_names if trajectory.joint_names.count(name) > 1)
        return f"joint {twice!r} occurs twice and joint {missing[0]!r} is missing"
    return None


def _check_points(trajectory: JointTrajectory, joint_names: Sequence[str]) -> str | None:
    if not trajectory.points:
        return "no points (an empty trajectory does not stop the arm)"
    last = trajectory.points[-1]
    if len(last.velocities) and np.max(np.abs(last.velocities)) > MAX_END_VELOCITY:
        joint = trajectory.joint_names[int(np.argmax(np.abs(last.velocities))) % len(trajectory.joint_names)]
        return f"velocity of the last point is not zero (joint {joint!r})"
    return None


def _check_sizes(trajectory: JointTrajectory, joint_names: Sequence[str]) -> str | None:
    count = len(joint_names)
    for k, point in enumerate(trajectory.points):
        if len(point.positions) != count:
            return f"point {k} has {len(point.positions)} positions for {count} joints"
        for name in ("velocities", "accelerations"):
            length = len(getattr(point, name))
            if length not in (0, count):
                return f"point {k} has {length} {name} for {count} joints"
        if len(point.effort):
            return f"point {k} has effort, the controller has no effort interface"
    return None


def _check_times(trajectory: JointTrajectory, now_ns: int) -> str | None:
    if trajectory.stamp_ns != 0 and trajectory.end_ns < now_ns:
        return f"the last point is {seconds(now_ns - trajectory.end_ns):.3f} s in the past"
    times = [point.time_from_start_ns for point in trajectory.points]
    if times[0] < 0:
        return "time_from_start of point 0 is negative"
    for k, (before, after) in enumerate(itertools.pairwise(times)):
        if after <= before:
            return f"time_from_start is not strictly increasing at point {k + 1}"
    return None


class TrajectoryExecutor:
    """Executes trajectories as the controller does: the newest accepted one replaces the older at once.

    Before point 0 it interpolates from the state in which the trajectory found the arm, between points by the order
    that the given derivatives allow (linear, cubic, quintic), after the last point it holds the last command.

    Args:
        joint_names: Joints in the order of all arrays here; messages may have another order.
        interpolate_from_desired_state: Start the way to point 0 at the last command instead of the measured state.
            The controller's default is False; True is recommended for streaming.
    """

    def __init__(self, joint_names: Sequence[str], interpolate_from_desired_state: bool = False) -> None:
        self.joint_names = tuple(joint_names)
        self._from_desired = interpolate_from_desired_state
        self._trajectory: JointTrajectory | None = None
        self._start_ns = 0
        self._times_ns = np.empty(0, dtype=np.int64)
        self._sampled = False
        self._before: tuple[int, TrajectoryPoint] | None = None
        self._held: TrajectoryPoint | None = None

    def hold(self, positions: np.ndarray) -> None:
        """Drop the trajectory and stand still at ``positions`` ``[joints]``; as after activation."""
        self._trajectory = None
        self._held = _rest(positions)

    def accept(self, trajectory: JointTrajectory, now_ns: int) -> str | None:
        """Validate a trajectory and let it replace the present one.

        Returns:
            None if it was accepted, else the reason, and the present trajectory goes on.
        """
        reason = validate(trajectory, now_ns, self.joint_names)
        if reason is not None:
            return reason
        order = [trajectory.joint_names.index(name) for name in self.joint_names]
        points = tuple(_reorder(point, order) for point in trajectory.points)
        self._trajectory = JointTrajectory(self.joint_names, trajectory.stamp_ns, points)
        self._times_ns = np.array([point.time_from_start_ns for point in points], dtype=np.int64)
        self._sampled = False
        return None

    def sample(
        self, now_ns: int, measured_positions: np.ndarray, measured_velocities: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Desired state now.

        Args:
            now_ns: Controller clock; must not decrease.
            measured_positions: ``[joints]``.
            measured_velocities: ``[joints]``.

        Returns:
            Positions and velocities ``[joints]``.
        """
        if self._held is None:
            self._held = _rest(measured_positions)
        if self._trajectory is None:
            return self._held.positions.copy(), self._held.velocities.copy()
        if not self._sampled:
            self._sampled = True
            self._start_ns = self._trajectory.stamp_ns or now_ns
            measured = TrajectoryPoint(np.array(measured_positions), 0, np.array(measured_velocities))
            self._before = (now_ns, self._held if self._from_desired else measured)
        positions, velocities = self._interpolate(now_ns - self._start_ns)
        self._held = TrajectoryPoint(positions, 0, velocities)
        return positions.copy(), velocities.copy()

    def _interpolate(self, elapsed_ns: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._trajectory is not None and self._before is not None
        points = self._trajectory.points
        if elapsed_ns >= self._times_ns[-1]:
            return points[-1].positions, np.zeros(len(self.joint_names))
        if elapsed_ns < self._times_ns[0]:
            before_ns, before = self._before
            return _between(before, before_ns - self._start_ns, points[0], int(self._times_ns[0]), elapsed_ns)
        k = int(np.searchsorted(self._times_ns, elapsed_ns, side="right")) - 1
        return _between(points[k], int(self._times_ns[k]), points[k + 1], int(self._times_ns[k + 1]), elapsed_ns)


def _rest(positions: np.ndarray) -> TrajectoryPoint:
    return TrajectoryPoint(np.array(positions, dtype=np.float64), 0, np.zeros(len(positions)))


def _reorder(point: TrajectoryPoint, order: list[int]) -> TrajectoryPoint:
    def pick(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, dtype=np.float64)[order] if len(values) else np.empty(0)

    return TrajectoryPoint(
        pick(point.positions), point.time_from_start_ns, pick(point.velocities), pick(point.accelerations)
    )


def _between(
    a: TrajectoryPoint, a_ns: int, b: TrajectoryPoint, b_ns: int, now_ns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate with the highest order for which both points carry derivatives."""
    duration_s = float(seconds(b_ns - a_ns))
    if duration_s <= 0.0:
        return b.positions, np.zeros_like(b.positions)
    elapsed_s = float(seconds(now_ns - a_ns))
    has_velocity = len(a.velocities) > 0 and len(b.velocities) > 0
    has_acceleration = len(a.accelerations) > 0 and len(b.accelerations) > 0
    if not has_velocity:
        slope = (b.positions - a.positions) / duration_s
        return a.positions + slope * elapsed_s, slope
    if not has_acceleration:
        return hermite(elapsed_s, duration_s, a.positions, a.velocities, b.positions, b.velocities)
    return _quintic(elapsed_s, duration_s, a, b)


def _quintic(
    elapsed_s: float, duration_s: float, a: TrajectoryPoint, b: TrajectoryPoint
) -> tuple[np.ndarray, np.ndarray]:
    """The quintic through positions, velocities and accelerations of both points.

    Written as the parabola that leaves ``a`` plus ``u^3 (c0 + c1 u + c2 u^2)``; the three coefficients close the gap
    in position, velocity and acceleration at ``b`` (``u`` is the time over the duration).
    """
    t, u = duration_s, elapsed_s / duration_s
    gap_p = b.positions - (a.positions + t * a.velocities + 0.5 * t * t * a.accelerations)
    gap_v = (b.velocities - (a.velocities + t * a.accelerations)) * t
    gap_a = (b.accelerations - a.accelerations) * t * t
    c0 = 10.0 * gap_p - 4.0 * gap_v + 0.5 * gap_a
    c1 = -15.0 * gap_p + 7.0 * gap_v - gap_a
    c2 = 6.0 * gap_p - 3.0 * gap_v + 0.5 * gap_a
    position = a.positions + elapsed_s * (a.velocities + 0.5 * elapsed_s * a.accelerations)
    position = position + u**3 * (c0 + u * (c1 + u * c2))
    velocity = a.velocities + elapsed_s * a.accelerations + u**2 * (3 * c0 + u * (4 * c1 + u * 5 * c2)) / t
    return position, velocity

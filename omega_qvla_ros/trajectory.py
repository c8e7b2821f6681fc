"""Plans and the rolling window: what a stock joint_trajectory_controller receives.

A ``Plan`` is the commanded motion as knots on the absolute ROS time line. Every published trajectory is a window of
it: it begins one control period in the past, so that the controller is already inside a segment when it arrives, and
ends in a zero-velocity point, so that the arm stops by itself when nothing follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from omega_qvla_ros.contract import JointLimits
from omega_qvla_ros.splines import NS_PER_S, hermite, nanoseconds, seconds

_EMPTY = np.empty(0)
REST_NS = 500_000_000
"""Every message ends with so long a rest at its last point, where the arm stands anyway. A controller refuses a message
whose end has passed, so a hold that a busy machine delivers late would be lost."""
MIN_STOP_S = 0.01
"""Shortest stop segment: one step of a 100 Hz controller; a shorter one would fall between two of its samples."""
MIN_SPACING_S = 0.001
"""Knots that are chosen freely keep this distance: the shorter a segment, the more rounding is in its curvature."""
STILL_SHARE = 0.02
"""A measured speed below this share of the joint's velocity limit is sensor noise of a standing joint."""
MIN_LIMIT_STOP_S = 1e-6
"""Shortest stop of a joint that has next to no room before its position limit."""


@dataclass(frozen=True)
class TrajectoryPoint:
    """One point, as in ``trajectory_msgs/JointTrajectoryPoint``; an empty array means "not given"."""

    positions: np.ndarray
    time_from_start_ns: int
    velocities: np.ndarray = field(default_factory=lambda: _EMPTY)
    accelerations: np.ndarray = field(default_factory=lambda: _EMPTY)
    effort: np.ndarray = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True)
class JointTrajectory:
    """A trajectory, as in ``trajectory_msgs/JointTrajectory``. ``stamp_ns`` 0 means "start on reception"."""

    joint_names: tuple[str, ...]
    stamp_ns: int
    points: tuple[TrajectoryPoint, ...]

    @property
    def end_ns(self) -> int:
        """Absolute time of the last point, for a stamped trajectory."""
        return self.stamp_ns + self.points[-1].time_from_start_ns


@dataclass(frozen=True)
class Plan:
    """Commanded motion: a cubic Hermite spline through knots, still before the first and after the last one.

    Attributes:
        times_ns: int64 ``[N]``, strictly increasing.
        positions: float64 ``[N, joints]``, rad or m.
        velocities: float64 ``[N, joints]``; the last row is zero in every plan that is published.
    """

    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray

    @property
    def end_ns(self) -> int:
        """Time of the last knot."""
        return int(self.times_ns[-1])

    def sample(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Commanded position and velocity at a time, ``[joints]`` each."""
        if time_ns >= self.times_ns[-1]:
            return self.positions[-1].copy(), np.zeros_like(self.positions[-1])
        if time_ns <= self.times_ns[0]:
            still = np.zeros_like(self.positions[0]) if time_ns < self.times_ns[0] else self.velocities[0].copy()
            return self.positions[0].copy(), still
        k = int(np.searchsorted(self.times_ns, time_ns, side="right")) - 1
        return hermite(
            float(seconds(time_ns - self.times_ns[k])),
            float(seconds(self.times_ns[k + 1] - self.times_ns[k])),
            self.positions[k],
            self.velocities[k],
            self.positions[k + 1],
            self.velocities[k + 1],
        )

    def states(self, times_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Commanded positions, velocities and accelerations at many times, for plots and markers.

        Args:
            times_ns: int64 ``[M]``.

        Returns:
            Three float64 arrays ``[M, joints]``; before the first and after the last knot the arm stands.
        """
        positions = np.empty((len(times_ns), self.positions.shape[1]))
        velocities, accelerations = np.empty_like(positions), np.zeros_like(positions)
        for row, time_ns in enumerate(times_ns):
            positions[row], velocities[row] = self.sample(int(time_ns))
            k = int(np.searchsorted(self.times_ns, time_ns, side="right")) - 1
            if 0 <= k < len(self.times_ns) - 1:
                span_s = float(seconds(self.times_ns[k + 1] - self.times_ns[k]))
                u = float(seconds(time_ns - self.times_ns[k])) / span_s
                slope = (self.positions[k + 1] - self.positions[k]) / span_s
                v0, v1 = self.velocities[k], self.velocities[k + 1]
                first, last = 6.0 * slope - 4.0 * v0 - 2.0 * v1, -6.0 * slope + 2.0 * v0 + 4.0 * v1
                accelerations[row] = (first + u * (last - first)) / span_s
        return positions, velocities, accelerations

    def free_time(self, wanted_ns: int) -> int:
        """The first time from ``wanted_ns`` on that is a knot or at least ``MIN_SPACING_S`` after one.

        A plan is cut there: a cut just behind a knot would leave a segment that is mostly rounding.
        """
        spacing_ns = nanoseconds(MIN_SPACING_S)
        for knot_ns in self.times_ns[self.times_ns < wanted_ns + spacing_ns][-3:]:
            if knot_ns != wanted_ns and abs(wanted_ns - int(knot_ns)) < spacing_ns:
                wanted_ns = int(knot_ns) if knot_ns > wanted_ns else int(knot_ns) + spacing_ns
        return wanted_ns

    def committed(self, until_ns: int, since_ns: int) -> Plan:
        """The part up to ``until_ns`` with a knot exactly there, from the newest knot at or before ``since_ns``.

        A cubic that is cut is the same cubic, so the controller sees no change before ``until_ns``.
        """
        first = max(int(np.searchsorted(self.times_ns, since_ns, side="right")) - 1, 0)
        last = int(np.searchsorted(self.times_ns, until_ns, side="left"))
        position, velocity = self.sample(until_ns)
        return Plan(
            times_ns=np.append(self.times_ns[first:last], np.int64(until_ns)),
            positions=np.vstack([self.positions[first:last], position]),
            velocities=np.vstack([self.velocities[first:last], velocity]),
        )

    def then(self, times_ns: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> Plan:
        """This plan followed by more knots."""
        return Plan(
            times_ns=np.concatenate([self.times_ns, times_ns]).astype(np.int64),
            positions=np.vstack([self.positions, positions]),
            velocities=np.vstack([self.velocities, velocities]),
        )


def still_plan(time_ns: int, position: np.ndarray, past_ns: int) -> Plan:
    """An arm at rest from ``past_ns`` before ``time_ns`` on: where a motion begins when nothing was commanded yet."""
    position = np.asarray(position, dtype=np.float64)
    return Plan(
        times_ns=np.array([time_ns - past_ns, time_ns], dtype=np.int64),
        positions=np.vstack([position, position]),
        velocities=np.zeros((2, len(position))),
    )


def measured_plan(time_ns: int, position: np.ndarray, velocity: np.ndarray, past_ns: int, ahead_ns: int) -> Plan:
    """An arm seen at ``position`` that moves at ``velocity``, ``[joints]`` each, from ``past_ns`` before ``time_ns``.

    The last knot is ``ahead_ns`` after ``time_ns``: a plan stands at its end, and this one is to be continued before.
    """
    position, velocity = np.asarray(position, dtype=np.float64), np.asarray(velocity, dtype=np.float64)
    after_ns = np.array([-past_ns, 0, ahead_ns], dtype=np.int64)
    return Plan(
        times_ns=time_ns + after_ns,
        positions=position + velocity * seconds(after_ns)[:, None],
        velocities=np.vstack([velocity, velocity, velocity]),
    )


def brakable_velocity(
    position: np.ndarray, velocity: np.ndarray, limits: JointLimits, delay_s: float = 0.0
) -> np.ndarray:
    """``velocity`` reduced to what ``max_acceleration`` can stop before the position limit: v^2 / 2a + v delay <= d."""
    room = np.maximum(np.where(velocity > 0.0, limits.position_max - position, position - limits.position_min), 0.0)
    delayed = limits.max_acceleration * delay_s
    most = np.sqrt(delayed * delayed + 2.0 * limits.max_acceleration * room) - delayed
    return np.sign(velocity) * np.minimum(np.abs(velocity), most)


def starting_plan(
    time_ns: int, position: np.ndarray, velocity: np.ndarray | None, limits: JointLimits, past_ns: int, ahead_ns: int
) -> Plan:
    """Where a motion begins when nothing was commanded yet: at rest or, where the arm is seen to move, at its speed.

    Args:
        time_ns: When the arm was seen.
        position: ``[joints]``.
        velocity: ``[joints]``, None where it is not known.
        limits: Joint limits.
        past_ns: The plan begins so long before ``time_ns``.
        ahead_ns: What comes next begins before so long after ``time_ns``; until then an arm that moves goes on.
    """
    still = velocity is None or np.abs(velocity) < STILL_SHARE * limits.max_velocity
    if np.all(still):
        return still_plan(time_ns, position, past_ns)
    speed = np.where(still, 0.0, startable_velocity(position, velocity, limits, past_ns + ahead_ns))
    return measured_plan(time_ns, position, speed, past_ns, ahead_ns)


def startable_velocity(position: np.ndarray, velocity: np.ndarray, limits: JointLimits, delay_ns: int) -> np.ndarray:
    """A measured velocity, reduced to one with which a plan may begin: every limit can be kept ``delay_ns`` later."""
    slow = np.clip(velocity, -limits.max_velocity, limits.max_velocity)
    return brakable_velocity(position, slow, limits, float(seconds(delay_ns)))


def stop_knots(
    time_ns: int, position: np.ndarray, velocity: np.ndarray, limits: JointLimits
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots that bring moving joints to rest with constant deceleration.

    All joints stop together: the slowest one to stop sets ``t = |v| / max_acceleration``, and the end point lies
    ``v t / 2`` beyond ``position`` (setting the last velocity to zero in place would break the acceleration limit).
    A joint that would cross a position limit on that way stops earlier, at the limit. That stays within the
    acceleration limit where ``v^2 / 2a`` is left to the limit, as in every plan of the guard; where it is not, position
    goes before acceleration. A joint outside its limits that moves further out brakes with ``max_acceleration``.

    Args:
        time_ns: Time of the given state.
        position: ``[joints]``.
        velocity: ``[joints]``.
        limits: Joint limits.

    Returns:
        Times ``[M]``, positions ``[M, joints]``, velocities ``[M, joints]`` after ``time_ns``; the last velocity is 0.
    """
    common_s = max(float(np.max(np.abs(velocity) / limits.max_acceleration)), MIN_STOP_S)
    outward_limit = np.where(velocity > 0.0, limits.position_max, limits.position_min)
    room = np.abs(outward_limit - position)
    beyond = np.where(velocity > 0.0, position > outward_limit, position < outward_limit)
    speed = np.abs(velocity)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        own_s = np.where(speed > 0.0, 2.0 * room / speed, common_s)
    stop_s = np.clip(np.where(beyond, speed / limits.max_acceleration, own_s), MIN_LIMIT_STOP_S, common_s)
    # Whole nanoseconds, rounded up (a 1e-4 of one is rounding of the arithmetic): a shorter stop would brake harder.
    stop_ns = np.ceil(stop_s * NS_PER_S - 1e-4).astype(np.int64)
    stop_s = seconds(stop_ns)
    knots_ns = np.unique(np.append(stop_ns, np.ceil(common_s * NS_PER_S - 1e-4).astype(np.int64)))
    elapsed_s = np.minimum(seconds(knots_ns)[:, None], stop_s[None, :])
    positions = position + velocity * elapsed_s * (1.0 - elapsed_s / (2.0 * stop_s))
    velocities = velocity * (1.0 - elapsed_s / stop_s)
    velocities[-1] = 0.0
    return time_ns + knots_ns.astype(np.int64), positions, velocities


def hold_plan(plan: Plan, since_ns: int, start_ns: int, limits: JointLimits, period_ns: int, periods: int) -> Plan:
    """Decelerate from the commanded state at ``start_ns`` and stay there.

    Args:
        plan: What is being executed.
        since_ns: The hold begins with the newest knot of the plan at or before this.
        start_ns: Time from which the arm decelerates.
        limits: Joint limits; ``max_acceleration`` sets the deceleration.
        period_ns: Control period.
        periods: The plan lasts at least this many periods from one after ``since_ns`` on, so that it can be sent that
            often before its end.

    Returns:
        A plan whose last two knots are the same point at rest.
    """
    head = plan.committed(start_ns, since_ns)
    times, positions, velocities = stop_knots(start_ns, head.positions[-1], head.velocities[-1], limits)
    rest_ns = max(int(times[-1]) + period_ns, since_ns + (periods + 1) * period_ns)
    stopping = head.then(times, positions, velocities)
    return stopping.then(
        np.array([rest_ns], dtype=np.int64), stopping.positions[-1:], np.zeros_like(stopping.velocities[-1:])
    )


def window(plan: Plan, now_ns: int, joint_names: tuple[str, ...], past_ns: int) -> JointTrajectory:
    """The part of a plan that is sent at ``now_ns``.

    Args:
        plan: Commanded motion, ending at rest.
        now_ns: Time of sending.
        joint_names: Names of the plan's columns.
        past_ns: The window begins with the newest knot at or before ``now_ns - past_ns``. A message is inside its
            first segment when the controller reads it, even if the controller's clock is a little behind.

    Returns:
        A trajectory stamped with the time of its first point, ``time_from_start`` strictly increasing from 0.
    """
    first = max(int(np.searchsorted(plan.times_ns, now_ns - past_ns, side="right")) - 1, 0)
    stamp_ns = int(plan.times_ns[first])
    return JointTrajectory(joint_names, stamp_ns, _points(plan, first, stamp_ns))


def whole(plan: Plan, joint_names: tuple[str, ...]) -> JointTrajectory:
    """A plan from its first knot, which is the stamp."""
    stamp_ns = int(plan.times_ns[0])
    return JointTrajectory(joint_names, stamp_ns, _points(plan, 0, stamp_ns))


def unstamped(plan: Plan, now_ns: int, joint_names: tuple[str, ...], soonest_ns: int) -> JointTrajectory:
    """What is left of a plan with stamp 0: the controller starts it on reception, from its present state.

    Args:
        plan: The whole motion.
        now_ns: Which time of the plan the reception is.
        joint_names: In the plan's order.
        soonest_ns: Knots that come so soon are left out: one that is due at once would be a step.
    """
    first = int(np.searchsorted(plan.times_ns, now_ns + soonest_ns, side="right"))
    return JointTrajectory(joint_names, 0, _points(plan, first, now_ns))


def _points(plan: Plan, first: int, zero_ns: int) -> tuple[TrajectoryPoint, ...]:
    """The knots from ``first`` on, and the last one once more after ``REST_NS``."""
    times_ns = np.append(plan.times_ns[first:], plan.times_ns[-1] + REST_NS)
    positions = np.vstack([plan.positions[first:], plan.positions[-1:]])
    velocities = np.vstack([plan.velocities[first:], np.zeros_like(plan.velocities[-1:])])
    return tuple(
        TrajectoryPoint(positions=position, velocities=velocity, time_from_start_ns=int(time_ns) - zero_ns)
        for time_ns, position, velocity in zip(times_ns, positions, velocities)
    )


def pick_joints(trajectory: JointTrajectory, joints: Sequence[int]) -> JointTrajectory:
    """The columns ``joints`` of a trajectory, in that order; the trajectory itself if these are all as they stand."""
    index = np.asarray(joints, dtype=np.intp)
    if len(index) == len(trajectory.joint_names) and (index == np.arange(len(index))).all():
        return trajectory

    def pick(values: np.ndarray) -> np.ndarray:
        return values[index] if len(values) else values

    points = tuple(
        TrajectoryPoint(
            positions=pick(point.positions),
            time_from_start_ns=point.time_from_start_ns,
            velocities=pick(point.velocities),
            accelerations=pick(point.accelerations),
            effort=pick(point.effort),
        )
        for point in trajectory.points
    )
    return JointTrajectory(tuple(trajectory.joint_names[k] for k in index), trajectory.stamp_ns, points)

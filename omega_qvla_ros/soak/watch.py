"""An independent judge of commands: it knows the contract's limits and the controller's rules, not the guard's code.

Two views. Every published trajectory is looked at as it is (``CommandWatch.trajectory``): a cubic through its points,
whose speed and acceleration are known in closed form. And what a controller makes of them one after the other is
followed in time (``CommandWatch.execute``), which shows jumps between messages.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from omega_qvla_ros import jtc
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.splines import NS_PER_S, nanoseconds
from omega_qvla_ros.trajectory import JointTrajectory

TOLERANCE = 1e-3
"""A thousandth above a limit is rounding: stamps are whole nanoseconds, and short segments turn that into speed."""
POSITION_SAMPLES = 17
"""Per segment; a cubic of 50 ms does not leave a limit between two of them by more than 1e-6 of the segment."""
LOOK_BACK_NS, LOOK_BACK_STEP_NS = 500_000_000, 5_000_000
"""How far back two messages are compared to find the moment at which they part."""
MIN_STEP_NS = 2_000_000
"""Acceleration over a shorter step of the clock would be rounding."""


@dataclass
class Peaks:
    """Largest share of the limit that was seen, per quantity; 1.0 is the limit itself."""

    position: float = 0.0
    velocity: float = 0.0
    acceleration: float = 0.0
    jump: float = 0.0
    executed_velocity: float = 0.0
    executed_acceleration: float = 0.0


@dataclass(frozen=True)
class _Spline:
    """A message's points on the robot's time line: ``[N]`` times in ns, ``[N, joints]`` positions and velocities."""

    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray

    def state(self, time_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity at a time; the arm stands before the first and after the last point."""
        if not self.times_ns[0] <= time_ns < self.times_ns[-1]:
            end = self.positions[0 if time_ns < self.times_ns[0] else -1]
            return end, np.zeros_like(end)
        k = int(np.searchsorted(self.times_ns, time_ns, side="right")) - 1
        h = (self.times_ns[k + 1] - self.times_ns[k]) / NS_PER_S
        u = (time_ns - self.times_ns[k]) / NS_PER_S / h
        slope = (self.positions[k + 1] - self.positions[k]) / h
        v0, v1 = self.velocities[k], self.velocities[k + 1]
        velocity = 6 * u * (1 - u) * slope + (1 - u) * (1 - 3 * u) * v0 + u * (3 * u - 2) * v1
        p0, p1 = self.positions[k], self.positions[k + 1]
        position = p0 + u * u * (3 - 2 * u) * (p1 - p0) + h * u * (1 - u) * ((1 - u) * v0 - u * v1)
        return position, velocity


def _apart(one: _Spline, other: _Spline, time_ns: int) -> np.ndarray:
    """Distance of two motions at a time, ``[joints]``."""
    return np.abs(one.state(time_ns)[0] - other.state(time_ns)[0])


class CommandWatch:
    """Judges the commands of one robot.

    Args:
        contract: Names, limits, period.
    """

    def __init__(self, contract: RobotContract) -> None:
        self._names = contract.joint_names
        self._limits = contract.joint_limits()
        self._period_ns = nanoseconds(contract.period_s)
        self._executor = jtc.TrajectoryExecutor(self._names)
        self._history: deque[tuple[int, np.ndarray, np.ndarray]] = deque()
        self._present: _Spline | None = None
        self._parted_s = 0.0
        self._late: deque[tuple[int, np.ndarray]] = deque()
        """Time at which a message was heard, and by how far the motions had come apart since they parted."""
        self.largest_delay_s = 0.0
        """Longest time by which a message took effect after the moment from which it asks for another motion."""
        self.trajectories = 0
        self.refused: Counter[str] = Counter()
        self.unguarded: Counter[str] = Counter()
        self.examples: list[str] = []
        self.peaks = Peaks()
        self.largest_jump = np.zeros(len(self._names))
        """Without what a late message explains, which is ``largest_late_step``."""
        self.largest_late_step = np.zeros(len(self._names))
        self.largest_acceleration = np.zeros(len(self._names))

    def trajectory(self, trajectory: JointTrajectory, now_ns: int, executed: bool = True) -> None:
        """Judge a message, and let the controller have it unless it is deaf just now."""
        self.trajectories += 1
        judge = self._executor.accept if executed else lambda t, at_ns: jtc.validate(t, at_ns, self._names)
        reason = judge(trajectory, now_ns)
        if reason is not None:
            self.refused[reason] += 1
            return
        order = [trajectory.joint_names.index(name) for name in self._names]
        points = trajectory.points
        times_s = np.array([point.time_from_start_ns for point in points]) / NS_PER_S
        positions = np.array([point.positions for point in points])[:, order]
        if any(len(point.velocities) == 0 for point in points):
            self._note("velocities", "a point without velocities: the arm would jerk from segment to segment", now_ns)
            return
        velocities = np.array([point.velocities for point in points])[:, order]
        if not (np.isfinite(positions).all() and np.isfinite(velocities).all()):
            self._note("not_finite", "a value that is not finite", now_ns)
            return
        self._judge_positions(times_s, positions, velocities, now_ns)
        self._judge_speeds(times_s, positions, velocities, now_ns)
        if executed:
            start_ns = trajectory.stamp_ns or now_ns
            self._replace(_Spline(start_ns + np.round(times_s * NS_PER_S), positions, velocities), now_ns)

    def moved_elsewhere(self, positions: np.ndarray) -> None:
        """The robot was put somewhere by hand (a reset): ``[joints]``, no motion of ours."""
        self._executor.hold(positions)
        self._history.clear()
        self._late.clear()
        self._present = None

    def execute(self, now_ns: int, measured: np.ndarray, measured_velocity: np.ndarray) -> None:
        """Follow the controller to ``now_ns``. Call it at every step of the robot's clock.

        Args:
            now_ns: Robot time; a step back begins anew.
            measured: ``[joints]`` measured positions.
            measured_velocity: ``[joints]``.
        """
        if self._history and now_ns <= self._history[-1][0]:
            self._history.clear()
        while self._history and now_ns - self._history[0][0] > self._period_ns:
            self._history.popleft()
        position, velocity = self._executor.sample(now_ns, measured, measured_velocity)
        if self._history and now_ns - self._history[-1][0] >= MIN_STEP_NS:
            self._judge_step(now_ns, position, velocity)
        self._history.append((now_ns, position, velocity))

    # Inside.

    def _replace(self, new: _Spline, now_ns: int) -> None:
        """Find out for how long the new message has been asking for another speed than the present one.

        Two motions that part at a time are apart by at most twice the acceleration limit times the time since then: one
        may speed up while the other brakes. That much is the transport's; more is a step. Likewise for the position: by
        how far they have come apart since they parted is the transport's, by how far they were apart then is a jump.
        """
        present, self._present = self._present, new
        tolerance = TOLERANCE * self._limits.max_velocity
        for back_ns in range(0, LOOK_BACK_NS, LOOK_BACK_STEP_NS):
            before = np.zeros_like(tolerance) if present is None else present.state(now_ns - back_ns)[1]
            if (np.abs(before - new.state(now_ns - back_ns)[1]) <= tolerance).all():
                if present is not None:
                    now, then = (_apart(present, new, time_ns) for time_ns in (now_ns, now_ns - back_ns))
                    self._late.append((now_ns, np.maximum(now - then, 0.0)))
                    self.largest_late_step = np.maximum(self.largest_late_step, self._late[-1][1])
                self._parted_s = max(self._parted_s, back_ns / NS_PER_S)
                self.largest_delay_s = max(self.largest_delay_s, self._parted_s)
                return

    def _judge_positions(self, times_s: np.ndarray, positions: np.ndarray, velocities: np.ndarray, now_ns: int) -> None:
        """Inside the limits, or no further out than the first point is."""
        low = np.minimum(self._limits.position_min, positions[0])
        high = np.maximum(self._limits.position_max, positions[0])
        samples = [positions]
        for k in range(len(times_s) - 1):
            h = times_s[k + 1] - times_s[k]
            u = np.linspace(0.0, 1.0, POSITION_SAMPLES)[:, None]
            samples.append(
                positions[k] * (1 - u) ** 2 * (1 + 2 * u)
                + positions[k + 1] * u**2 * (3 - 2 * u)
                + h * velocities[k] * u * (1 - u) ** 2
                - h * velocities[k + 1] * u**2 * (1 - u)
            )
        everything = np.vstack(samples)
        half = (self._limits.position_max - self._limits.position_min) / 2
        middle = (self._limits.position_max + self._limits.position_min) / 2
        self.peaks.position = max(self.peaks.position, float((np.abs(everything - middle) / half).max()))
        beyond = np.maximum(low - everything, everything - high).max(axis=0)
        for joint in np.flatnonzero(beyond > TOLERANCE * half):
            self._note("position", f"{self._names[joint]} is {beyond[joint]:.5f} outside its limits", now_ns)

    def _judge_speeds(self, times_s: np.ndarray, positions: np.ndarray, velocities: np.ndarray, now_ns: int) -> None:
        """The cubic of a segment: acceleration is linear in time, speed has one extremum where that is zero."""
        h = np.diff(times_s)[:, None]
        if not len(h):
            return
        slope = np.diff(positions, axis=0) / h
        v0, v1 = velocities[:-1], velocities[1:]
        a0 = (6 * slope - 4 * v0 - 2 * v1) / h
        a1 = (-6 * slope + 2 * v0 + 4 * v1) / h
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.where(a0 != a1, a0 / (a0 - a1), -1.0)
        inside = (u > 0.0) & (u < 1.0)
        u = np.where(inside, u, 0.0)
        extremum = v0 + h * (a0 * u + 0.5 * (a1 - a0) * u * u)
        speed = np.maximum(np.maximum(np.abs(v0), np.abs(v1)), np.abs(extremum)).max(axis=0)
        acceleration = np.maximum(np.abs(a0), np.abs(a1)).max(axis=0)
        self.largest_acceleration = np.maximum(self.largest_acceleration, acceleration)
        self._judge_share("velocity", speed, self._limits.max_velocity, now_ns)
        self._judge_share("acceleration", acceleration, self._limits.max_acceleration, now_ns)

    def _judge_step(self, now_ns: int, position: np.ndarray, velocity: np.ndarray) -> None:
        before_ns, _, before_velocity = self._history[-1]
        first_ns, first, _ = self._history[0]
        while self._late and self._late[0][0] < first_ns:
            self._late.popleft()
        jump = np.maximum(np.abs(position - first) - sum(step for _, step in self._late), 0.0)
        self.largest_jump = np.maximum(self.largest_jump, jump)
        periods = max(1.0, (now_ns - first_ns) / self._period_ns)
        self._judge_share("jump", jump, self._limits.max_jump * periods, now_ns)
        step_s = (now_ns - before_ns) / NS_PER_S
        self._judge_share("executed_velocity", np.abs(velocity), self._limits.max_velocity, now_ns)
        allowed = self._limits.max_acceleration * (1.0 + 2.0 * self._parted_s / step_s)
        self._judge_share("executed_acceleration", np.abs(velocity - before_velocity) / step_s, allowed, now_ns)
        self._parted_s = 0.0

    def _judge_share(self, kind: str, values: np.ndarray, limits: np.ndarray, now_ns: int) -> None:
        """``kind`` is the name of a peak."""
        share = values / limits
        for joint in np.flatnonzero(share > 1.0 + TOLERANCE):
            self._note(kind, f"{self._names[joint]}: {values[joint]:.4f}, limit {limits[joint]:.4f}", now_ns)
        setattr(self.peaks, kind, max(getattr(self.peaks, kind), float(share.max())))

    def _note(self, kind: str, text: str, now_ns: int) -> None:
        self.unguarded[kind] += 1
        if self.unguarded[kind] <= 5:
            self.examples.append(f"{now_ns / NS_PER_S:.3f} s, {kind}: {text}")

"""An independent judge of commands: it knows the contract's limits and the controller's rules, not the guard's code.

Every published trajectory is looked at as it is: a cubic through its points, whose speed and acceleration are known in
closed form. What the controller makes of them one after the other is measured there (``reference_peaks``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from omega_qvla_ros import jtc
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.splines import NS_PER_S
from omega_qvla_ros.trajectory import JointTrajectory

TOLERANCE = 1e-3
"""A thousandth above a limit is rounding: stamps are whole nanoseconds, and short segments turn that into speed."""
POSITION_SAMPLES = 17
"""Per segment; a cubic of 50 ms does not leave a limit between two of them by more than 1e-6 of the segment."""


@dataclass
class Peaks:
    """Largest share of the limit that was seen, per quantity; 1.0 is the limit itself."""

    position: float = 0.0
    velocity: float = 0.0
    acceleration: float = 0.0


class CommandWatch:
    """Judges the commands of one robot.

    Args:
        contract: Names, limits, period.
    """

    def __init__(self, contract: RobotContract) -> None:
        self._names = contract.joint_names
        self._limits = contract.joint_limits()
        self.trajectories = 0
        self.refused: Counter[str] = Counter()
        self.unguarded: Counter[str] = Counter()
        self.examples: list[str] = []
        self.peaks = Peaks()
        self.largest_acceleration = np.zeros(len(self._names))

    def trajectory(self, trajectory: JointTrajectory, now_ns: int) -> None:
        """Judge a message that is heard at ``now_ns``."""
        self.trajectories += 1
        reason = jtc.validate(trajectory, now_ns, self._names)
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

    # Inside.

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

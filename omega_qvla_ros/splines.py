"""Cubic Hermite arithmetic on knots: the curve that a joint_trajectory_controller draws through points with velocities.

Times are integer nanoseconds (ROS time), positions and velocities float64 ``[knots, joints]``.
"""

from __future__ import annotations

import numpy as np

NS_PER_S = 1_000_000_000


def seconds(duration_ns: int | np.ndarray) -> float | np.ndarray:
    """Nanoseconds to seconds."""
    return duration_ns / NS_PER_S


def nanoseconds(duration_s: float) -> int:
    """Seconds to whole nanoseconds."""
    return round(duration_s * NS_PER_S)


def hermite(
    elapsed_s: float, duration_s: float, p0: np.ndarray, v0: np.ndarray, p1: np.ndarray, v1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity on the cubic between two states.

    Args:
        elapsed_s: Time since the first state, 0 to ``duration_s``.
        duration_s: Time between the states, greater than 0.
        p0, v0, p1, v1: ``[joints]`` positions and velocities of both states.

    Returns:
        Position and velocity, ``[joints]`` each.
    """
    u = elapsed_s / duration_s
    slope = (p1 - p0) / duration_s
    a = v0 + v1 - 2.0 * slope
    b = 3.0 * slope - 2.0 * v0 - v1
    position = p0 + duration_s * u * (v0 + u * (b + u * a))
    velocity = v0 + u * (2.0 * b + u * 3.0 * a)
    return position, velocity


def knot_velocities(times_ns: np.ndarray, positions: np.ndarray, first_velocity: np.ndarray) -> np.ndarray:
    """Velocities at knots: the smaller of backward and forward difference, zero where the direction changes.

    The rule of MoveIt Servo's sliding window: the cubic between two knots then stays between them. The first knot
    keeps the velocity that the arm already has; the last one takes its backward difference.

    Args:
        times_ns: int64 ``[N]``, strictly increasing, N >= 2.
        positions: ``[N, joints]``.
        first_velocity: ``[joints]``.

    Returns:
        ``[N, joints]``.
    """
    slopes = np.diff(positions, axis=0) / seconds(np.diff(times_ns))[:, None]
    velocities = np.empty_like(positions)
    velocities[0] = first_velocity
    velocities[-1] = slopes[-1]
    before, after = slopes[:-1], slopes[1:]
    smaller = np.where(np.abs(before) < np.abs(after), before, after)
    velocities[1:-1] = np.where(before * after > 0.0, smaller, 0.0)
    return velocities


def segment_peak_speeds(times_ns: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """Largest speed on each cubic segment, ends included: ``[N - 1, joints]``.

    The velocity of a cubic is a parabola in time, so the peak is at an end or at the parabola's vertex.
    """
    duration_s = seconds(np.diff(times_ns))[:, None]
    slope = np.diff(positions, axis=0) / duration_s
    v0, v1 = velocities[:-1], velocities[1:]
    a = v0 + v1 - 2.0 * slope
    b = 3.0 * slope - 2.0 * v0 - v1
    peak = np.maximum(np.abs(v0), np.abs(v1))
    with np.errstate(divide="ignore", invalid="ignore"):
        u = -b / (3.0 * a)
        vertex = np.abs(v0 - b * b / (3.0 * a))
    inside = np.isfinite(u) & (u > 0.0) & (u < 1.0)
    return np.where(inside, np.maximum(peak, vertex), peak)


def segment_ranges(
    times_ns: np.ndarray, positions: np.ndarray, velocities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest position on each cubic segment, ends included: two arrays ``[N - 1, joints]``.

    Extrema inside a segment are where the velocity ``v0 + 2 b u + 3 a u^2`` is zero.
    """
    duration_s = seconds(np.diff(times_ns))[:, None]
    p0, p1 = positions[:-1], positions[1:]
    v0, v1 = velocities[:-1], velocities[1:]
    slope = (p1 - p0) / duration_s
    a = v0 + v1 - 2.0 * slope
    b = 3.0 * slope - 2.0 * v0 - v1
    low, high = np.minimum(p0, p1), np.maximum(p0, p1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The numerically stable pair of roots; where a is 0 the first one is the root of the straight line.
        root = np.sqrt(b * b - 3.0 * a * v0)
        q = -(b + np.where(b >= 0.0, root, -root))
        candidates = (v0 / q, q / (3.0 * a))
    for u in candidates:
        inside = np.isfinite(u) & (u > 0.0) & (u < 1.0)
        u = np.where(inside, u, 0.0)
        extreme = p0 + duration_s * u * (v0 + u * (b + u * a))
        low, high = np.minimum(low, extreme), np.maximum(high, extreme)
    return low, high

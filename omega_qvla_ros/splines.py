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
    """Velocities at knots: the slope of the parabola through three knots, zero where the direction changes.

    At most three times the smaller of the two differences (Fritsch and Carlson, "Monotone piecewise cubic
    interpolation", 1980): the cubic between two knots then stays between them. On a motion of constant acceleration
    the cubic is that motion; the smaller difference itself, as in MoveIt Servo's window, would accelerate four times as
    much at the beginning of each segment and brake twice as much at its end. The first knot keeps the velocity that the
    arm already has; the last one takes its backward difference.

    Args:
        times_ns: int64 ``[N]``, strictly increasing, N >= 2.
        positions: ``[N, joints]``.
        first_velocity: ``[joints]``.

    Returns:
        ``[N, joints]``.
    """
    spans = seconds(np.diff(times_ns))[:, None]
    slopes = np.diff(positions, axis=0) / spans
    velocities = np.empty_like(positions)
    velocities[0] = first_velocity
    velocities[-1] = slopes[-1]
    before, after = slopes[:-1], slopes[1:]
    parabola = (before * spans[1:] + after * spans[:-1]) / (spans[1:] + spans[:-1])
    most = 3.0 * np.minimum(np.abs(before), np.abs(after))
    velocities[1:-1] = np.where(before * after > 0.0, np.clip(parabola, -most, most), 0.0)
    return velocities


def segment_peak_accelerations(times_ns: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """Largest acceleration on each cubic segment, without sign: ``[N - 1, joints]``.

    The acceleration of a cubic is linear in time, so its extremes are at the ends.
    """
    duration_s = seconds(np.diff(times_ns))[:, None]
    slope = np.diff(positions, axis=0) / duration_s
    v0, v1 = velocities[:-1], velocities[1:]
    first = (6.0 * slope - 4.0 * v0 - 2.0 * v1) / duration_s
    last = (-6.0 * slope + 2.0 * v0 + 4.0 * v1) / duration_s
    return np.maximum(np.abs(first), np.abs(last))


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

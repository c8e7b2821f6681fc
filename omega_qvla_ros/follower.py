"""Follow targets as closely as the limits allow: which state a joint may be in at the next knot, and which is best.

Between two knots a controller draws a cubic, so its acceleration is linear in time and its extremes are at the knots.
A knot is therefore within the limits for good if the cubic that leads to it is, and if the arm can still brake from it
before its position limit. ``follow`` goes from knot to knot and never leaves that set, whatever the targets are:

* where the cubic to the target itself fits, it is taken as it is;
* elsewhere the acceleration is constant over the segment and approaches the target without overshooting it.

All arrays are float64 ``[joints]`` unless stated; units are rad or m and seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omega_qvla_ros.contract import JointLimits
from omega_qvla_ros.measure import excess
from omega_qvla_ros.splines import nanoseconds, seconds
from omega_qvla_ros.trajectory import MIN_SPACING_S, Plan

TOLERANCE = 1e-9
"""Relative slack of every comparison with a limit: rounding, not motion."""
APPROACH_SEGMENTS = 3.0
"""A joint that is off its target comes back over about so many segments. 1 would be as fast as braking in whole
segments allows; but a policy that plans from where it sees the arm then meets it at a speed it does not know of, and
the two swing (measured with a policy of constant speed and one period of latency: 3 swings out like exact following).
"""


@dataclass(frozen=True)
class Walls:
    """Positions that are not to be passed: ``[joints]``, or anything that broadcasts with it."""

    low: np.ndarray
    high: np.ndarray


def follow(reference: Plan, limits: JointLimits, hard: JointLimits) -> Plan:
    """The motion nearest to a reference that obeys the limits at every instant.

    Args:
        reference: First knot: the state in which the arm is. The other knots: targets with the velocities wanted there.
        limits: Limits of this motion.
        hard: Limits that hold even where ``limits`` were lowered so suddenly that they cannot be kept: a joint that
            ``limits`` would let run over ``hard``'s position limit brakes with ``hard``'s deceleration. The same object
            as ``limits`` in normal operation. The first state must be one from which ``hard`` can stop.

    Returns:
        At least the reference's knots; the first state is the same, the last one can be braked within ``limits``.
    """
    reference = _with_stops(reference, hard)
    spans = seconds(np.diff(reference.times_ns))
    following = np.append(spans[1:], 0.0)
    walls, accelerations = _boxes(_still_asked_for(reference, limits), limits, hard)
    direct_ok = _fits(reference, limits)
    position, velocity = reference.positions[0].copy(), reference.velocities[0].copy()
    positions, velocities = [position], [velocity]
    on_reference = np.ones(len(position), dtype=bool)
    for k, (span, next_span) in enumerate(zip(spans, following)):
        target, wanted = reference.positions[k + 1], reference.velocities[k + 1]
        boxes = Walls(walls.low[k + 1], walls.high[k + 1]), accelerations
        direct = np.where(on_reference, direct_ok[k], False)
        if not on_reference.all():
            direct |= ~on_reference & _segment_fits(
                reference.times_ns[k : k + 2], position, velocity, target, wanted, limits
            )
        direct &= _stops(target, wanted, np.array([[0.0], [next_span], [next_span]]), *boxes).all(axis=0)
        chosen = _steer(position, velocity, target, wanted, span, next_span, boxes, limits, hard)
        position, velocity = (
            np.where(direct, target, position + (velocity + chosen) * (span / 2.0)),
            np.where(direct, wanted, chosen),
        )
        on_reference = direct
        positions.append(position)
        velocities.append(velocity)
    return Plan(reference.times_ns, np.vstack(positions), np.vstack(velocities))


def _boxes(ahead: Walls, limits: JointLimits, hard: JointLimits) -> tuple[Walls, np.ndarray]:
    """Walls ``[knots, 3, joints]``, accelerations ``[3, joints]``: what is still asked for, ``limits``, ``hard``."""
    shape = ahead.low.shape
    low = [ahead.low, *(np.broadcast_to(box.position_min, shape) for box in (limits, hard))]
    high = [ahead.high, *(np.broadcast_to(box.position_max, shape) for box in (limits, hard))]
    accelerations = np.stack([limits.max_acceleration, limits.max_acceleration, hard.max_acceleration])
    return Walls(np.stack(low, axis=1), np.stack(high, axis=1)), accelerations


def _fits(plan: Plan, limits: JointLimits) -> np.ndarray:
    """bool ``[segments, joints]``: the cubic from knot to knot is within the limits, its ends' stopping apart."""
    over = excess(plan, limits)
    return (
        (over["velocity"] <= 1.0 + TOLERANCE)
        & (over["acceleration"] <= 1.0 + TOLERANCE)
        & (over["position"] <= 1.0 + TOLERANCE)
    )


def _segment_fits(
    times_ns: np.ndarray, p0: np.ndarray, v0: np.ndarray, p1: np.ndarray, v1: np.ndarray, limits: JointLimits
) -> np.ndarray:
    return _fits(Plan(times_ns, np.vstack([p0, p1]), np.vstack([v0, v1])), limits)[0]


def _steer(
    position: np.ndarray,
    velocity: np.ndarray,
    target: np.ndarray,
    wanted: np.ndarray,
    span: float,
    next_span: float,
    boxes: tuple[Walls, np.ndarray],
    limits: JointLimits,
    hard: JointLimits,
) -> np.ndarray:
    """Velocity at the end of a segment of constant acceleration that approaches ``target`` moving at ``wanted``.

    Relative to the target the joint is always slow enough to come to rest on it: ``u^2 / 2a + u n T = error`` with the
    relative velocity ``u`` after the segment, the error that is left if ``u`` is 0, and n = ``APPROACH_SEGMENTS``. With
    n = 1 this is the discrete form of the time-optimal switching curve.
    """
    limit = limits.max_acceleration
    error = target - position - (velocity + wanted) * (span / 2.0)
    step, soft_step = limit * span, limit * span * APPROACH_SEGMENTS
    chosen = wanted + np.sign(error) * (np.sqrt(soft_step * soft_step + 2.0 * limit * np.abs(error)) - soft_step)
    top = limits.max_velocity
    low, high = np.maximum(velocity - step, -top), np.minimum(velocity + step, top)
    wall_low, wall_high = _between(position, velocity, span, next_span, *boxes)
    low, high = np.maximum(low, wall_low[:2].max(axis=0)), np.minimum(high, wall_high[:2].min(axis=0))
    chosen = np.clip(chosen, np.minimum(low, high), np.maximum(low, high))
    chosen = np.clip(chosen, velocity - step, velocity + step)
    # Last, because it may ask for more than `step` where limits were lowered: then the contract's deceleration.
    chosen = np.clip(chosen, np.minimum(wall_low[2], wall_high[2]), np.maximum(wall_low[2], wall_high[2]))
    most = hard.max_acceleration * span
    return np.clip(chosen, velocity - most, velocity + most)


def _between(
    position: np.ndarray, velocity: np.ndarray, span: float, next_span: float, walls: Walls, limit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest velocity at the end of a segment from which the walls can still be kept, one row per box."""
    room = np.concatenate([walls.high - position, position - walls.low])
    count = len(walls.high)
    towards = np.concatenate([np.broadcast_to(velocity, walls.high.shape), np.broadcast_to(-velocity, walls.low.shape)])
    highest = _highest(room, towards, span, next_span, np.concatenate([limit, limit]))
    return -highest[count:], highest[:count]


def _highest(room: np.ndarray, velocity: np.ndarray, span: float, next_span: float, limit: np.ndarray) -> np.ndarray:
    """Highest velocity ``v`` after ``span`` of constant acceleration so that a wall ``room`` ahead can be kept.

    After the segment, ``v^2 / 2a + v T' / 2`` must be left (``T'`` is ``next_span``): braking in whole segments needs
    at most that, so the condition renews itself. A joint that is too near to stop by the end of the segment turns round
    in it: its peak ``v0^2 T / 2 (v0 - v)`` may be at the wall. Beyond the wall it may only stand or come back.
    """
    left = room - velocity * (span / 2.0)
    half = limit * (span + next_span) / 2.0
    stop = np.sqrt(half * half + 2.0 * limit * np.maximum(left, 0.0)) - half
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        turn = velocity - velocity * velocity * span / (2.0 * room)
    turn = np.where((room > 0.0) & (velocity > 0.0), turn, 0.0)
    return np.where(left >= 0.0, stop, np.maximum(turn, velocity - limit * span))


def _stops(
    position: np.ndarray, velocity: np.ndarray, next_span: np.ndarray, walls: Walls, limit: np.ndarray
) -> np.ndarray:
    """bool, one row per box: from this state the walls can be kept (see ``_highest``)."""
    room = np.where(velocity > 0.0, walls.high - position, position - walls.low)
    speed = np.abs(velocity)
    need = speed * speed / (2.0 * limit) + speed * (next_span / 2.0)
    return need <= room + TOLERANCE * (walls.high - walls.low)


def _still_asked_for(reference: Plan, limits: JointLimits) -> Walls:
    """``[knots, joints]``: the range of what is still to be reached, the way to rest after the last knot included.

    Used as walls, so that a joint which cannot follow a sudden stop brakes in time instead of overshooting it.
    """
    last_v = reference.velocities[-1]
    rest = reference.positions[-1] + last_v * np.abs(last_v) / (2.0 * limits.max_acceleration)
    high = np.maximum.accumulate(np.vstack([reference.positions, rest])[::-1], axis=0)[::-1]
    low = np.minimum.accumulate(np.vstack([reference.positions, rest])[::-1], axis=0)[::-1]
    return Walls(low[:-1], high[:-1])


def _with_stops(reference: Plan, hard: JointLimits) -> Plan:
    """The reference with knots at which joints that are too near to their limit can come to rest on it.

    Constant deceleration takes ``2 distance / speed``. Only the first segment can need this: every state that
    ``follow`` chooses has room for whole segments.
    """
    p0, v0 = reference.positions[0], reference.velocities[0]
    span = float(seconds(reference.times_ns[1] - reference.times_ns[0]))
    room = np.where(v0 > 0.0, hard.position_max - p0, p0 - hard.position_min)
    near = (np.abs(v0) > 0.0) & (room >= 0.0) & (2.0 * room < np.abs(v0) * span)
    extra: list[int] = []
    for stop_s in sorted(2.0 * room[near] / np.abs(v0[near])):
        at_s = max(float(stop_s), MIN_SPACING_S)
        free = at_s <= span - MIN_SPACING_S
        if free and (not extra or at_s - seconds(extra[-1]) >= MIN_SPACING_S):
            extra.append(int(at_s * 1e9))
    if not extra:
        return reference
    times_ns = reference.times_ns[0] + np.array(extra, dtype=np.int64)
    states = [reference.sample(int(t)) for t in times_ns]
    return Plan(
        np.concatenate([reference.times_ns[:1], times_ns, reference.times_ns[1:]]),
        np.vstack([reference.positions[:1], [p for p, _ in states], reference.positions[1:]]),
        np.vstack([reference.velocities[:1], [v for _, v in states], reference.velocities[1:]]),
    )


def stretched(reference: Plan, factor: float) -> Plan:
    """The reference with everything after its second knot slowed down uniformly by ``factor`` (1: unchanged)."""
    after_s = seconds(reference.times_ns[1:] - reference.times_ns[1])
    times_ns = reference.times_ns.copy()
    times_ns[1:] = reference.times_ns[1] + np.array([nanoseconds(float(s) * factor) for s in after_s], dtype=np.int64)
    velocities = reference.velocities.copy()
    velocities[1:] /= factor
    return Plan(times_ns, reference.positions, velocities)

"""The last measurement: a whole plan against the contract's limits, and against the motion that it goes on from.

How a plan was made does not matter here. Whatever is sent is a part of a plan that was measured: the head that the
controller executes until the switch, what comes after it, the join between both, and the way to rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla_ros.contract import JointLimits
from omega_qvla_ros.splines import seconds, segment_peak_accelerations, segment_peak_speeds, segment_ranges
from omega_qvla_ros.trajectory import Plan

SLACK = 1e-6
"""Relative to the limit: what rounding in a segment of a millisecond can amount to."""
START_SLACK = 1e-9
"""Of the range and of the velocity limit: how far a plan may be from the motion that it goes on from."""
_ROUNDINGS = 100.0
"""So many roundings of a position are in a curvature; that matters in segments far shorter than a millisecond."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a plan: which joint (its number), and a text with value and limit."""

    joint: int
    text: str


def excess(plan: Plan, limits: JointLimits) -> dict[str, np.ndarray]:
    """How far the cubic through a plan's knots is over each limit, as ratios ``[segments, joints]``; 1 is at the limit.

    Returns:
        ``velocity`` and ``acceleration``: largest value on the segment over its limit; ``position``: 1 plus the
        distance outside over the range.
    """
    low, high = segment_ranges(plan.times_ns, plan.positions, plan.velocities)
    outside = np.maximum(limits.position_min - low, high - limits.position_max)
    return {
        "velocity": segment_peak_speeds(plan.times_ns, plan.positions, plan.velocities) / limits.max_velocity,
        "acceleration": segment_peak_accelerations(plan.times_ns, plan.positions, plan.velocities)
        / limits.max_acceleration,
        "position": 1.0 + outside / (limits.position_max - limits.position_min),
    }


def beyond(plan: Plan, limits: JointLimits, names: Sequence[str]) -> Finding | None:
    """What of a plan is not finite, not in order, or over a limit at any instant.

    A joint that starts outside its position limits, or faster than its velocity limit, may only get better. A jump is
    a velocity here, because the curve goes through all knots.

    Args:
        plan: From its first knot to its last one.
        limits: The contract's.
        names: Of the joints.

    Returns:
        The first thing that is wrong, None if nothing is.
    """
    finite = np.isfinite(plan.positions) & np.isfinite(plan.velocities)
    if not finite.all():
        joint = int(np.argwhere(~finite)[0][1])
        return Finding(joint, f"the plan of joint {names[joint]!r} is not finite")
    if not (np.diff(plan.times_ns) > 0).all():
        return Finding(0, "the times of the plan do not ascend")
    over = excess(plan, limits)
    over["velocity"] = over["velocity"] / np.maximum(1.0, _best_so_far(np.abs(plan.velocities) / limits.max_velocity))
    knots_outside = np.maximum(limits.position_min - plan.positions, plan.positions - limits.position_max)
    span = limits.position_max - limits.position_min
    over["position"] = over["position"] - _best_so_far(np.maximum(knots_outside, 0.0)) / span
    over["acceleration"] = _without_rounding(plan, over["acceleration"], limits)
    for kind, ratio in over.items():
        if not (ratio <= 1.0 + SLACK).all():
            worst = np.unravel_index(int(np.argmax(np.nan_to_num(ratio, nan=np.inf))), ratio.shape)
            joint = int(worst[1])
            return Finding(joint, f"the plan has {ratio[worst]:.6f} times the {kind} limit of joint {names[joint]!r}")
    return None


def parts_early(
    known: Plan, plan: Plan, now_ns: int, switch_ns: int, limits: JointLimits, names: Sequence[str]
) -> Finding | None:
    """Whether a plan is another motion than the known one before it may be.

    Args:
        known: The motion that it goes on from.
        plan: The new one.
        now_ns: What lies before is not executed any more.
        switch_ns: The plan may differ after this time; until then position and velocity are the known ones.
        limits: Joint limits, for the slack.
        names: Of the joints.

    Returns:
        The joint that makes a step, None if there is none.
    """
    knots_ns = np.concatenate([known.times_ns, plan.times_ns, [now_ns, switch_ns]])
    slack = START_SLACK * np.stack([limits.position_max - limits.position_min, limits.max_velocity])
    # Cubics with the same state at every knot of both are the same in between.
    for time_ns in np.unique(knots_ns[(knots_ns >= now_ns) & (knots_ns <= switch_ns)]):
        step = np.abs(np.stack(plan.sample(int(time_ns))) - np.stack(known.sample(int(time_ns))))
        if not (step <= slack).all():
            kind, joint = (int(k) for k in np.argwhere(~(step <= slack))[0])
            after_s = seconds(int(time_ns) - now_ns)
            return Finding(
                joint,
                f"the {('position', 'velocity')[kind]} of joint {names[joint]!r} makes a step of "
                f"{step[kind, joint]:.3g} from the motion before, {after_s:.3f} s from now",
            )
    return None


def _best_so_far(values: np.ndarray) -> np.ndarray:
    """``[segments, joints]``: the smallest of ``[knots, joints]`` up to the beginning of each segment."""
    return np.minimum.accumulate(values, axis=0)[:-1]


def _without_rounding(plan: Plan, ratio: np.ndarray, limits: JointLimits) -> np.ndarray:
    """Accelerations as ratios, less what is rounding of the positions; the change of velocity counts in full."""
    spans_s = seconds(np.diff(plan.times_ns))[:, None]
    size = np.maximum(np.abs(plan.positions[1:]), 1.0)
    rounding = _ROUNDINGS * np.finfo(float).eps * size / (spans_s * spans_s)
    change = np.abs(np.diff(plan.velocities, axis=0)) / spans_s
    return np.maximum(ratio - rounding / limits.max_acceleration, change / limits.max_acceleration)

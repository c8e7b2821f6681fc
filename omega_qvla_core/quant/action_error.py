"""How far action chunks are from the unquantized model's, given the same observations and the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ActionError:
    """Difference of action chunks from the unquantized policy's, same observations and same noise.

    Attributes:
        observations: How many.
        relative: ``|a' - a| / |a|`` over the model's normalised actions, all observations together.
        median: Median over the observations of the same ratio. Where a policy is undecided between two plans, the
            smallest change flips it, and a few such observations dominate ``relative``.
        rms: Root mean square difference, normalised units.
        largest: Largest difference, normalised units.
        gripper_flips: Share of (observation, step, gripper) in which the command is on the other side of the middle
            between the smallest and the largest command of the unquantized policy; None without a gripper, or where it
            never moves.
        jerk: Root mean square third difference along the chunk, normalised units per step cubed; None for chunks of
            fewer than four steps.
        reference_jerk: The same of the unquantized policy.
    """

    observations: int
    relative: float
    median: float
    rms: float
    largest: float
    gripper_flips: float | None = None
    jerk: float | None = None
    reference_jerk: float | None = None

    @property
    def jerk_change(self) -> float | None:
        """By which fraction the chunks are jerkier (or smoother, below 0); None if that is not defined."""
        return self.jerk / self.reference_jerk - 1 if self.jerk is not None and self.reference_jerk else None


def compare_actions(ours: Tensor, theirs: Tensor, names: Sequence[str] | None = None) -> ActionError:
    """Action error of quantized actions.

    Args:
        ours: ``[N, horizon, A]``, normalised.
        theirs: The same of the unquantized model.
        names: Of the first actions, the others being padding. Those with ``gripper`` in their name are grippers. None:
            all are actions, and none is a gripper.
    """
    difference, flat = (ours - theirs).double().flatten(1), theirs.double().flatten(1)
    ratios = difference.norm(dim=1) / flat.norm(dim=1).clamp_min(1e-30)
    width = theirs.shape[2] if names is None else len(names)
    return ActionError(
        observations=ours.shape[0],
        relative=float(difference.norm() / flat.norm().clamp_min(1e-30)),
        median=float(ratios.median()),
        rms=float(difference.square().mean().sqrt()),
        largest=float(difference.abs().max()),
        gripper_flips=_flips(ours, theirs, [i for i, name in enumerate(names or ()) if "gripper" in name]),
        jerk=_jerk(ours[..., :width]),
        reference_jerk=_jerk(theirs[..., :width]),
    )


def _flips(ours: Tensor, theirs: Tensor, grippers: Sequence[int]) -> float | None:
    wanted, found = theirs[..., grippers].flatten(0, 1), ours[..., grippers].flatten(0, 1)
    if not wanted.numel():
        return None
    low, high = wanted.amin(dim=0), wanted.amax(dim=0)
    moving = high > low
    if not moving.any():
        return None
    middle = (low + high) / 2
    return float(((wanted > middle) != (found > middle))[:, moving].float().mean())


def _jerk(actions: Tensor) -> float | None:
    if actions.shape[1] < 4:
        return None
    return float(actions.double().diff(n=3, dim=1).square().mean().sqrt())

"""Orders of the input channels before they are cut into blocks (METHOD A.2).

Convention: ``order[new] = old``; ``x' = x[..., order]``, ``W' = W[:, order]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omega_qvla_core.quant.registry import Registry

PermutationFunction = Callable[[Tensor, int], Tensor]

PERMUTATIONS: Registry[PermutationFunction] = Registry("permutation")
"""Name -> function from (score per channel ``[I]``, block size) to the order, int64 ``[I]``."""

PERMUTATION_SCORES = ("weight", "act", "act_weight")


def channel_score(weight: Tensor, activation_peak: Tensor, score: str) -> Tensor:
    """What channels are ordered by.

    Args:
        weight: ``[O, I]``.
        activation_peak: ``[I]``, q99.9 (or maximum) of the magnitude of each channel.
        score: ``weight`` = mean of squares of a column, ``act`` = squared peak, ``act_weight`` = their product.

    Returns:
        float64 ``[I]``.
    """
    energy = weight.double().square().mean(dim=0)
    peak = activation_peak.double().square()
    return {"weight": energy, "act": peak, "act_weight": energy * peak}[score]


@PERMUTATIONS.register("none")
def none(score: Tensor, block: int) -> Tensor:
    """Channels stay where they are."""
    return torch.arange(score.shape[0], device=score.device)


@PERMUTATIONS.register("interleave")
def interleave(score: Tensor, block: int) -> Tensor:
    """Largest, smallest, second largest, second smallest, ... cut into blocks.

    The order of the method's published code, kept for parity: it gathers the extremes in the first block.
    """
    falling = torch.argsort(score, descending=True, stable=True)
    half = (score.shape[0] + 1) // 2
    order = torch.empty_like(falling)
    order[0::2] = falling[:half]
    order[1::2] = falling[half:].flip(0)
    return order


@PERMUTATIONS.register("serpentine")
def serpentine(score: Tensor, block: int) -> Tensor:
    """Deal the channels by falling score over the blocks, to and fro, so that block energies become alike (DuQuant).

    A block that is full (the short last one) is passed over.
    """
    channels = score.shape[0]
    capacity = [min(block, channels - start) for start in range(0, channels, block)]
    dealt: list[list[int]] = [[] for _ in capacity]
    falling = iter(torch.argsort(score, descending=True, stable=True).tolist())
    left, forward = channels, True
    while left:
        turn = range(len(capacity)) if forward else reversed(range(len(capacity)))
        for index in turn:
            if len(dealt[index]) < capacity[index]:
                dealt[index].append(next(falling))
                left -= 1
        forward = not forward
    return torch.tensor([channel for part in dealt for channel in part], device=score.device)

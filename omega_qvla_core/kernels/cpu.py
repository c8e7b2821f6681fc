"""Integer CPU backend: group sums are exact integers, scales are applied to the sums.

The sums come from whichever route is exact and fastest on this machine for the size of the layer (``cpu_routes``); all
of them give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla_core.kernels.base import Backend, GroupedWeight, grouped
from omega_qvla_core.kernels.cpu_routes import Kind, Route, choose

# Sums of this many outputs at a time are scaled while they are in the cache (1 MiB of float32), in blocks of at least
# this many tokens.
_TILE_OUTPUTS, _TILE_TOKENS = 1 << 18, 64


@dataclass(frozen=True)
class CpuWeight:
    """Layout of ``CpuBackend``.

    Attributes:
        route: Computes the sums.
        layout: What the route made of the codes.
        scales: Per group float32 ``[O]``.
        outputs: Rows O.
    """

    route: Route
    layout: Any
    scales: tuple[Tensor, ...]
    outputs: int


class CpuBackend(Backend):
    """Executes 4-bit (and 8-bit) integer products; see the module's docstring."""

    name = "cpu"

    def prepare(self, weight: GroupedWeight) -> CpuWeight:
        route = choose(weight)
        codes = grouped(weight.codes, weight.group).transpose(1, 2)
        scales = weight.scales.float().t().contiguous()
        layout = route.prepare(codes, Kind(weight.activation_bits, weight.weight_bits), scales)
        return CpuWeight(route, layout, tuple(scales), weight.codes.shape[0])

    def linear(self, codes: Tensor, scales: Tensor, weight: CpuWeight) -> Tensor:
        """Groups are added in ascending order in float32: ``y += (sum_g * sx_g) * sw_g``.

        With one activation scale for all groups it is applied last: ``y = sx * sum_g (sum_g * sw_g)``.
        """
        groups, tokens, _ = codes.shape
        if not needs_blocks(groups, tokens, weight):
            return product(codes, scales, weight)
        tile, per_token = _tile(weight), scales.shape[1] > 1
        return torch.cat(
            [
                product(
                    codes[:, start : start + tile], scales[:, start : start + tile] if per_token else scales, weight
                )
                for start in range(0, tokens, tile)
            ]
        )

    def accumulators(self, codes: Tensor, weight: CpuWeight) -> Tensor:
        """The integer sums themselves, int64 ``[G, M, O]``, for tests against an int64 oracle."""
        return weight.route.integers(codes, weight.layout)


def needs_blocks(groups: int, tokens: int, weight: CpuWeight) -> bool:
    """Whether the sums of all tokens are too large to be scaled while they are in the cache."""
    return groups > 1 and tokens > _tile(weight)


def _tile(weight: CpuWeight) -> int:
    return max(_TILE_TOKENS, _TILE_OUTPUTS // weight.outputs)


@dataclass(frozen=True)
class Work:
    """Memory for the sums of a product that runs often.

    Attributes:
        sums: float32 ``[G, M, O]``.
        parts: The same, a view per group.
    """

    sums: Tensor
    parts: tuple[Tensor, ...]


def product(codes: Tensor, scales: Tensor, weight: CpuWeight, work: Work | None = None) -> Tensor:
    """``CpuBackend.linear`` without blocks of tokens.

    Args:
        codes: As in ``Backend.linear``.
        scales: As in ``Backend.linear``.
        weight: From ``CpuBackend.prepare``.
        work: Written to where the route can; the result may then be a part of it.
    """
    route, groups = weight.route, len(weight.scales)
    if groups == 1:
        y = route.scaled_sum(codes, weight.layout)
        if y is None:
            y = _parts(codes, weight, work)[1][0].mul_(weight.scales[0])
        return y.mul_(scales[0])
    sums, parts = _parts(codes, weight, work)
    if scales.shape[0] == groups:
        if sums is not None:
            sums.mul_(scales)
        else:
            for one, scale in zip(parts, scales.unbind()):
                one.mul_(scale)
    y = parts[0].mul_(weight.scales[0])
    for one, scale in zip(parts[1:], weight.scales[1:]):
        y.addcmul_(one, scale)
    return y if scales.shape[0] == groups else y.mul_(scales[0])


def _parts(codes: Tensor, weight: CpuWeight, work: Work | None) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The sums in one tensor, if they lie in one, and per group."""
    if work is not None and weight.route.writes_out:
        weight.route.sums(codes, weight.layout, work.sums)
        return work.sums, work.parts
    sums = weight.route.sums(codes, weight.layout)
    return (sums, sums.unbind()) if isinstance(sums, Tensor) else (None, sums)

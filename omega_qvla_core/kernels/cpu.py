"""Integer CPU backend: group sums are exact integers, scales are applied to the sums.

Layers with more than 128 outputs multiply int8 codes: on the VNNI units of current CPUs, with 16 to 60 tokens, that
takes 0.4 to 0.9 of the time of a float32 product, and 0.5 at widths from 1024. Smaller layers, whose time is the
overhead of calls, multiply the same integers held in float32, exactly, in one batched call. Both give the same sums
and so the same outputs, bit for bit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from omega_qvla_core.kernels.base import Backend, GroupedWeight, grouped

_log = logging.getLogger(__name__)

# float32 represents every integer up to here, whatever the order of summation.
_EXACT_FLOAT32 = 1 << 24


# Up to this many outputs one batched float32 product beats one int8 product per group (measured at 16 tokens).
_SMALL_OUTPUTS = 128

# Shorter sums are taken in float32. With one column, torch 2.13's int8 product returns memory it never wrote; with few,
# an int8 product per group is slow.
_SHORTEST_INT8_SUM = 8


@dataclass(frozen=True)
class CpuWeight:
    """Layout of ``CpuBackend``.

    Attributes:
        codes: ``[G, g, O]``: int8 (a transposed view, which the int8 product reads fastest), or floats that hold the
            same integers.
        groups: The same memory as a view per group, for int8; empty for floats.
        scales: Per group float32 ``[O]``.
    """

    codes: Tensor
    groups: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]


class CpuBackend(Backend):
    """Executes 4-bit (and 8-bit) integer products; see the module's docstring."""

    name = "cpu"

    def prepare(self, weight: GroupedWeight) -> CpuWeight:
        codes = grouped(weight.codes, weight.group).transpose(1, 2)
        scales = tuple(weight.scales.float().t().contiguous())
        kind = product_dtype(weight)
        if kind == torch.int8:
            return CpuWeight(codes, tuple(codes), scales)
        return CpuWeight(codes.to(kind).contiguous(), (), scales)

    def linear(self, codes: Tensor, scales: Tensor, weight: CpuWeight) -> Tensor:
        """Groups are added in ascending order in float32: ``y += (sum_g * sx_g) * sw_g``.

        With one activation scale for all groups it is applied last: ``y = sx * sum_g (sum_g * sw_g)``.
        """
        sums = self._sums(codes, weight)
        if scales.shape[0] != len(sums) or len(sums) == 1:
            return _weighted(sums, weight.scales).mul_(scales[0])
        return _weighted([one.mul_(scale) for one, scale in zip(sums, scales.unbind())], weight.scales)

    def accumulators(self, codes: Tensor, weight: CpuWeight) -> Tensor:
        """The integer sums themselves, int64 ``[G, M, O]``, for tests against an int64 oracle."""
        if weight.groups:
            return torch.stack([torch._int_mm(c, w).long() for c, w in zip(codes.char(), weight.groups)])
        return torch.bmm(codes.to(weight.codes.dtype), weight.codes).long()

    def _sums(self, codes: Tensor, weight: CpuWeight) -> list[Tensor]:
        """Integer sums per group as float32 ``[M, O]``; those below 2**24 are represented without rounding."""
        if weight.groups:
            return [torch._int_mm(c, w).float() for c, w in zip(codes.char().unbind(), weight.groups)]
        return list(torch.bmm(codes.to(weight.codes.dtype), weight.codes).float().unbind())


def product_dtype(weight: GroupedWeight) -> torch.dtype:
    """The fastest number type whose products are exact for this weight on this machine."""
    exact_in_float32 = weight.largest_accumulator <= _EXACT_FLOAT32
    small = (weight.codes.shape[0] <= _SMALL_OUTPUTS or weight.group < _SHORTEST_INT8_SUM) and exact_in_float32
    if weight.codes.device.type == "cpu" and not small and int8_product_is_exact():
        return torch.int8
    return torch.float32 if exact_in_float32 else torch.float64


@lru_cache(maxsize=1)
def int8_product_is_exact() -> bool:
    """Whether ``torch._int_mm`` gives exact sums on this CPU, tried once on codes of the largest magnitude.

    Some int8 kernels for CPUs without VNNI add pairs of products in saturating 16-bit registers.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        for rows, inner, columns in ((1, 64, 5), (16, 64, 128), (33, 200, 64)):
            left = torch.randint(-128, 128, (rows, inner), generator=generator, dtype=torch.int8)
            right = torch.randint(-128, 128, (columns, inner), generator=generator, dtype=torch.int8)
            left[0], right[0], right[-1] = -128, -128, 127
            exact = left.long() @ right.long().t()
            if not torch.equal(torch._int_mm(left, right.t()).long(), exact):
                raise RuntimeError("sums are not exact")
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        _log.info("int8 products are not used on this CPU (%s); float32 products of integer codes are", error)
        return False
    return True


def _weighted(sums: list[Tensor], row_scales: tuple[Tensor, ...]) -> Tensor:
    """``sum_g sums_g * sw_g`` in ascending order, float32 ``[M, O]``; ``sums[0]`` is consumed."""
    total = sums[0].mul_(row_scales[0])
    for one, row_scale in zip(sums[1:], row_scales[1:]):
        total.addcmul_(one, row_scale)
    return total

"""Weight scales as a small integer per group times one scale per row.

With ``scale = row scale * multiplier`` and multipliers of 1 to 16, ``code * multiplier`` of a 4-bit code fits into int8
(-128 to 112). A whole row is then one integer sum, with its scales outside, and still follows its groups; a group costs
half a byte instead of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla_core.kernels import code_range, pack_codes, unpack_codes
from omega_qvla_core.quant.scales import search_scales, spread_scales

LARGEST_MULTIPLIER = 16
MULTIPLIER_BITS = 4

# Multipliers of a row's largest scale that are tried. Below 8 the grid gets coarse where most groups lie.
_LARGEST_TRIED = (16, 14, 12, 10, 8)

# A stored multiplier is a signed 4-bit code: 1..16 as -8..7.
_OFFSET = 9

_ROWS = 1024


def search_multipliers(weight: Tensor, group: int, bits: int, grid: str) -> tuple[Tensor, Tensor]:
    """Row scales and multipliers near the scales of ``search_scales``, by squared rounding error.

    Args:
        weight: float64 ``[O, I]``.
        group: Columns per group, at least 1; the last group may be short.
        bits: Bits of the codes, at most 4.
        grid: A name in ``SCALE_GRIDS``.

    Returns:
        Row scales float32 ``[O, 1]`` and multipliers int8 ``[O, G]``, 1 to 16. A row of zeros gets scale 1.
    """
    wanted = search_scales(weight, group, bits, grid).double()
    parts = [_of_rows(*rows, group, bits) for rows in zip(weight.split(_ROWS), wanted.split(_ROWS))]
    return torch.cat([row for row, _ in parts]), torch.cat([multipliers for _, multipliers in parts])


def _of_rows(weight: Tensor, wanted: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    groups = weight.split(group, dim=1)
    # A group of zeros has a scale by convention only, which must not decide about the row's.
    live = torch.stack([(columns != 0).any(dim=1) for columns in groups], dim=1)
    peak = torch.where(live, wanted, 0.0).amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    best = best_error = None
    for largest in _LARGEST_TRIED:
        row = (peak / largest).float().double()
        error = _errors(weight, row * (wanted / row).round().clamp(1, LARGEST_MULTIPLIER), group, bits)
        error = error.sum(dim=1, keepdim=True)
        if best is None:
            best, best_error = row, error
            continue
        best, best_error = torch.where(error < best_error, row, best), torch.minimum(error, best_error)
    tried = range(1, LARGEST_MULTIPLIER + 1)
    errors = torch.stack([_errors(weight, (best * one).expand_as(wanted), group, bits) for one in tried])
    return best.float(), (errors.argmin(dim=0) + 1).to(torch.int8)


def _errors(weight: Tensor, scales: Tensor, group: int, bits: int) -> Tensor:
    """Squared rounding error per group ``[O, G]``."""
    spread = spread_scales(scales, group, weight.shape[1])
    low, high = code_range(bits)
    error = ((weight / spread).round().clamp_(low, high) * spread).sub_(weight).square_()
    return torch.stack([columns.sum(dim=1) for columns in error.split(group, dim=1)], dim=1)


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """int8 ``[O, G]`` of 1 to 16 -> uint8 ``[O, ceil(G / 2)]``."""
    return pack_codes(multipliers - _OFFSET, MULTIPLIER_BITS)


def unpack_multipliers(packed: Tensor, groups: int) -> Tensor:
    """Inverse of ``pack_multipliers``: int8 ``[O, groups]``."""
    return unpack_codes(packed, MULTIPLIER_BITS, groups) + _OFFSET

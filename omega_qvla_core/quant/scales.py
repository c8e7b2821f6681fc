"""Weight scales per row and group: a search over multiples of the absmax scale (METHOD A.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla_core.kernels import code_range

SCALE_GRIDS: dict[str, tuple[float, ...]] = {
    # The largest weight of a group gets the largest code.
    "absmax": (1.0,),
    # The published grid s0 / alpha for alpha in {0.5, 0.75, 1, 1.25, 1.5}, in its order (ties keep the first).
    "paper": (1 / 0.5, 1 / 0.75, 1.0, 1 / 1.25, 1 / 1.5),
    # METHOD A.12: 24 to 40 points from 0.5 to 1.05; this is 34.
    "fine": tuple(round(0.5 + 0.55 * index / 33, 6) for index in range(34)),
}

# Smallest normal float16: below it a scale loses bits, and float32 is stored.
_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0

_ROWS = 1024


def group_count(columns: int, group: int) -> int:
    """Groups of a row; ``group`` 0 means the whole row."""
    return 1 if group == 0 else -(-columns // group)


def search_scales(weight: Tensor, group: int, bits: int, grid: str) -> Tensor:
    """For each row and group the multiple of the absmax scale with the least squared rounding error.

    Args:
        weight: float64 ``[O, I]``.
        group: Columns per group, 0 for the whole row; the last group may be short.
        bits: Bits of the codes.
        grid: A name in ``SCALE_GRIDS``.

    Returns:
        float16 ``[O, G]``, or float32 where float16 would lose bits. A group of zeros gets scale 1.
    """
    size = group or weight.shape[1]
    low, high = code_range(bits)
    dtype = _scale_dtype(weight, size, high)
    # A few rows at a time stay in the cache of the processor: a third of the time for large layers, the same scales.
    found = [
        torch.cat([_best_scales(rows, SCALE_GRIDS[grid], low, high, dtype) for rows in columns.split(_ROWS)])
        for columns in weight.split(size, dim=1)
    ]
    return torch.cat(found, dim=1).to(dtype)


def _best_scales(columns: Tensor, grid: tuple[float, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Scale per row ``[O, 1]`` of one group ``[O, g]``, float64."""
    absmax = columns.abs().amax(dim=1, keepdim=True) / high
    absmax = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    best = best_error = None
    for multiple in grid:
        scale = (absmax * multiple).clamp_min(_SMALLEST_HALF if dtype == torch.float16 else 0.0).to(dtype).double()
        rounded = (columns / scale).round().clamp(low, high) * scale
        error = (columns - rounded).square().sum(dim=1, keepdim=True)
        if best is None:
            best, best_error = scale, error
            continue
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def spread_scales(scales: Tensor, group: int, columns: int) -> Tensor:
    """``[O, G]`` -> ``[O, columns]``: the scale of every weight."""
    return scales.repeat_interleave(group or columns, dim=1)[:, :columns]


def _scale_dtype(weight: Tensor, size: int, high: int) -> torch.dtype:
    """float16 unless the scales of a row leave its normal range.

    In float16 a group far smaller than the rest of its row gets the smallest normal scale.
    """
    peaks = torch.stack([columns.abs().amax(dim=1) for columns in weight.split(size, dim=1)]) / high
    rows = peaks.amax(dim=0)
    rows = rows[rows > 0]
    fits = rows.numel() == 0 or (float(rows.min()) * 0.5 >= _SMALLEST_HALF and float(rows.max()) * 2.0 <= _LARGEST_HALF)
    return torch.float16 if fits else torch.float32

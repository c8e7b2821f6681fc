"""Leaving out of a prefix what no row of the batch has: absent cameras and padding.

Each function reads its mask on the host once, before the network; with a mask on a GPU that waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def host_all(mask: Tensor) -> bool:
    """Whether every value of a mask is True."""
    return bool(mask.all())


def drop_columns(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are masked in every row.

    Args:
        values: ``[B, S, ...]``.
        mask: bool ``[B, S]``.

    Returns:
        The kept columns of both; the arguments themselves if nothing is dropped. The first column is kept in any case.
    """
    keep = mask.any(dim=0)
    if host_all(keep):
        return values, mask
    kept = keep.nonzero().flatten()
    if len(kept) == 0:
        kept = torch.zeros(1, dtype=torch.int64, device=mask.device)
    return values[:, kept], mask[:, kept]

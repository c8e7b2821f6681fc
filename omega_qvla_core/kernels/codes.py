"""Signed integer codes of quantized weights: how they are stored and read back.

Codes of up to 4 bits lie two per byte: the even column in the low nibble, the odd column in the high nibble, each in
two's complement. Wider codes take one byte each.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Widest code that shares its byte with another one.
NIBBLE_BITS = 4


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a symmetric signed grid: (-8, 7) for 4 bits (METHOD A.0)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def packed_columns(columns: int, bits: int) -> int:
    """Bytes per row for ``columns`` codes."""
    return (columns + 1) // 2 if bits <= NIBBLE_BITS else columns


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes for storage.

    Args:
        codes: int8 ``[O, I]`` within ``code_range(bits)``.
        bits: 2 to 8.

    Returns:
        uint8 ``[O, ceil(I / 2)]`` up to 4 bits (an odd last column leaves its high nibble zero), else int8 ``[O, I]``.

    Raises:
        ValueError: A code is out of range.
    """
    low, high = code_range(bits)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; {bits} bits hold {low}..{high}")
    if bits > NIBBLE_BITS:
        return codes.to(torch.int8).contiguous()
    nibbles = codes.to(torch.int16) & 0xF
    if codes.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).to(torch.uint8).contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of ``pack_codes``: int8 ``[O, columns]``."""
    if bits > NIBBLE_BITS:
        return packed.to(torch.int8)
    low = (packed & 0xF).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    nibbles = torch.stack((low, high), dim=-1).flatten(1)[:, :columns]
    # 8..15 are the negative codes of two's complement.
    return torch.where(nibbles > 7, nibbles - 16, nibbles).contiguous()

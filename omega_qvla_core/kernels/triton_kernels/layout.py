"""Layouts of weights and codes that the kernels read.

A weight ``[O, K]`` is cut into tiles of ``BLOCK_OUT`` rows by ``BLOCK_IN`` columns, each tile contiguous in memory, so
that a program streams one run of bytes. In a tile of 4-bit codes, byte ``j`` of a row holds column ``j`` in its low
nibble and column ``BLOCK_IN / 2 + j`` in its high nibble: each half of the columns is one plane of nibbles, and two
shifts unpack a plane in registers, where the tensor cores read it. (The pack's own layout has neighbours in one byte.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_OUT = 64
"""Rows of a tile: the smallest M of a Hopper warpgroup's product."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def nibble_planes(codes: Tensor, block_in: int) -> Tensor:
    """4-bit codes int8 ``[R, K]`` (K a multiple of ``block_in``) -> int8 ``[R, K / 2]``, two planes per block."""
    rows, columns = codes.shape
    planes = codes.view(rows, columns // block_in, 2, block_in // 2)
    packed = (planes[:, :, 0] & 0xF) | (planes[:, :, 1] << 4)
    return packed.reshape(rows, columns // 2).contiguous()


def tiles(matrix: Tensor, block_out: int, row_width: int) -> Tensor:
    """``[R, W]`` -> contiguous ``[R / block_out, W / row_width, block_out, row_width]``."""
    rows, width = matrix.shape
    cut = matrix.view(rows // block_out, block_out, width // row_width, row_width)
    return cut.transpose(1, 2).contiguous()


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``[R, K]`` with zeros up to multiples of ``rows`` and ``columns``."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def weight_tiles(codes: Tensor, bits: int, block_out: int, block_in: int) -> Tensor:
    """Codes int8 (or a floating weight, with ``bits`` 16) ``[O, K]`` in the layout of the module's docstring."""
    matrix = padded(codes, block_out, block_in)
    if bits <= 4:
        return tiles(nibble_planes(matrix, block_in), block_out, block_in // 2)
    return tiles(matrix, block_out, block_in)


def scale_tiles(scales: Tensor, block_out: int) -> Tensor:
    """Scales per row and group ``[O, G]`` -> float32 ``[O / block_out, G, block_out]``; padded rows have scale 0."""
    rows = padded(scales.float(), block_out, 1)
    return rows.view(-1, block_out, rows.shape[1]).transpose(1, 2).contiguous()


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthogonal Hadamard matrix of a power of two, float32 ``[size, size]``, in Sylvester's order."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix * size**-0.5).to(device)

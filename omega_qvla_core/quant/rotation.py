"""Orthogonal input and output rotations, block by block (METHOD A.3, A.4).

A rotation is a list of square float64 blocks along the diagonal. The last block is short where the width is not a
multiple of the block size. Vectors are rows: ``x_r = x R``, ``W_r = W R``, so that ``x_r W_r^T = x W^T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from omega_qvla_core.quant.registry import Registry

RotationFunction = Callable[[Tensor], Tensor]

ROTATIONS: Registry[RotationFunction] = Registry("rotation")
"""Name -> function from the weight columns of one block ``[O, b]`` (float64) to its rotation ``[b, b]`` (float64)."""


def hadamard_matrix(order: int) -> Tensor:
    """Normalised Sylvester Hadamard matrix, entries +-1/sqrt(order).

    Args:
        order: A power of two.

    Returns:
        float64 ``[order, order]``, symmetric and orthogonal.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"Hadamard order {order} is not a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / math.sqrt(order)


def hadamard_blocks(width: int) -> Tensor:
    """Hadamard rotation of any width: blocks of falling powers of two (40 = 32 + 8).

    Returns:
        float64 ``[width, width]``; one full Hadamard matrix where ``width`` is a power of two.
    """
    powers = [1 << bit for bit in range(width.bit_length() - 1, -1, -1) if width >> bit & 1]
    return torch.block_diag(*(hadamard_matrix(power) for power in powers))


def weight_eigenvectors(columns: Tensor) -> Tensor:
    """Eigenvectors of ``columns^T columns`` by falling eigenvalue.

    Args:
        columns: float64 ``[O, b]``.

    Returns:
        float64 ``[b, b]``. The sign of each vector is fixed (its largest entry is positive), so that packs reproduce.
    """
    _, vectors = torch.linalg.eigh(columns.T @ columns)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


@ROTATIONS.register("none")
def identity(columns: Tensor) -> Tensor:
    """No rotation."""
    return torch.eye(columns.shape[1], dtype=torch.float64, device=columns.device)


@ROTATIONS.register("hadamard")
def hadamard(columns: Tensor) -> Tensor:
    """Hadamard; needs no storage, for it follows from the width."""
    return hadamard_blocks(columns.shape[1]).to(columns.device)


@ROTATIONS.register("svd")
def svd(columns: Tensor) -> Tensor:
    """Right singular vectors of the block."""
    return weight_eigenvectors(columns)


@ROTATIONS.register("svd_hadamard")
def svd_hadamard(columns: Tensor) -> Tensor:
    """``U H``: makes the energies of all columns of the rotated block equal. Odd widths take ``U`` alone."""
    vectors, width = weight_eigenvectors(columns), columns.shape[1]
    if width & (width - 1):
        return vectors
    return vectors @ hadamard_matrix(width).to(columns.device)


STORED_ROTATIONS = frozenset({"svd", "svd_hadamard"})
"""Rotations that depend on the weights and so are part of the pack."""


def input_rotation(weight: Tensor, mode: str, block: int) -> list[Tensor]:
    """Rotation blocks of a weight's columns.

    Args:
        weight: float64 ``[O, I]``, smoothed and permuted; of linears that share their input, the stacked rows.
        mode: A name in ``ROTATIONS``.
        block: Block size; wider than ``I`` means one block.

    Returns:
        float64 ``[b, b]`` each, in column order.
    """
    rotate = ROTATIONS[mode]
    return [rotate(columns) for columns in weight.split(min(block, weight.shape[1]), dim=1)]


def output_rotation(weight: Tensor, block: int) -> list[Tensor]:
    """Left singular vectors ``V_b`` of each block of output rows (METHOD A.4).

    They are applied as ``W[rows] <- V_b W[rows]`` and undone after the product as ``y[rows] <- y[rows] V_b``.

    Args:
        weight: float64 ``[O, I]``, the original weight.
        block: Rows per block.
    """
    return [weight_eigenvectors(rows.T) for rows in weight.split(min(block, weight.shape[0]), dim=0)]


def apply_blocks(x: Tensor, blocks: list[Tensor]) -> Tensor:
    """``x blockdiag(blocks)`` along the last axis of ``x [..., I]``."""
    parts = x.split([block.shape[0] for block in blocks], dim=-1)
    return torch.cat([part @ block.to(part.dtype) for part, block in zip(parts, blocks)], dim=-1)

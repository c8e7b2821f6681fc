"""Weights in the layouts of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omega_qvla_core.kernels.base import GroupedWeight
from omega_qvla_core.kernels.triton_kernels.layout import (
    BLOCK_OUT,
    nibble_planes,
    padded,
    round_up,
    scale_tiles,
    weight_tiles,
)

FLOAT_BITS = 16
_LONG_BLOCK = 128
"""Columns of a tile where no group is shorter: fewer, longer loads."""
_ROW_MULTIPLE = 256
"""Rows of a weight for many tokens are padded to this, the widest block of ``large_gemm``."""


@dataclass(frozen=True)
class SmallWeight:
    """A weight for ``small_gemm``.

    Attributes:
        tiles: See ``layout``.
        scales: float32 ``[O / 64, G, 64]``; empty for bfloat16.
        bias: float32 ``[O padded]`` or None.
        outputs: O, without padding.
        columns: Columns of the codes that it multiplies, padding included.
        bits: Up to 4, up to 8, or 16 for bfloat16.
        block_in: Columns per tile.
        group: Columns per scale of the codes, padding included; ``columns`` if there is one scale per row.
        gate_tiles: Tiles of rows of the gate, if rows of an up projection follow; else 0.
    """

    tiles: Tensor
    scales: Tensor
    bias: Tensor | None
    outputs: int
    columns: int
    bits: int
    block_in: int
    group: int
    gate_tiles: int = 0

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.columns // self.group

    @property
    def blocks(self) -> int:
        """Tiles along K."""
        return self.columns // self.block_in

    @property
    def row_tiles(self) -> int:
        """Tiles of rows that programs own: of the gate only, if it is gated."""
        return self.gate_tiles or self.tiles.shape[0]


@dataclass(frozen=True)
class LargeWeight:
    """A weight for ``large_gemm``.

    Attributes:
        rows: int8 ``[R padded, K padded]``, int4 planes ``[R padded, K padded / 2]``, or bfloat16; R is O, or 2 O if it
            is gated.
        scales: float32 ``[G, R padded]``; empty for bfloat16.
        bias: float32 ``[R padded]`` or None.
        outputs: O, without padding: of the gate only, if it is gated.
        columns: Columns of the codes that it multiplies, padding included.
        bits: As for ``SmallWeight``, of what is stored here.
        group: Columns per scale; ``columns`` if there is one scale per row.
        gated: Whether rows of a gate and of an up projection take turns.
    """

    rows: Tensor
    scales: Tensor
    bias: Tensor | None
    outputs: int
    columns: int
    bits: int
    group: int
    gated: bool = False

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.columns // self.group


def small_weight(weight: GroupedWeight, bias: Tensor | None = None, gated: bool = False) -> SmallWeight:
    """Codes in tiles. With ``gated`` the first half of the rows is the gate, the second the up projection."""
    codes, scales, group = _spread_groups(weight, BLOCK_OUT)
    block_in = 64 if group % _LONG_BLOCK else _LONG_BLOCK
    halves = list(zip(codes.chunk(2), scales.chunk(2))) if gated else [(codes, scales)]
    tiles = torch.cat([weight_tiles(one, weight.weight_bits, BLOCK_OUT, block_in) for one, _ in halves])
    return SmallWeight(
        tiles=tiles,
        scales=torch.cat([scale_tiles(one, BLOCK_OUT) for _, one in halves]),
        bias=_padded_bias(bias, BLOCK_OUT),
        outputs=halves[0][0].shape[0],
        columns=codes.shape[1],
        bits=4 if weight.weight_bits <= 4 else 8,
        block_in=block_in,
        group=group,
        gate_tiles=tiles.shape[0] // 2 if gated else 0,
    )


def small_float_weight(
    weight: Tensor, bias: Tensor | None = None, gated: bool = False, dtype: torch.dtype = torch.bfloat16
) -> SmallWeight:
    """A weight ``[O, I]`` in tiles, bfloat16 unless another type is asked for (the interpreter has no bfloat16)."""
    matrix = F.pad(weight.to(dtype), (0, -weight.shape[1] % BLOCK_OUT))
    halves = matrix.chunk(2) if gated else [matrix]
    tiles = torch.cat([weight_tiles(one, FLOAT_BITS, BLOCK_OUT, BLOCK_OUT) for one in halves])
    return SmallWeight(
        tiles=tiles,
        scales=weight.new_empty(0, dtype=torch.float32),
        bias=_padded_bias(bias, BLOCK_OUT),
        outputs=halves[0].shape[0],
        columns=matrix.shape[1],
        bits=FLOAT_BITS,
        block_in=BLOCK_OUT,
        group=matrix.shape[1],
        gate_tiles=tiles.shape[0] // 2 if gated else 0,
    )


def large_weight(
    weight: GroupedWeight, bias: Tensor | None = None, gated: bool = False, expand: bool = True
) -> LargeWeight:
    """Codes in rows.

    Args:
        weight: As the quantizer hands it over.
        bias: float ``[O]``.
        gated: The first half of the rows is the gate, the second the up projection.
        expand: Store 4-bit codes as int8: twice the memory, nothing to unpack where the product is bound by arithmetic.
    """
    codes, scales, group = _spread_groups(weight, BLOCK_OUT)
    if group == codes.shape[1]:
        codes = F.pad(codes, (0, -codes.shape[1] % _LONG_BLOCK))
        group = codes.shape[1]
    wide = expand or weight.weight_bits > 4
    rows = padded(_taking_turns(codes) if gated else codes, _ROW_MULTIPLE, 1)
    scales = scales.float()
    block_in = 64 if group % _LONG_BLOCK else _LONG_BLOCK
    return LargeWeight(
        rows=rows.contiguous() if wide else nibble_planes(rows, block_in),
        scales=padded(_taking_turns(scales) if gated else scales, _ROW_MULTIPLE, 1).t().contiguous(),
        bias=_large_bias(bias, gated),
        outputs=codes.shape[0] // 2 if gated else codes.shape[0],
        columns=codes.shape[1],
        bits=8 if wide else 4,
        group=group,
        gated=gated,
    )


def large_float_weight(
    weight: Tensor, bias: Tensor | None = None, gated: bool = False, dtype: torch.dtype = torch.bfloat16
) -> LargeWeight:
    """A weight ``[O, I]`` in rows; see ``small_float_weight``."""
    matrix = F.pad(weight.to(dtype), (0, -weight.shape[1] % _LONG_BLOCK))
    return LargeWeight(
        rows=padded(_taking_turns(matrix) if gated else matrix, _ROW_MULTIPLE, 1),
        scales=weight.new_empty(0, dtype=torch.float32),
        bias=_large_bias(bias, gated),
        outputs=matrix.shape[0] // 2 if gated else matrix.shape[0],
        columns=matrix.shape[1],
        bits=FLOAT_BITS,
        group=matrix.shape[1],
        gated=gated,
    )


def _taking_turns(rows: Tensor) -> Tensor:
    """Rows of a gate and then of an up projection -> gate, up, gate, up..."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)


def _large_bias(bias: Tensor | None, gated: bool) -> Tensor | None:
    return _padded_bias(_taking_turns(bias) if gated and bias is not None else bias, _ROW_MULTIPLE)


def regrouped(codes: Tensor, group: int, columns: int) -> Tensor:
    """Codes ``[G, M, g]`` as int8 rows ``[M, columns]``, each group padded to ``group``."""
    groups, tokens, width = codes.shape
    spread = F.pad(codes, (0, group - width)) if groups > 1 else codes
    rows = spread.transpose(0, 1).reshape(tokens, -1).to(torch.int8)
    return F.pad(rows, (0, columns - rows.shape[1])).contiguous()


def _spread_groups(weight: GroupedWeight, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Codes with every group padded to a multiple of a tile's columns, scales ``[O, G]``, and the padded group."""
    rows, columns = weight.codes.shape
    groups = weight.scales.shape[1]
    if groups == 1:
        width = round_up(columns, _LONG_BLOCK)
        return F.pad(weight.codes, (0, width - columns)), weight.scales, width
    group = round_up(weight.group, multiple)
    codes = F.pad(weight.codes, (0, groups * weight.group - columns)).view(rows, groups, weight.group)
    return F.pad(codes, (0, group - weight.group)).reshape(rows, groups * group), weight.scales, group


def _padded_bias(bias: Tensor | None, multiple: int) -> Tensor | None:
    return None if bias is None else F.pad(bias.float(), (0, -bias.shape[0] % multiple)).contiguous()


def weight_bytes(weights: Sequence[SmallWeight | LargeWeight]) -> int:
    """Bytes of these weights, scales and biases included."""
    total = 0
    for one in weights:
        matrix = one.tiles if isinstance(one, SmallWeight) else one.rows
        for tensor in (matrix, one.scales, one.bias):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total

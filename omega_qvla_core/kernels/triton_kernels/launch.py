"""Launching the products: which block sizes, how many shares of K."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from omega_qvla_core.kernels.triton_kernels import large_gemm as large
from omega_qvla_core.kernels.triton_kernels import numerics
from omega_qvla_core.kernels.triton_kernels import small_gemm as small
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT, round_up
from omega_qvla_core.kernels.triton_kernels.weights import FLOAT_BITS, LargeWeight, SmallWeight

MIN_TOKENS = 16
"""Fewest tokens of a block: the narrowest side that every GPU's int8 product takes."""
MOST_SMALL_TOKENS = 64
"""A weight that more tokens share is read through ``large_gemm``."""
_PROGRAMS = 256
"""Programs that fill the GPUs this is for: two for each of an H100's 132 multiprocessors, to hide latency."""
_MOST_SHARES = 8
_MOST_NUMBERS = 2**31
"""What a 32-bit offset reaches."""
_DESCRIBED_BYTES = 16
"""Alignment that a tensor descriptor wants (CUDA driver API, ``cuTensorMapEncodeTiled``)."""
_HELD_TILES = 4
"""Tiles that a program has registers for besides its sums."""


def token_block(tokens: int) -> int:
    """Tokens of a block of ``small_gemm``: 16, 32 or 64."""
    return min(max(triton.next_power_of_2(tokens), MIN_TOKENS), MOST_SMALL_TOKENS)


def padded_tokens(tokens: int) -> int:
    """Rows that buffers of that many tokens need."""
    return round_up(tokens, token_block(tokens))


def shares(weight: SmallWeight, whole: bool = False) -> int:
    """Shares of K that fill the GPU; each is a whole number of integer sums.

    Args:
        weight: The weight.
        whole: Whether programs own all row tiles of a gated weight, not the gate's only.
    """
    units = weight.blocks if weight.groups == 1 else weight.groups
    wanted = max(1, _PROGRAMS // (weight.tiles.shape[0] if whole else weight.row_tiles))
    return max(share for share in (1, 2, 4, _MOST_SHARES) if share <= min(wanted, units))


@dataclass(frozen=True)
class Joining:
    """Where programs of one tile leave their shares of a product for the last of them to add up.

    Attributes:
        scratch: float32, at least ``numbers(weight, tokens)``.
        counter: int32, zeros, at least one per tile and block of tokens.
    """

    scratch: Tensor
    counter: Tensor

    @staticmethod
    def numbers(weight: SmallWeight, tokens: int) -> int:
        """Room in ``scratch`` for a product with that many padded tokens."""
        return shares(weight) * weight.tiles.shape[0] * BLOCK_OUT * tokens


def small_linear(
    x: Tensor,
    sx: Tensor | None,
    weight: SmallWeight,
    out: Tensor,
    epilogue: int = small.STORE,
    *,
    activation: int = numerics.GELU,
    joining: Joining | None = None,
    stages: int = 4,
    early: bool = False,
) -> None:
    """``out = x W^T`` for up to a few blocks of tokens.

    Args:
        x: int8 codes (bfloat16 for such a weight) ``[T padded, columns]``.
        sx: float32 ``[G, T padded]``, or ``[1, T padded]``; None for bfloat16.
        weight: The weight.
        out: ``[T padded, O padded]``; ``[shares, T padded, O padded]`` for PARTIAL; int32 ``[G, ...]`` for SUMS.
        epilogue: See ``small_gemm``.
        activation: Of GATED and ACTIVATED: see ``numerics.activate``.
        joining: To cut K into shares where that fills the GPU; None to let one program have all of K. Not for PARTIAL.
        stages: Loads in flight.
        early: See ``numerics.begin``.
    """
    tokens = x.shape[0]
    block = token_block(tokens)
    groups, blocks = weight.groups, weight.blocks
    count = out.shape[0] if epilogue == small.PARTIAL else 1 if joining is None else shares(weight)
    if epilogue == small.SUMS:
        count, unit, units = groups, blocks // groups, 1
    elif groups == 1:
        unit, units = triton.cdiv(blocks, count), 1
    else:
        unit, units = blocks // groups, triton.cdiv(groups, count)
    scaled = weight.bits != FLOAT_BITS
    spare = out
    way = _way(weight, epilogue, count, unit, units, block)
    owned = weight.tiles.shape[0] if epilogue == small.PARTIAL else weight.row_tiles
    small.small_gemm[(owned // way.tiles, count, tokens // block)](
        x,
        sx if scaled else spare,
        weight.tiles,
        weight.scales if scaled else spare,
        spare if weight.bias is None else weight.bias,
        out,
        spare if joining is None else joining.scratch,
        spare if joining is None else joining.counter,
        tokens,
        out.shape[-1],
        blocks,
        x.stride(0),
        sx.stride(0) if scaled and sx.shape[0] > 1 else 0,
        weight.gate_tiles,
        TILES=way.tiles,
        BLOCK_TOKENS=block,
        BLOCK_IN=weight.block_in,
        BITS=weight.bits,
        UNIT=unit,
        UNITS=units,
        GROUPS=groups,
        SCALED=scaled,
        EPILOGUE=epilogue,
        HAS_BIAS=weight.bias is not None,
        ACTIVATION=activation,
        NATIVE=not triton.knobs.runtime.interpret,
        SHARES=1 if joining is None or epilogue in (small.PARTIAL, small.SUMS) else count,
        STAGES=stages,
        HELD=way.held,
        TOGETHER=way.together,
        AHEAD=way.together > 1 and way.tiles == 1,
        EARLY=early,
        num_warps=way.warps,
        **launch_options(early),
    )


@dataclass(frozen=True)
class _Way:
    """How a program of ``small_gemm`` goes through its share of K."""

    tiles: int = 1
    held: bool = False
    together: int = 1
    warps: int = 4


def _way(weight: SmallWeight, epilogue: int, count: int, unit: int, units: int, tokens: int) -> _Way:
    """The fastest way of those that were tried on an H100 for 10 and 50 tokens, 1024 to 4096 columns, groups of 64.

    Args:
        weight: The weight.
        epilogue: See ``small_gemm``.
        count: Shares of K.
        unit: Tiles per integer sum.
        units: Integer sums per program.
        tokens: Of a program.
    """
    if epilogue != small.PARTIAL:
        return _Way()
    owned, even = weight.tiles.shape[0], count * unit * units == weight.blocks
    # Two tiles per program where that still fills the GPU: codes are read half as often.
    pair = owned % 2 == 0 and owned * count >= _PROGRAMS
    grouped = weight.bits != FLOAT_BITS and unit == 1 and weight.groups > 1
    wide = tokens >= MOST_SMALL_TOKENS and weight.block_in == BLOCK_OUT
    together = 2 if grouped and even and units % 2 == 0 and wide else 1
    if even and not pair and unit * units <= _HELD_TILES and (weight.bits > 4 or together == 1):
        return _Way(held=True)
    return _Way(2 if pair else 1, together=together, warps=8 if pair and together > 1 else 4)


def launch_options(early: bool) -> dict[str, bool]:
    """Options of a launch; see ``numerics.begin``."""
    return {"launch_pdl": True} if early else {}


@dataclass(frozen=True)
class Blocks:
    """Block sizes of ``large_gemm``.

    Attributes:
        tokens: Tokens of a tile.
        out: Rows of the weight of a tile, those of gate and up together.
        inner: Columns at a time.
        warps: Of a program.
        stages: Loads in flight.
        swizzle: Token blocks that share a block of outputs.
        resident: Programs per multiprocessor, which take tiles in turn; 0 for a program per tile.
        described: Whether the tensor memory accelerator reads, from compute capability 9.0.
    """

    tokens: int = 128
    out: int = 128
    inner: int = 128
    warps: int = 8
    stages: int = 3
    swizzle: int = 8
    resident: int = 0
    described: bool = False

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product with so many tokens and rows of the weight."""
        return triton.cdiv(tokens, self.tokens) * triton.cdiv(rows, self.out)


def large_linear(
    x: Tensor,
    sx: Tensor | None,
    weight: LargeWeight,
    out: Tensor,
    activation: int = large.NO_ACTIVATION,
    residual: Tensor | None = None,
    blocks: Blocks = Blocks(),
) -> None:
    """``out = activation(x W^T + bias) + residual``.

    Args:
        x: int8 codes (bfloat16 for such a weight) ``[T, columns]``.
        sx: float32 ``[G or 1, T]`` or longer rows; None for bfloat16.
        weight: The weight.
        out: ``[T, O]``.
        activation: See ``large_gemm``; a gated one for a gated weight.
        residual: Of the layout of ``out``; may be ``out``.
        blocks: Block sizes; ``inner`` counts for one scale per row only.

    Raises:
        ValueError: For groups that are neither 64 nor 128 columns nor the row, and see ``require_addressable``.
    """
    tokens, grouped, scaled = x.shape[0], weight.groups > 1, weight.bits != FLOAT_BITS
    inner = (64 if weight.group % 128 else 128) if grouped or weight.bits <= 4 else blocks.inner
    if grouped and weight.group != inner:
        raise ValueError(f"groups of {weight.group} columns are not executed for many tokens; use 64, 128 or rows")
    require_addressable(out)
    tiles = blocks.tiles(tokens, weight.outputs * (2 if weight.gated else 1))
    described = blocks.described and describable(x) and describable(weight.rows)
    columns = inner // 2 if weight.bits <= 4 else inner
    programs = min(tiles, blocks.resident * multiprocessors(x.device)) if blocks.resident else tiles
    large.large_gemm[(programs,)](
        TensorDescriptor.from_tensor(x, [blocks.tokens, columns]) if described else x,
        TensorDescriptor.from_tensor(weight.rows, [blocks.out, columns]) if described else weight.rows,
        sx if scaled else out,
        weight.scales if scaled else out,
        out if weight.bias is None else weight.bias,
        out if residual is None else residual,
        out,
        tokens,
        weight.outputs,
        weight.rows.shape[0],
        tiles,
        weight.columns // inner,
        x.stride(0),
        weight.rows.stride(0),
        sx.stride(0) if scaled and sx.shape[0] > 1 else 0,
        weight.scales.stride(0) if scaled else 0,
        out.stride(0),
        BLOCK_TOKENS=blocks.tokens,
        BLOCK_OUT=blocks.out,
        BLOCK_IN=inner,
        BITS=weight.bits,
        GROUPED=grouped,
        SCALED=scaled,
        ACTIVATION=activation,
        HAS_BIAS=weight.bias is not None,
        HAS_RESIDUAL=residual is not None,
        SWIZZLE=blocks.swizzle,
        STAGES=blocks.stages,
        DESCRIBED=described,
        RESIDENT=blocks.resident > 0,
        num_warps=blocks.warps,
    )


def require_addressable(*rows: Tensor) -> None:
    """Raise ``ValueError`` for rows that 32-bit offsets do not reach: 2^31 numbers or more from first to last."""
    for one in rows:
        if one.shape[-2] * one.stride(-2) >= _MOST_NUMBERS:
            raise ValueError(f"{one.shape[-2]} rows, {one.stride(-2)} numbers apart, are too many for 32-bit offsets")


def describable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read rows of a matrix: it wants them at multiples of 16 bytes."""
    stride = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and stride % _DESCRIBED_BYTES == 0 and matrix.data_ptr() % _DESCRIBED_BYTES == 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU. Triton's interpreter is told of two, so that a program there has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def partial_buffer(weight: SmallWeight, tokens: int, device: torch.device | str) -> Tensor:
    """float32 ``[shares, T padded, O padded]``."""
    return torch.zeros(shares(weight), tokens, weight.row_tiles * BLOCK_OUT, device=device)

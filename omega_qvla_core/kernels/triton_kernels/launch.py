"""Launching the products: which block sizes, how many shares of K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

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
_SHORT_SHARE = 8
"""Integer sums of a share up to which narrow programs are faster; see ``tuning.Tuning.small_warps``."""


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
    warps: int = 4,
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
        warps: Of a program of PARTIAL with codes, one tile of rows and a short share; others have 4.
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
    owned = weight.tiles.shape[0] if epilogue == small.PARTIAL else weight.row_tiles
    # Two tiles per program where that still fills the GPU: codes are read half as often.
    pair = epilogue == small.PARTIAL and owned % 2 == 0 and owned * count >= _PROGRAMS
    small.small_gemm[(owned // 2 if pair else owned, count, tokens // block)](
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
        TILES=2 if pair else 1,
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
        EARLY=early,
        num_warps=warps if scaled and epilogue == small.PARTIAL and not pair and units * unit <= _SHORT_SHARE else 4,
        **launch_options(early),
    )


def launch_options(early: bool) -> dict[str, bool]:
    """Options of a launch; see ``numerics.begin``."""
    return {"launch_pdl": True} if early else {}


@dataclass(frozen=True)
class Blocks:
    """Block sizes of ``large_gemm``."""

    tokens: int = 128
    out: int = 128
    inner: int = 128
    warps: int = 8
    stages: int = 3
    swizzle: int = 8


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
    """
    tokens, grouped, scaled = x.shape[0], weight.groups > 1, weight.bits != FLOAT_BITS
    inner = (64 if weight.group % 128 else 128) if grouped or weight.bits <= 4 else blocks.inner
    if grouped and weight.group != inner:
        raise ValueError(f"groups of {weight.group} columns are not executed for many tokens; use 64, 128 or rows")
    grid = (triton.cdiv(tokens, blocks.tokens) * triton.cdiv(weight.outputs, blocks.out),)
    large.large_gemm[grid](
        x,
        sx if scaled else out,
        weight.rows,
        weight.scales if scaled else out,
        out if weight.bias is None else weight.bias,
        out if residual is None else residual,
        out,
        tokens,
        weight.outputs,
        weight.columns // inner,
        x.stride(0),
        weight.rows.stride(0),
        sx.stride(0) if scaled and sx.shape[0] > 1 else 0,
        weight.scales.stride(0) if scaled else 0,
        out.stride(0),
        weight.gate_rows,
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
        num_warps=blocks.warps,
    )


def partial_buffer(weight: SmallWeight, tokens: int, device: torch.device | str) -> Tensor:
    """float32 ``[shares, T padded, O padded]``."""
    return torch.zeros(shares(weight), tokens, weight.row_tiles * BLOCK_OUT, device=device)

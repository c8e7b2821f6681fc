"""Products with many tokens: the language tower's prefix and the vision tower.

A tile is ``BLOCK_TOKENS`` tokens by ``BLOCK_OUT`` rows of the weight. Codes are int8, sums exact 32-bit integers; with
one scale per token and per row all of K is one sum, with group scales (GROUPED) the sum is added in float32 after every
group. Weights lie as int8 ``[O, K]`` rows, or as 4-bit rows ``[O, K / 2]`` of nibble planes. In a gated weight the rows
of gate and up take turns, so that one product reads its input once and leaves both in neighbouring registers. bfloat16
runs through the same kernel, as the equally fused comparison.

With DESCRIBED, ``x`` and ``w`` are tensor descriptors, which the tensor memory accelerator reads (compute capability
9.0); else they are pointers. With RESIDENT there are fewer programs than tiles, and a program takes several in turn:
the loads of the next tile run while the last one is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import gelu_tanh, silu

NO_ACTIVATION, GELU, GATED_GELU, GATED_SILU = 0, 1, 2, 3


@triton.jit
def _block(source, row, column, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """``[ROWS, COLUMNS]`` of a matrix. What is read past its last row is never written."""
    if DESCRIBED:
        block = source.load([row, column])
    else:
        line = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        block = tl.load(source + line[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :])
    return block


@triton.jit
def _multiply(
    acc, x, w, token, row, block, tokens, w_rows, x_stride, w_stride, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BITS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add the products of one block of K."""
    if BITS <= 4:
        half: tl.constexpr = BLOCK_IN // 2
        packed = _block(w, row, block * half, w_rows, w_stride, BLOCK_OUT, half, DESCRIBED)
        first = _block(x, token, block * BLOCK_IN, tokens, x_stride, BLOCK_TOKENS, half, DESCRIBED)
        second = _block(x, token, block * BLOCK_IN + half, tokens, x_stride, BLOCK_TOKENS, half, DESCRIBED)
        acc = tl.dot(first, tl.trans((packed << 4) >> 4), acc, out_dtype=acc.dtype)
        acc = tl.dot(second, tl.trans(packed >> 4), acc, out_dtype=acc.dtype)
    else:
        codes = _block(x, token, block * BLOCK_IN, tokens, x_stride, BLOCK_TOKENS, BLOCK_IN, DESCRIBED)
        weights = _block(w, row, block * BLOCK_IN, w_rows, w_stride, BLOCK_OUT, BLOCK_IN, DESCRIBED)
        acc = tl.dot(codes, tl.trans(weights), acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _finish(
    y, token, row, bias_ptr, residual_ptr, out_ptr, tokens, outputs, out_stride, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, activation, gate and residual of a tile ``[BLOCK_TOKENS, BLOCK_OUT]``, float32."""
    gated: tl.constexpr = ACTIVATION >= 2
    lines = outputs * 2 if gated else outputs
    width: tl.constexpr = BLOCK_OUT // 2 if gated else BLOCK_OUT
    if HAS_BIAS:
        rows = row + tl.arange(0, BLOCK_OUT)
        y += tl.load(bias_ptr + rows, mask=rows < lines, other=0.0)[None, :]
    if gated:
        y, up = tl.split(tl.reshape(y, (BLOCK_TOKENS, width, 2)))
        row = row // 2
    if ACTIVATION == 1:
        y = gelu_tanh(y)
    if ACTIVATION == 2:
        y = gelu_tanh(y) * up
    if ACTIVATION == 3:
        y = silu(y) * up
    rows = token + tl.arange(0, BLOCK_TOKENS)
    columns = row + tl.arange(0, width)
    inside = (rows < tokens)[:, None] & (columns < outputs)[None, :]
    place = rows[:, None] * out_stride + columns[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(
    tile, x, w, sx_ptr, sw_ptr, bias_ptr, residual_ptr, out_ptr, tokens, outputs, w_rows, blocks, x_stride, w_stride,
    sx_stride, sw_stride, out_stride, BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BITS: tl.constexpr, GROUPED: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, SWIZZLE: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share weights: SWIZZLE token blocks take turns on one block of outputs.
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    span = SWIZZLE * tl.cdiv(outputs * 2 if ACTIVATION >= 2 else outputs, BLOCK_OUT)
    band = tile // span
    height = tl.minimum(token_blocks - band * SWIZZLE, SWIZZLE)
    token = (band * SWIZZLE + (tile % span) % height) * BLOCK_TOKENS
    row = ((tile % span) // height) * BLOCK_OUT
    kind: tl.constexpr = tl.int32 if BITS <= 8 else tl.float32
    acc = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=kind)
    if GROUPED:
        tokens_here = token + tl.arange(0, BLOCK_TOKENS)
        y = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
        for block in tl.range(0, blocks, num_stages=STAGES):
            # One block of K is one group.
            sums = _multiply(
                acc, x, w, token, row, block, tokens, w_rows, x_stride, w_stride, BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN,
                BITS, DESCRIBED,
            )  # fmt: skip
            sx = tl.load(sx_ptr + block * sx_stride + tokens_here, mask=tokens_here < tokens, other=0.0)[:, None]
            y += sums.to(tl.float32) * sx * tl.load(sw_ptr + block * sw_stride + row + tl.arange(0, BLOCK_OUT))[None, :]
    else:
        for block in tl.range(0, blocks, num_stages=STAGES):
            acc = _multiply(
                acc, x, w, token, row, block, tokens, w_rows, x_stride, w_stride, BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN,
                BITS, DESCRIBED,
            )  # fmt: skip
        y = acc.to(tl.float32)
        if SCALED:
            tokens_here = token + tl.arange(0, BLOCK_TOKENS)
            sx = tl.load(sx_ptr + tokens_here, mask=tokens_here < tokens, other=0.0)[:, None]
            y = y * sx * tl.load(sw_ptr + row + tl.arange(0, BLOCK_OUT))[None, :]
    _finish(
        y, token, row, bias_ptr, residual_ptr, out_ptr, tokens, outputs, out_stride, BLOCK_TOKENS, BLOCK_OUT,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def large_gemm(
    x,  # [T, K padded]
    w,  # [rows padded, K padded], int4: [rows padded, K padded / 2]
    sx_ptr,  # float32 [G or 1, T padded]
    sw_ptr,  # float32 [G, rows padded]
    bias_ptr,  # float32 [rows]
    residual_ptr,  # [T, out_stride]
    out_ptr,  # [T, out_stride], fewer than 2^31 numbers
    tokens,
    outputs,  # columns of out: half of the rows of a gated weight
    w_rows,  # with padding
    tiles,
    blocks,  # BLOCK_IN columns each
    x_stride,
    w_stride,
    sx_stride,  # 0 if there is one scale per token
    sw_stride,
    out_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,  # one block of K is one group
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SWIZZLE: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    if RESIDENT:
        # Flattened, the compiler's pipeline of loads goes on from one tile to the next.
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x, w, sx_ptr, sw_ptr, bias_ptr, residual_ptr, out_ptr, tokens, outputs, w_rows, blocks, x_stride,
                w_stride, sx_stride, sw_stride, out_stride, BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN, BITS, GROUPED, SCALED,
                ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SWIZZLE, STAGES, DESCRIBED,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, w, sx_ptr, sw_ptr, bias_ptr, residual_ptr, out_ptr, tokens, outputs, w_rows, blocks,
            x_stride, w_stride, sx_stride, sw_stride, out_stride, BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN, BITS, GROUPED,
            SCALED, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, SWIZZLE, STAGES, DESCRIBED,
        )  # fmt: skip

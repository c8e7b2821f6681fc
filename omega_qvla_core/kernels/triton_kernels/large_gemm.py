"""Products with many tokens: the language tower's prefix and the vision tower.

A program owns ``BLOCK_TOKENS`` tokens by ``BLOCK_OUT`` outputs. Codes are int8, sums exact 32-bit integers; with one
scale per token and per row all of K is one sum (``GROUPS`` 1), with group scales the sum is added in float32 after
every group. Weights lie as int8 ``[O, K]`` rows, or as 4-bit rows ``[O, K / 2]`` of nibble planes. A gated product has
two weights and reads its input once. bfloat16 runs through the same kernel, as the equally fused comparison.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import gelu_tanh, silu

NO_ACTIVATION, GELU, GATED_GELU, GATED_SILU = 0, 1, 2, 3


@triton.jit
def _multiply(acc, x_place, w_place, BLOCK_IN: tl.constexpr, BITS: tl.constexpr):
    if BITS <= 4:
        half: tl.constexpr = BLOCK_IN // 2
        packed = tl.load(w_place)
        low = (packed << 4) >> 4
        acc = tl.dot(tl.load(x_place), tl.trans(low), acc, out_dtype=acc.dtype)
        acc = tl.dot(tl.load(x_place + half), tl.trans(packed >> 4), acc, out_dtype=acc.dtype)
    else:
        acc = tl.dot(tl.load(x_place), tl.trans(tl.load(w_place)), acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def large_gemm(
    x_ptr,  # [T, K padded]
    sx_ptr,  # float32 [G or 1, T padded]
    w_ptr,  # [O padded, K padded], int4: [O padded, K padded / 2]
    sw_ptr,  # float32 [G, O padded]
    bias_ptr,  # float32 [O]
    residual_ptr,  # [T, out_stride]
    out_ptr,  # [T, out_stride]
    tokens,
    outputs,
    blocks,  # BLOCK_IN columns each
    x_stride,
    w_stride,
    sx_stride,  # 0 if there is one scale per token
    sw_stride,
    out_stride,
    gate_rows,  # rows from a gate's row to its up row
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
):
    # Programs that run at the same time share weights: SWIZZLE token blocks take turns on one block of outputs.
    pid = tl.program_id(0)
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    out_blocks = tl.cdiv(outputs, BLOCK_OUT)
    span = SWIZZLE * out_blocks
    band = pid // span
    height = tl.minimum(token_blocks - band * SWIZZLE, SWIZZLE)
    token_block = band * SWIZZLE + (pid % span) % height
    out_block = (pid % span) // height
    gated: tl.constexpr = ACTIVATION >= 2
    integer: tl.constexpr = BITS <= 8
    kind: tl.constexpr = tl.int32 if integer else tl.float32
    x_columns: tl.constexpr = BLOCK_IN // 2 if BITS <= 4 else BLOCK_IN
    token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, x_columns)
    # Reads past the last token repeat it; they are never written.
    x_place = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_place = w_ptr + out.to(tl.int64)[:, None] * w_stride + inner[None, :]
    up = gate_rows.to(tl.int64) * w_stride
    acc = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=kind)
    acc_up = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=kind)
    y = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    y_up = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        xs = x_place + block * BLOCK_IN
        ws = w_place + block * x_columns
        if GROUPED:
            sx = tl.load(sx_ptr + block * sx_stride + token, mask=token < tokens, other=0.0)[:, None]
            scales = sw_ptr + block * sw_stride + out
            zero = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=kind)
            y += _multiply(zero, xs, ws, BLOCK_IN, BITS).to(tl.float32) * sx * tl.load(scales)[None, :]
            if gated:
                product = _multiply(zero, xs, ws + up, BLOCK_IN, BITS).to(tl.float32)
                y_up += product * sx * tl.load(scales + gate_rows)[None, :]
        else:
            acc = _multiply(acc, xs, ws, BLOCK_IN, BITS)
            if gated:
                acc_up = _multiply(acc_up, xs, ws + up, BLOCK_IN, BITS)
    if not GROUPED:
        y = acc.to(tl.float32)
        y_up = acc_up.to(tl.float32)
        if SCALED:
            sx = tl.load(sx_ptr + token, mask=token < tokens, other=0.0)[:, None]
            y = y * sx * tl.load(sw_ptr + out)[None, :]
            if gated:
                y_up = y_up * sx * tl.load(sw_ptr + gate_rows + out)[None, :]
    inside = (token < tokens)[:, None] & (out < outputs)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < outputs, other=0.0)[None, :]
    if ACTIVATION == 1:
        y = gelu_tanh(y)
    if ACTIVATION == 2:
        y = gelu_tanh(y) * y_up
    if ACTIVATION == 3:
        y = silu(y) * y_up
    place = token.to(tl.int64)[:, None] * out_stride + out[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)

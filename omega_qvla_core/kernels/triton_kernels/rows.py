"""What happens to one token between two products: residual, norm, rotation, codes; one program per token.

A row of K columns lies in registers as ``[BLOCKS, 64]``: a line is one rotation block and, for a scale per token and
64 columns, one scale's values. The rotation is one product of that tile with a 64 x 64 matrix (Hadamard; the short last
block of a width that 64 does not divide has a matrix of its own). Smoothing and the norm's own weight are folded into
the factors ``mul`` and ``add`` before the kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import round_half_even

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
FLOATS, TOKEN, TOKEN_GROUP = 0, 1, 2


@triton.jit
def emit_row(
    v,
    columns,
    token,
    rotation_ptr,
    tail_ptr,
    factor_ptr,
    out_ptr,
    scale_ptr,
    scale_stride,
    width,
    out_stride,
    BLOCKS: tl.constexpr,
    ROTATE: tl.constexpr,
    TAIL: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Rotate ``v`` [BLOCKS, 64] and write it as bfloat16, or as codes with their scales."""
    inside = columns < width
    if ROTATE:
        side = tl.arange(0, 64)
        matrix = side[:, None] * 64 + side[None, :]
        rotated = tl.dot(v, tl.load(rotation_ptr + matrix), input_precision="tf32")
        if TAIL:
            last = tl.arange(0, BLOCKS)[:, None] == width // 64
            rotated = tl.where(last, tl.dot(v, tl.load(tail_ptr + matrix), input_precision="tf32"), rotated)
        v = rotated
    if CODES == 0:
        tl.store(out_ptr + token.to(tl.int64) * out_stride + columns, v.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        lines: tl.constexpr = BLOCKS * 64 // GROUP
        v = tl.reshape(v, (lines, GROUP))
        line = tl.arange(0, lines)
        places = line[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        used = line * GROUP < width
        # A value that is not finite must show: it makes the scale not a number.
        poison = tl.sum(v * 0.0, axis=1)
        peak = tl.max(tl.abs(v), axis=1)
        if CODES == 1:
            peak = tl.zeros_like(peak) + tl.max(peak, axis=0)
            poison = tl.zeros_like(poison) + tl.sum(poison, axis=0)
            factor = tl.zeros_like(peak) + tl.load(factor_ptr)
            used = line == 0
        else:
            factor = tl.load(factor_ptr + line, mask=used, other=1.0)
        scale = tl.maximum(peak * factor, 1e-12)
        codes = round_half_even(v * (1.0 / scale)[:, None])
        codes = tl.minimum(tl.maximum(codes, -HIGH - 1.0), HIGH * 1.0)
        place = out_ptr + token.to(tl.int64) * out_stride + places
        tl.store(place, codes.to(tl.int8), mask=places < width)
        tl.store(scale_ptr + line * scale_stride + token, scale + poison, mask=used)


@triton.jit
def norm_rows(
    x_ptr,  # float32 or bfloat16 [T, K]; the sum with the parts is written back
    parts_ptr,  # float32 [PARTS, T padded, K]: shares of the product that is added to x
    gate_ptr,  # float32 [K]: multiplies that product
    mul_ptr,  # float32 [K]
    add_ptr,  # float32 [K]
    rotation_ptr,
    tail_ptr,
    factor_ptr,
    out_ptr,  # codes int8 or bfloat16 [T, out_stride]
    scale_ptr,  # float32 [G or 1, T padded]
    tokens_padded,
    parts_stride,  # numbers per row of the parts
    width,
    x_stride,
    out_stride,
    eps,
    scale_stride,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ROTATE: tl.constexpr,
    TAIL: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    HIGH: tl.constexpr,
):
    """``x += gate * sum(parts)``, then ``norm(x) * mul + add``, rotated and coded. Without norm: ``x * mul + add``."""
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = columns < width
    place = x_ptr + token.to(tl.int64) * x_stride + columns
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        update = tl.zeros_like(x)
        for part in tl.static_range(PARTS):
            part_place = parts_ptr + (part * tokens_padded + token).to(tl.int64) * parts_stride + columns
            update += tl.load(part_place, mask=inside, other=0.0)
        if GATED:
            update = update * tl.load(gate_ptr + columns, mask=inside, other=0.0)
        x += update
        tl.store(place, x.to(x_ptr.dtype.element_ty), mask=inside)
    v = x
    if NORM == 2:
        mean = tl.sum(tl.sum(x, axis=1), axis=0) / width
        v = tl.where(inside, x - mean, 0.0)
    if NORM > 0:
        v = v * (1.0 / tl.sqrt_rn(tl.sum(tl.sum(v * v, axis=1), axis=0) / width + eps))
    if HAS_MUL:
        v = v * tl.load(mul_ptr + columns, mask=inside, other=0.0)
    if HAS_ADD:
        v = v + tl.load(add_ptr + columns, mask=inside, other=0.0)
    emit_row(
        v, columns, token, rotation_ptr, tail_ptr, factor_ptr, out_ptr, scale_ptr, scale_stride, width, out_stride,
        BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip


@triton.jit
def merge_rows(
    parts_ptr,  # float32 [SPLITS, rows padded, head_dim]: sums of exp(score - peak) * value
    peak_ptr,  # float32 [SPLITS, rows padded]
    total_ptr,  # float32 [SPLITS, rows padded]
    mul_ptr,
    rotation_ptr,
    tail_ptr,
    factor_ptr,
    out_ptr,
    scale_ptr,
    rows_padded,
    scale_stride,
    width,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_MUL: tl.constexpr,
    ROTATE: tl.constexpr,
    TAIL: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Join the shares of split attention, token by token (row = token * HEADS + head; HEAD_DIM a multiple of 64)."""
    token = tl.program_id(0)
    line = tl.arange(0, BLOCKS)
    columns = line[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = columns < width
    line_inside = line * 64 < width
    row = token * HEADS + line * 64 // HEAD_DIM
    peak = tl.zeros((BLOCKS,), dtype=tl.float32) - float("inf")
    for split in tl.static_range(SPLITS):
        peak = tl.maximum(peak, tl.load(peak_ptr + split * rows_padded + row, mask=line_inside, other=0.0))
    total = tl.zeros((BLOCKS,), dtype=tl.float32)
    mixed = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        share_row = split * rows_padded + row
        weight = tl.exp(tl.load(peak_ptr + share_row, mask=line_inside, other=0.0) - peak)
        total += weight * tl.load(total_ptr + share_row, mask=line_inside, other=1.0)
        place = parts_ptr + share_row.to(tl.int64)[:, None] * HEAD_DIM + columns % HEAD_DIM
        mixed += weight[:, None] * tl.load(place, mask=inside, other=0.0)
    v = mixed / total[:, None]
    if HAS_MUL:
        v = v * tl.load(mul_ptr + columns, mask=inside, other=0.0)
    emit_row(
        v, columns, token, rotation_ptr, tail_ptr, factor_ptr, out_ptr, scale_ptr, scale_stride, width, out_stride,
        BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip

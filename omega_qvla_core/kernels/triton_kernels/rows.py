"""What happens to one token between two products: residual, norm, rotation, codes; one program per token.

A row of K columns lies in registers as ``[BLOCKS, 64]``: a line is one rotation block and, for a scale per token and
64 columns, one scale's values. The rotation is Hadamard's; the short last
block of a width that 64 does not divide has a matrix of its own. Smoothing and the norm's own weight are folded into
the factors ``mul`` and ``add`` before the kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import activate, begin, rotate_lines, round_half_even

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
FLOATS, TOKEN, TOKEN_GROUP = 0, 1, 2


@triton.jit
def read_factors(factor_ptr, width, BLOCKS: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr):
    """What peaks are multiplied with to give scales: a number for TOKEN, one per group for TOKEN_GROUP."""
    factors = 0.0
    if CODES == 1:
        factors = tl.load(factor_ptr)
    if CODES == 2:
        line = tl.arange(0, BLOCKS * 64 // GROUP)
        factors = tl.load(factor_ptr + line, mask=line * GROUP < width, other=1.0)
    return factors


@triton.jit
def emit_row(
    v,
    columns,
    token,
    tail_ptr,
    factors,
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
    """Rotate ``v`` [BLOCKS, 64] and write it as bfloat16, or as codes with their scales; see ``read_factors``."""
    inside = columns < width
    if ROTATE:
        rotated = rotate_lines(v, BLOCKS)
        if TAIL:
            side = tl.arange(0, 64)
            matrix = side[:, None] * 64 + side[None, :]
            last = tl.arange(0, BLOCKS)[:, None] == width // 64
            rotated = tl.where(last, tl.dot(v, tl.load(tail_ptr + matrix), input_precision="ieee"), rotated)
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
            used = line == 0
        scale = tl.maximum(peak * factors, 1e-12)
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
    tail_ptr,
    factor_ptr,
    out_ptr,  # codes int8 or bfloat16 [T, out_stride]
    scale_ptr,  # float32 [G or 1, T padded]
    part_stride,  # numbers from one share to the next
    parts_stride,  # numbers per row of a share
    width,
    x_stride,
    out_stride,
    eps,
    scale_stride,
    BLOCKS: tl.constexpr,
    HAS_X: tl.constexpr,
    SETTLED: tl.constexpr,
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
    EARLY: tl.constexpr,
):
    """``x += gate * sum(parts)``, then ``norm(x) * mul + add``, rotated and coded. Without norm: ``x * mul + add``.

    Without HAS_X x is zero, and the sum is not kept. SETTLED says that the kernel before does not write x.
    """
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = columns < width
    place = x_ptr + token.to(tl.int64) * x_stride + columns
    x = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    # What the kernel before does not write is read before it has ended; see ``numerics.begin``.
    factors = read_factors(factor_ptr, width, BLOCKS, CODES, GROUP)
    if HAS_MUL:
        mul = tl.load(mul_ptr + columns, mask=inside, other=0.0)
    if HAS_ADD:
        add = tl.load(add_ptr + columns, mask=inside, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0)
    if HAS_X and SETTLED:
        # Past the L1 cache, where an older kernel on this multiprocessor may have left the row as it was.
        x = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    begin(EARLY)
    if HAS_X and not SETTLED:
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        update = tl.zeros_like(x)
        for part in tl.static_range(PARTS):
            part_place = parts_ptr + part * part_stride + token.to(tl.int64) * parts_stride + columns
            update += tl.load(part_place, mask=inside, other=0.0)
        if GATED:
            update = update * gate
        x += update
    if PARTS > 0 and HAS_X:
        tl.store(place, x.to(x_ptr.dtype.element_ty), mask=inside)
    v = x
    if NORM == 2:
        mean = tl.sum(tl.sum(x, axis=1), axis=0) / width
        v = tl.where(inside, x - mean, 0.0)
    if NORM > 0:
        v = v * (1.0 / tl.sqrt_rn(tl.sum(tl.sum(v * v, axis=1), axis=0) / width + eps))
    if HAS_MUL:
        v = v * mul
    if HAS_ADD:
        v = v + add
    emit_row(
        v, columns, token, tail_ptr, factors, out_ptr, scale_ptr, scale_stride, width, out_stride,
        BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip


@triton.jit
def merge_rows(
    parts_ptr,  # float32 [SPLITS, rows padded, head_dim]: sums of exp(score - peak) * value
    peak_ptr,  # float32 [SPLITS, rows padded]
    total_ptr,  # float32 [SPLITS, rows padded]
    mul_ptr,
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
    EARLY: tl.constexpr,
):
    """Join the shares of split attention, token by token (row = token * HEADS + head), and code the result."""
    token = tl.program_id(0)
    line = tl.arange(0, BLOCKS)
    columns = line[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = columns < width
    factors = read_factors(factor_ptr, width, BLOCKS, CODES, GROUP)
    if HAS_MUL:
        mul = tl.load(mul_ptr + columns, mask=inside, other=0.0)
    begin(EARLY)
    if HEAD_DIM % 64 == 0:
        # A line lies in one head, and has one peak and one total.
        row = (token * HEADS + line * 64 // HEAD_DIM)[:, None]
        row_inside = (line * 64 < width)[:, None]
    else:
        row = token * HEADS + columns // HEAD_DIM
        row_inside = inside
    peak = tl.zeros_like(row).to(tl.float32) - float("inf")
    for split in tl.static_range(SPLITS):
        peak = tl.maximum(peak, tl.load(peak_ptr + split * rows_padded + row, mask=row_inside, other=0.0))
    total = tl.zeros_like(peak)
    mixed = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        share_row = split * rows_padded + row
        weight = tl.exp(tl.load(peak_ptr + share_row, mask=row_inside, other=0.0) - peak)
        total += weight * tl.load(total_ptr + share_row, mask=row_inside, other=1.0)
        place = parts_ptr + share_row.to(tl.int64) * HEAD_DIM + columns % HEAD_DIM
        mixed += weight * tl.load(place, mask=inside, other=0.0)
    v = mixed / total
    if HAS_MUL:
        v = v * mul
    emit_row(
        v, columns, token, tail_ptr, factors, out_ptr, scale_ptr, scale_stride, width, out_stride,
        BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip


@triton.jit
def merge_heads(
    parts_ptr,  # as merge_rows
    peak_ptr,
    total_ptr,
    mul_ptr,
    factor_ptr,
    out_ptr,
    scale_ptr,
    rows_padded,
    scale_stride,
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
    EARLY: tl.constexpr,
):
    """``merge_rows`` with a program per token and head, where no scale spans heads: not for CODES 1, and no tail."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = columns < HEAD_DIM
    row = token * HEADS + head
    first = head * HEAD_DIM
    group = first // GROUP
    factors = read_factors(factor_ptr + group, HEAD_DIM, BLOCKS, CODES, GROUP)
    if HAS_MUL:
        mul = tl.load(mul_ptr + first + columns, mask=inside, other=0.0)
    begin(EARLY)
    peak = tl.load(peak_ptr + row)
    for split in tl.static_range(1, SPLITS):
        peak = tl.maximum(peak, tl.load(peak_ptr + split * rows_padded + row))
    total = 0.0
    mixed = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        share_row = split * rows_padded + row
        weight = tl.exp(tl.load(peak_ptr + share_row) - peak)
        total += weight * tl.load(total_ptr + share_row)
        place = parts_ptr + share_row.to(tl.int64) * HEAD_DIM + columns
        mixed += weight * tl.load(place, mask=inside, other=0.0)
    v = mixed / total
    if HAS_MUL:
        v = v * mul
    emit_row(
        v, columns, token, mul_ptr, factors, out_ptr + first, scale_ptr + group * scale_stride, scale_stride,
        HEAD_DIM, out_stride, BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip


@triton.jit
def activate_rows(
    parts_ptr,  # float32 [PARTS, T padded, parts_stride]: columns of the gate, then (GATED) of the up projection
    mul_ptr,  # float32 [K]
    factor_ptr,
    out_ptr,  # codes int8, or numbers, [T, out_stride]
    scale_ptr,
    tokens_padded,
    parts_stride,
    scale_stride,
    width,
    out_stride,
    up_column,  # column of the parts where the up projection starts
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_MUL: tl.constexpr,
    ROTATE: tl.constexpr,
    TAIL: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    HIGH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add up the shares of a product, activate, gate, rotate and code; a program per token and BLOCKS lines.

    No scale spans programs: not for CODES 1, and no tail.
    """
    token = tl.program_id(0)
    first = tl.program_id(1) * (BLOCKS * 64)
    columns = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = first + columns < width
    group = first // GROUP
    factors = read_factors(factor_ptr + group, width - first, BLOCKS, CODES, GROUP)
    if HAS_MUL:
        mul = tl.load(mul_ptr + first + columns, mask=inside, other=0.0)
    begin(EARLY)
    gate = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    up = tl.zeros((BLOCKS, 64), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        place = parts_ptr + (part * tokens_padded + token).to(tl.int64) * parts_stride + first + columns
        gate += tl.load(place, mask=inside, other=0.0)
        if GATED:
            up += tl.load(place + up_column, mask=inside, other=0.0)
    v = activate(gate, ACTIVATION)
    if GATED:
        v = v * up
    if HAS_MUL:
        v = v * mul
    emit_row(
        v, columns, token, mul_ptr, factors, out_ptr + first, scale_ptr + group * scale_stride, scale_stride,
        width - first, out_stride, BLOCKS, ROTATE, TAIL, CODES, GROUP, HIGH,
    )  # fmt: skip

"""Products with few tokens (up to 64): the weight streams once, tokens are the narrow side.

Operands are swapped, ``Y^T = W X^T``: rows of the weight are the tensor cores' M, tokens their N. A program owns
``TILES`` tiles of 64 rows and one share of K; a tile of 4-bit codes is unpacked in registers, which are the A operand
of the product, so that int4 never becomes int8 in memory. A code stays in the upper half of its byte, which multiplies
it and the sum by 16: fewer instructions, and still exact, since the factor is a power of two. Sums are exact 32-bit
integers within a group of columns; scales of token and group, row and group multiply the sum in float32, groups in
ascending order.

What happens to the product is the epilogue: ``STORE`` writes ``[T, O]``; ``PARTIAL`` writes one float32 ``[T, O]`` per
share of K, which the next kernel adds up; else the program of a tile that finishes last does. Both add in a fixed
order, so that the same input gives the same bits. ``ACTIVATED`` writes the activated product; ``GATED`` has two weights
(gate and up) and writes the activated gate times up; ``SUMS`` writes the integers themselves, ``[groups, T, O]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import activate, begin, high_plane, low_plane

STORE, PARTIAL, GATED, SUMS, ACTIVATED = 0, 1, 2, 3, 4


@triton.jit
def _read_x(x_ptr, tokens, block, x_stride, BLOCK_IN: tl.constexpr, BITS: tl.constexpr):
    """Codes or numbers that a tile multiplies, ``[columns, tokens]``: for 4 bits two planes, else the same twice."""
    if BITS <= 4:
        half: tl.constexpr = BLOCK_IN // 2
        place = x_ptr + tokens[None, :] * x_stride + block * BLOCK_IN + tl.arange(0, half)[:, None]
        first = tl.load(place)
        second = tl.load(place + half)
    else:
        first = tl.load(x_ptr + tokens[None, :] * x_stride + block * BLOCK_IN + tl.arange(0, BLOCK_IN)[:, None])
        second = first
    return first, second


@triton.jit
def _multiply(acc, weights, first, second, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Add the products of one tile."""
    if BITS <= 4:
        acc = tl.dot(low_plane(weights, NATIVE), first, acc, out_dtype=acc.dtype)
        acc = tl.dot(high_plane(weights, NATIVE), second, acc, out_dtype=acc.dtype)
    else:
        acc = tl.dot(weights, first, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _products(
    acc, weights, x_ptr, tokens, block, x_stride, BLOCK_IN: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr
):
    """Add the products of one tile whose codes are read here."""
    first, second = _read_x(x_ptr, tokens, block, x_stride, BLOCK_IN, BITS)
    return _multiply(acc, weights, first, second, BITS, NATIVE)


@triton.jit
def _held(
    y, w_place, scale_rows, x_ptr, sx_ptr, tokens, first, x_stride, sx_stride, tile_size: tl.constexpr,
    BLOCK_IN: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
    SCALED: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The share of a program that holds all of its tiles, and their scales, before the kernel before has ended."""
    weights = ()
    sw = ()
    for block in tl.static_range(UNITS * UNIT):
        weights = weights + (tl.load(w_place + (first * UNIT + block) * tile_size),)
        if SCALED and block % UNIT == 0:
            sw = sw + (tl.load(scale_rows + ((first + block // UNIT) * 64 if GROUPS > 1 else 0)),)
    begin(EARLY)
    gain: tl.constexpr = 0.0625 if BITS <= 4 else 1.0
    acc = tl.zeros(y.shape, dtype=tl.int32 if BITS <= 8 else tl.float32)
    low, high = _read_x(x_ptr, tokens, first * UNIT, x_stride, BLOCK_IN, BITS)
    for block in tl.static_range(UNITS * UNIT):
        now_low, now_high = low, high
        if block + 1 < UNITS * UNIT:
            low, high = _read_x(x_ptr, tokens, first * UNIT + block + 1, x_stride, BLOCK_IN, BITS)
        acc = _multiply(acc, weights[block], now_low, now_high, BITS, NATIVE)
        if SCALED and (block + 1) % UNIT == 0:
            sx = tl.load(sx_ptr + (first + block // UNIT) * sx_stride + tokens) * gain
            y += acc.to(tl.float32) * sx[None, :] * sw[block // UNIT][:, None]
            acc = tl.zeros(y.shape, dtype=acc.dtype)
    if not SCALED:
        y += acc
    return y


@triton.jit
def _scales(place, unit, last, stride, TOGETHER: tl.constexpr):
    """Scales of TOGETHER groups that lie ``stride`` apart; past the last group it is read again."""
    scales = ()
    for more in tl.static_range(TOGETHER):
        scales = scales + (tl.load(place + tl.minimum(unit + more, last) * stride),)
    return scales


@triton.jit
def _together(
    y, w_place, scale_rows, x_ptr, sx_ptr, tokens, first, x_stride, sx_stride, tile_size: tl.constexpr,
    BLOCK_IN: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr, TOGETHER: tl.constexpr, AHEAD: tl.constexpr,
    NATIVE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The share of a program with TOGETHER groups of one tile each per turn of a pipelined loop."""
    gain: tl.constexpr = 0.0625 if BITS <= 4 else 1.0
    last = first + UNITS - 1
    if AHEAD:
        # What the kernel before does not write is read before it has ended; see ``numerics.begin``.
        next_sw = _scales(scale_rows, first, last, 64, TOGETHER)
    begin(EARLY)
    if AHEAD:
        next_sx = _scales(sx_ptr + tokens, first, last, sx_stride, TOGETHER)
    for start in tl.range(first, first + UNITS, TOGETHER, num_stages=STAGES):
        if AHEAD:
            sx, sw = next_sx, next_sw
            next_sx = _scales(sx_ptr + tokens, start + TOGETHER, last, sx_stride, TOGETHER)
            next_sw = _scales(scale_rows, start + TOGETHER, last, 64, TOGETHER)
        sums = ()
        for more in tl.static_range(TOGETHER):
            unit = start + more
            zero = tl.zeros(y.shape, dtype=tl.int32)
            weights = tl.load(w_place + unit * tile_size)
            sums = sums + (_products(zero, weights, x_ptr, tokens, unit, x_stride, BLOCK_IN, BITS, NATIVE),)
        if not AHEAD:
            sx = _scales(sx_ptr + tokens, start, last, sx_stride, TOGETHER)
            sw = _scales(scale_rows, start, last, 64, TOGETHER)
        for more in tl.static_range(TOGETHER):
            y += sums[more].to(tl.float32) * (sx[more] * gain)[None, :] * sw[more][:, None]
    return y


@triton.jit
def _finish(
    y, y_up, tile, share, tokens, bias_ptr, out_ptr, tokens_padded, outputs, BLOCK_OUT: tl.constexpr,
    EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The epilogue: what is done with a finished tile ``[BLOCK_OUT, BLOCK_TOKENS]``."""
    columns = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns)[:, None] * (1.0 if share == 0 else 0.0)
    if EPILOGUE == 2:
        y = activate(y, ACTIVATION) * y_up
    if EPILOGUE == 4:
        y = activate(y, ACTIVATION)
    if EPILOGUE != 3:
        place = out_ptr + (share * tokens_padded + tokens[None, :]) * outputs + columns[:, None]
        tl.store(place, y.to(out_ptr.dtype.element_ty))


@triton.jit
def small_gemm(
    x_ptr,  # codes int8 (or bfloat16) [T, K]
    sx_ptr,  # float32 [G or 1, T]
    w_ptr,  # tiles, see layout.py
    sw_ptr,  # float32 [O / 64, G, 64]
    bias_ptr,  # float32 [O]
    out_ptr,  # [T, O], or float32 [shares, T, O]
    scratch_ptr,  # float32 [tiles, token blocks, SHARES, 1 or 2 (gated), BLOCK_OUT, BLOCK_TOKENS]
    counter_ptr,  # int32 [tiles, token blocks], zeros before and after
    tokens_padded,
    outputs,  # row stride of out
    blocks,  # tiles along K
    x_stride,
    sx_stride,  # 0 if there is one scale per token
    gate_tiles,  # tiles of rows from a gate's row to its up row
    TILES: tl.constexpr,  # tiles of 64 rows per program
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # tiles per integer sum
    UNITS: tl.constexpr,  # integer sums per program
    GROUPS: tl.constexpr,  # scales per row of the weight
    SCALED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NATIVE: tl.constexpr,  # see numerics.low_plane
    SHARES: tl.constexpr,  # shares of K that are joined here; 1 for PARTIAL, whose shares the next kernel joins
    STAGES: tl.constexpr,
    HELD: tl.constexpr,  # see _held
    TOGETHER: tl.constexpr,  # see _together; 1 for another way
    AHEAD: tl.constexpr,  # with TOGETHER: scales are read while the sums before are computed
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    share = tl.program_id(1)
    token_block = tl.program_id(2)
    BLOCK_OUT: tl.constexpr = 64 * TILES
    rows = tl.arange(0, BLOCK_OUT)
    tokens = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_bytes: tl.constexpr = BLOCK_IN // 2 if BITS <= 4 else BLOCK_IN
    tile_size: tl.constexpr = 64 * row_bytes
    # A row's place in its tile of 64, and the tile's: rows of one tile lie side by side, tiles a row of tiles apart.
    inside = ((rows // 64) * blocks * tile_size + (rows % 64) * row_bytes)[:, None] + tl.arange(0, row_bytes)[None, :]
    scale_rows = sw_ptr + (tile * TILES + rows // 64) * (GROUPS * 64) + rows % 64
    gain: tl.constexpr = 0.0625 if BITS <= 4 else 1.0
    integer: tl.constexpr = BITS <= 8
    kind: tl.constexpr = tl.int32 if integer else tl.float32
    gated: tl.constexpr = EPILOGUE == 2
    y = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    y_up = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    w_tile = w_ptr + tile.to(tl.int64) * (TILES * blocks * tile_size)
    up_offset = gate_tiles * blocks * tile_size
    first = share * UNITS
    if HELD:
        y = _held(
            y, w_tile + inside, scale_rows, x_ptr, sx_ptr, tokens, first, x_stride, sx_stride, tile_size, BLOCK_IN,
            BITS, UNIT, UNITS, GROUPS, SCALED, NATIVE, EARLY,
        )  # fmt: skip
    elif TOGETHER > 1:
        y = _together(
            y, w_tile + inside, scale_rows, x_ptr, sx_ptr, tokens, first, x_stride, sx_stride, tile_size, BLOCK_IN,
            BITS, UNITS, TOGETHER, AHEAD, NATIVE, STAGES, EARLY,
        )  # fmt: skip
    elif UNIT == 1 and SCALED and EPILOGUE != 3:
        begin(EARLY)
        # One tile per integer sum: a flat loop, which the compiler pipelines.
        for unit in tl.range(first, tl.minimum(first + UNITS, blocks), num_stages=STAGES):
            zero = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=kind)
            place = w_tile + unit * tile_size + inside
            acc = _products(zero, tl.load(place), x_ptr, tokens, unit, x_stride, BLOCK_IN, BITS, NATIVE)
            sx = tl.load(sx_ptr + unit * sx_stride + tokens) * gain
            scale_place = scale_rows + (unit * 64 if GROUPS > 1 else 0)
            y += acc.to(tl.float32) * sx[None, :] * tl.load(scale_place)[:, None]
            if gated:
                acc = _products(zero, tl.load(place + up_offset), x_ptr, tokens, unit, x_stride, BLOCK_IN, BITS, NATIVE)
                up_scale = tl.load(scale_place + gate_tiles * (GROUPS * 64))
                y_up += acc.to(tl.float32) * sx[None, :] * up_scale[:, None]
    else:
        begin(EARLY)
        for unit in range(first, tl.minimum(first + UNITS, tl.cdiv(blocks, UNIT))):
            acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=kind)
            acc_up = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=kind)
            for block in tl.range(unit * UNIT, tl.minimum(unit * UNIT + UNIT, blocks), num_stages=STAGES):
                place = w_tile + block * tile_size + inside
                acc = _products(acc, tl.load(place), x_ptr, tokens, block, x_stride, BLOCK_IN, BITS, NATIVE)
                if gated:
                    up = tl.load(place + up_offset)
                    acc_up = _products(acc_up, up, x_ptr, tokens, block, x_stride, BLOCK_IN, BITS, NATIVE)
            if EPILOGUE == 3:
                place = (unit * tokens_padded + tokens)[None, :] * outputs + (tile * BLOCK_OUT + rows)[:, None]
                tl.store(out_ptr + place, acc >> 4 if BITS <= 4 else acc)
            elif SCALED:
                sx = tl.load(sx_ptr + unit * sx_stride + tokens) * gain
                scale_place = scale_rows + (unit * 64 if GROUPS > 1 else 0)
                y += acc.to(tl.float32) * sx[None, :] * tl.load(scale_place)[:, None]
                if gated:
                    up_scale = tl.load(scale_place + gate_tiles * (GROUPS * 64))
                    y_up += acc_up.to(tl.float32) * sx[None, :] * up_scale[:, None]
            else:
                y += acc.to(tl.float32)
                if gated:
                    y_up += acc_up.to(tl.float32)
    if SHARES == 1:
        _finish(
            y, y_up, tile, share, tokens, bias_ptr, out_ptr, tokens_padded, outputs, BLOCK_OUT, EPILOGUE, HAS_BIAS,
            ACTIVATION,
        )  # fmt: skip
    else:
        size: tl.constexpr = BLOCK_OUT * BLOCK_TOKENS
        sums: tl.constexpr = 2 if gated else 1
        owner = tile * tl.num_programs(2) + token_block
        inner = rows[:, None] * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
        place = scratch_ptr + (owner * SHARES * sums).to(tl.int64) * size + inner
        tl.store(place + share * sums * size, y)
        if gated:
            tl.store(place + (share * sums + 1) * size, y_up)
        # All of this program's numbers are out before it counts itself; the last one to count sees everybody's.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + owner, 1, sem="acq_rel") == SHARES - 1:
            y = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
            y_up = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
            for other in tl.static_range(SHARES):
                y += tl.load(place + other * sums * size, cache_modifier=".cg")
                if gated:
                    y_up += tl.load(place + (other * sums + 1) * size, cache_modifier=".cg")
            tl.store(counter_ptr + owner, 0)
            _finish(
                y, y_up, tile, 0, tokens, bias_ptr, out_ptr, tokens_padded, outputs, BLOCK_OUT, EPILOGUE, HAS_BIAS,
                ACTIVATION,
            )  # fmt: skip

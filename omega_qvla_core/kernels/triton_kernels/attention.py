"""Attention of tokens to the keys of their key head: all query heads of one key head are rows of one product.

Keys are cut into shares (``SPLITS``) so that few queries still fill the GPU; each share leaves its sums with its own
peak and total, which ``rows.merge_rows`` joins, or normalises its result itself when there is one share. A head is read
as two halves, so that widths like 48 or 72 fit into blocks of powers of two. Keys and values lie in any buffer with a
row per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import begin


@triton.jit
def _attend(acc0, acc1, peak, total, q0, q1, k0, k1, v0, v1, visible, scale):
    """One block of keys: the running softmax."""
    scores = tl.dot(q0, tl.trans(k0))
    scores = tl.dot(q1, tl.trans(k1), scores) * scale
    scores = tl.where(visible, scores, float("-inf"))
    block_peak = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
    safe = tl.where(block_peak == float("-inf"), 0.0, block_peak)
    shrink = tl.exp(peak - safe)
    weights = tl.exp(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc0 * shrink[:, None])
    acc1 = tl.dot(weights, v1, acc1 * shrink[:, None])
    return acc0, acc1, block_peak, total


@triton.jit
def attention(
    q_ptr,  # [T, q_stride]: head h of a token starts at column h * 2 * HALF_DIM
    k_ptr,  # [keys, k_stride]
    v_ptr,  # [keys, v_stride]
    keys_ptr,  # int32 [1]: keys that are there
    out_ptr,  # bfloat16 [T, out_stride], or float32 [SPLITS, rows padded, 2 * HALF_DIM]
    peak_ptr,  # float32 [SPLITS, rows padded]
    total_ptr,
    tokens,
    rows_padded,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    keys_per_split,
    suffix_start,
    scale,
    QUERY_HEADS: tl.constexpr,  # per key head
    HALF_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # HALF_DIM up to a power of two
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SUFFIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    head = tl.program_id(2)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = row // QUERY_HEADS
    query_head = head * QUERY_HEADS + row % QUERY_HEADS
    halves = tl.arange(0, HALF_BLOCK)
    there = token < tokens
    dims = halves < HALF_DIM
    query_inside = there[:, None] & dims[None, :]
    place = q_ptr + token.to(tl.int64)[:, None] * q_stride + query_head[:, None] * (2 * HALF_DIM) + halves[None, :]
    q0 = tl.load(place, mask=query_inside, other=0.0)
    q1 = tl.load(place + HALF_DIM, mask=query_inside, other=0.0)
    acc0 = tl.zeros((BLOCK_ROWS, HALF_BLOCK), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_ROWS, HALF_BLOCK), dtype=tl.float32)
    peak = tl.zeros((BLOCK_ROWS,), dtype=tl.float32) - float("inf")
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    keys = tl.load(keys_ptr)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, keys)
    if SUFFIX:
        # The last share has the keys of the queries' own tokens, which lie behind the room for the prefix.
        newest = split == tl.num_programs(1) - 1
        first = tl.where(newest, suffix_start, first)
        last = tl.where(newest, suffix_start + tokens, last)
    if CAUSAL:
        last = tl.minimum(last, ((row_block + 1) * BLOCK_ROWS - 1) // QUERY_HEADS + 1)
    for start in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_KEYS)
        key_inside = (key < last)[:, None] & dims[None, :]
        k_place = k_ptr + key.to(tl.int64)[:, None] * k_stride + head * (2 * HALF_DIM) + halves[None, :]
        v_place = v_ptr + key.to(tl.int64)[:, None] * v_stride + head * (2 * HALF_DIM) + halves[None, :]
        k0 = tl.load(k_place, mask=key_inside, other=0.0)
        k1 = tl.load(k_place + HALF_DIM, mask=key_inside, other=0.0)
        v0 = tl.load(v_place, mask=key_inside, other=0.0)
        v1 = tl.load(v_place + HALF_DIM, mask=key_inside, other=0.0)
        visible = (key < last)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= token[:, None])
        acc0, acc1, peak, total = _attend(acc0, acc1, peak, total, q0, q1, k0, k1, v0, v1, visible, scale)
    if SPLIT:
        share_row = (split * rows_padded + token * (QUERY_HEADS * tl.num_programs(2)) + query_head).to(tl.int64)
        place = out_ptr + share_row[:, None] * (2 * HALF_DIM) + halves[None, :]
        tl.store(place, acc0, mask=query_inside)
        tl.store(place + HALF_DIM, acc1, mask=query_inside)
        tl.store(peak_ptr + share_row, peak, mask=there)
        tl.store(total_ptr + share_row, total, mask=there)
    else:
        place = out_ptr + token.to(tl.int64)[:, None] * out_stride + query_head[:, None] * (2 * HALF_DIM)
        kind = out_ptr.dtype.element_ty
        tl.store(place + halves[None, :], (acc0 / total[:, None]).to(kind), mask=query_inside)
        tl.store(place + HALF_DIM + halves[None, :], (acc1 / total[:, None]).to(kind), mask=query_inside)


@triton.jit
def rotate_heads(
    x_ptr,  # [T, x_stride], or with PARTS float32 [PARTS, T padded, x_stride]: shares of a product, which are added
    q_out_ptr,  # [T, q_stride]; may be x
    k_out_ptr,  # [T, kv_stride]
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,  # float32 [2 * HALF_DIM], with NORM
    k_norm_ptr,
    x_stride,
    part_stride,  # numbers from one share to the next
    q_stride,
    kv_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # all of queries, keys and values, up to a power of two
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm and rotary positions of the heads of one token; keys and values go to the cache. Grid ``[T]``."""
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    halves = tl.arange(0, HALF_BLOCK)[None, :]
    dims = halves < HALF_DIM
    there = dims & (head < Q_HEADS + 2 * KV_HEADS)
    place = x_ptr + token * x_stride + head * (2 * HALF_DIM) + halves
    first = tl.load(place, mask=there, other=0.0)
    second = tl.load(place + HALF_DIM, mask=there, other=0.0)
    for part in tl.static_range(1, PARTS):
        first += tl.load(place + part * part_stride, mask=there, other=0.0)
        second += tl.load(place + part * part_stride + HALF_DIM, mask=there, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF_DIM)
        factor = (1.0 / tl.sqrt_rn(square + eps))[:, None]
        query = head < Q_HEADS
        for second_half in tl.static_range(2):
            weights = halves + second_half * HALF_DIM
            q_norm = tl.load(q_norm_ptr + weights, mask=dims, other=0.0)
            factors = tl.where(query, q_norm, tl.load(k_norm_ptr + weights, mask=dims, other=0.0)) * factor
            if second_half == 0:
                a = a * factors
            else:
                b = b * factors
    cos = tl.load(cos_ptr + token * HALF_DIM + halves, mask=dims, other=1.0)
    sin = tl.load(sin_ptr + token * HALF_DIM + halves, mask=dims, other=0.0)
    kind = q_out_ptr.dtype.element_ty
    turned_a, turned_b = (a * cos - b * sin).to(kind), (b * cos + a * sin).to(kind)
    q_place = q_out_ptr + token * q_stride + head * (2 * HALF_DIM) + halves
    written = dims & (head < Q_HEADS)
    tl.store(q_place, turned_a, mask=written)
    tl.store(q_place + HALF_DIM, turned_b, mask=written)
    k_place = k_out_ptr + token * kv_stride + (head - Q_HEADS) * (2 * HALF_DIM) + halves
    written = dims & (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    tl.store(k_place, turned_a, mask=written)
    tl.store(k_place + HALF_DIM, turned_b, mask=written)
    v_place = v_out_ptr + token * kv_stride + (head - Q_HEADS - KV_HEADS) * (2 * HALF_DIM) + halves
    written = there & (head >= Q_HEADS + KV_HEADS)
    tl.store(v_place, first.to(kind), mask=written)
    tl.store(v_place + HALF_DIM, second.to(kind), mask=written)

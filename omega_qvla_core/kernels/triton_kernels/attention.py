"""Attention of tokens to the keys of their key head: all query heads of one key head are rows of one product.

Keys are cut into shares (``SPLITS``) so that few queries still fill the GPU; each share leaves its sums with its own
peak and total, which ``rows.merge_rows`` joins, or normalises its result itself when there is one share. Keys and
values lie in any buffer with a row per token. A head is read up to a power of two columns: queries are zero past the
head, and what comes of values there is not written. With DESCRIBED the tensor memory accelerator reads keys and values
(compute capability 9.0): what lies past a head or past the last key is then read, not used, and must be finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from omega_qvla_core.kernels.triton_kernels.numerics import begin


@triton.jit
def _head_rows(
    source, key, last, column, stride, KEYS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """``[KEYS, DIM_BLOCK]``: keys or values of one head."""
    if DESCRIBED:
        block = source.load([key, column])
    else:
        keys = key + tl.arange(0, KEYS)
        dims = tl.arange(0, DIM_BLOCK)
        place = source + keys[:, None] * stride + column + dims[None, :]
        block = tl.load(place, mask=(keys < last)[:, None] & (dims < DIM)[None, :], other=0.0)
    return block


@triton.jit
def attention(
    q_ptr,  # [T, q_stride]: head h of a token starts at column h * DIM
    k,  # [keys, k_stride]
    v,  # [keys, v_stride]
    keys_ptr,  # int32 [1]: keys that are there
    out_ptr,  # bfloat16 [T, out_stride], or float32 [SPLITS, rows padded, DIM]
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
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,  # DIM up to a power of two
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SUFFIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EARLY: tl.constexpr,
):
    keys = tl.load(keys_ptr)
    begin(EARLY)
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    head = tl.program_id(2)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = row // QUERY_HEADS
    query_head = head * QUERY_HEADS + row % QUERY_HEADS
    dims = tl.arange(0, DIM_BLOCK)
    # Rows past the last token repeat it. Fewer masks and narrow offsets matter: with 240 registers per thread or more
    # an H100 took half as long again for the whole kernel.
    q_place = q_ptr + tl.minimum(token, tokens - 1)[:, None] * q_stride + query_head[:, None] * DIM + dims[None, :]
    if DIM == DIM_BLOCK:
        q = tl.load(q_place)
    else:
        q = tl.load(q_place, mask=(dims < DIM)[None, :], other=0.0)
    mixed = tl.zeros((BLOCK_ROWS, DIM_BLOCK), dtype=tl.float32)
    peak = tl.zeros((BLOCK_ROWS,), dtype=tl.float32) - float("inf")
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
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
        keys_here = _head_rows(k, start, last, head * DIM, k_stride, BLOCK_KEYS, DIM, DIM_BLOCK, DESCRIBED)
        values = _head_rows(v, start, last, head * DIM, v_stride, BLOCK_KEYS, DIM, DIM_BLOCK, DESCRIBED)
        key = start + tl.arange(0, BLOCK_KEYS)
        visible = (key < last)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= token[:, None])
        scores = tl.where(visible, tl.dot(q, tl.trans(keys_here)) * scale, float("-inf"))
        # The running softmax. A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp(peak - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
        peak = new_peak
    there = token < tokens
    inside = there[:, None] if DIM == DIM_BLOCK else there[:, None] & (dims < DIM)[None, :]
    if SPLIT:
        share_row = split * rows_padded + token * (QUERY_HEADS * tl.num_programs(2)) + query_head
        tl.store(out_ptr + share_row[:, None] * DIM + dims[None, :], mixed, mask=inside)
        tl.store(peak_ptr + share_row, peak, mask=there)
        tl.store(total_ptr + share_row, total, mask=there)
    else:
        place = out_ptr + token[:, None] * out_stride + query_head[:, None] * DIM + dims[None, :]
        tl.store(place, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


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
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    halves = tl.arange(0, HALF_BLOCK)[None, :]
    dims = halves < HALF_DIM
    # What the kernel before does not write is read before it has ended; see ``numerics.begin``.
    cos = tl.load(cos_ptr + token * HALF_DIM + halves, mask=dims, other=1.0)
    sin = tl.load(sin_ptr + token * HALF_DIM + halves, mask=dims, other=0.0)
    begin(EARLY)
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

"""Launching what happens between products: norms, codes, attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from omega_qvla_core.kernels.triton_kernels import attention as attention_kernels
from omega_qvla_core.kernels.triton_kernels import numerics, rows
from omega_qvla_core.kernels.triton_kernels.coding import LINE, Coding
from omega_qvla_core.kernels.triton_kernels.launch import describable, launch_options, require_addressable
from omega_qvla_core.kernels.triton_kernels.layout import round_up

_LEAST_DIM = 16
"""Narrowest side of a product."""
_FEWEST_LINES = 16
"""Rows of the smallest product that rotates a token."""
_ACTIVATE_LINES = 8
"""Lines of 64 columns of one program of ``activate``."""
# Warps of a program: the fastest of 1 to 16 for 50 tokens of 1024 (norm) to 4096 columns on an H100.
_NORM_WARPS = 8
_ACTIVATE_WARPS = 4
_MERGE_WARPS = 4
_ROTATE_WARPS = 4


def norm(
    x: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    coding: Coding,
    *,
    kind: int = rows.NO_NORM,
    eps: float = 0.0,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    parts: Tensor | None = None,
    gate: Tensor | None = None,
    tokens: int | None = None,
    width: int | None = None,
    settled: bool = False,
    early: bool = False,
) -> None:
    """See ``rows.norm_rows``.

    Args:
        x: ``[T, K]``, updated in place if there are ``parts``; None to take ``parts`` alone, of ``tokens`` rows.
        out: int8 or bfloat16 ``[T, padded K]``.
        scales: float32 ``[G or 1, T padded]``; None for FLOATS.
        coding: How ``out`` is written.
        kind: ``rows.NO_NORM``, ``RMS_NORM`` or ``LAYER_NORM``.
        eps: Of the norm.
        mul: float32 ``[K]`` or None.
        add: float32 ``[K]`` or None.
        parts: float32 ``[S, T padded, K padded]``, of any strides, or None.
        gate: float32 ``[K]`` or None.
        tokens: Rows of ``x`` that count; all if None.
        width: K, where ``x`` is padded.
        settled: Whether ``x`` is not written by the kernel before this one, so that it can be read early.
        early: See ``numerics.begin``.
    """
    source = parts if x is None else x
    width = source.shape[-1] if width is None else width
    spare = out if scales is None else scales
    rows.norm_rows[(x.shape[0] if tokens is None else tokens,)](
        source,
        spare if parts is None else parts,
        spare if gate is None else gate,
        spare if mul is None else mul,
        spare if add is None else add,
        *coding.tensors(spare),
        out,
        spare,
        0 if parts is None else parts.stride(0),
        0 if parts is None else parts.stride(1),
        width,
        source.stride(-2),
        out.stride(0),
        eps,
        spare.stride(0),
        BLOCKS=lines(width),
        HAS_X=x is not None,
        SETTLED=settled,
        PARTS=0 if parts is None else parts.shape[0],
        GATED=gate is not None,
        NORM=kind,
        HAS_MUL=mul is not None,
        HAS_ADD=add is not None,
        **coding.constants,
        EARLY=early,
        num_warps=_NORM_WARPS,
        **launch_options(early),
    )


def lines(width: int) -> int:
    """Lines of 64 columns that hold a row: a power of two."""
    return max(_FEWEST_LINES, triton.next_power_of_2(triton.cdiv(width, LINE)))


@dataclass(frozen=True)
class AttentionBlocks:
    """Block sizes of ``attention``.

    Attributes:
        rows: Tokens times query heads of a key head.
        keys: Keys at a time.
        warps: Of a program.
        stages: Loads in flight.
        described: See ``launch.Blocks``.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    described: bool = False


@dataclass(frozen=True)
class Shares:
    """Buffers of attention in shares of the keys.

    Attributes:
        mixed: float32 ``[SPLITS, rows padded, head_dim]``.
        peak: float32 ``[SPLITS, rows padded]``.
        total: Same shape.
    """

    mixed: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def empty(cls, splits: int, rows_count: int, head_dim: int, device: torch.device | str) -> Shares:
        """Buffers for that many rows (tokens times heads)."""
        padded = round_up(rows_count, 128)
        mixed = torch.zeros(splits, padded, head_dim, device=device)
        return cls(mixed, torch.zeros(splits, padded, device=device), torch.ones(splits, padded, device=device))


def merge(shares: Shares, out: Tensor, scales: Tensor | None, coding: Coding, tokens: int, heads: int,
          mul: Tensor | None = None, early: bool = False) -> None:  # fmt: skip
    """See ``rows.merge_rows``: ``[T, heads * head_dim]`` of all shares, coded as ``norm`` does."""
    splits, rows_padded, head_dim = shares.mixed.shape
    width, spare = heads * head_dim, out if scales is None else scales
    constants = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "SPLITS": splits,
        "HAS_MUL": mul is not None,
        **coding.constants,
        "EARLY": early,
        "num_warps": _MERGE_WARPS,
        **launch_options(early),
    }
    if head_dim % LINE == 0 and coding.mode != rows.TOKEN and coding.group <= head_dim:
        rows.merge_heads[(tokens, heads)](
            shares.mixed,
            shares.peak,
            shares.total,
            spare if mul is None else mul,
            spare if coding.factor is None else coding.factor,
            out,
            spare,
            rows_padded,
            spare.stride(0),
            out.stride(0),
            BLOCKS=lines(head_dim),
            **constants,
        )
        return
    rows.merge_rows[(tokens,)](
        shares.mixed,
        shares.peak,
        shares.total,
        spare if mul is None else mul,
        *coding.tensors(spare),
        out,
        spare,
        rows_padded,
        spare.stride(0),
        width,
        out.stride(0),
        BLOCKS=lines(width),
        **constants,
    )


def activate(
    parts: Tensor,
    out: Tensor,
    scales: Tensor | None,
    coding: Coding,
    tokens: int,
    width: int,
    *,
    up_column: int | None = None,
    activation: int = numerics.GELU,
    mul: Tensor | None = None,
    early: bool = False,
) -> None:
    """See ``rows.activate_rows``: shares of a product to ``[T, K]``, coded as ``norm`` does.

    Args:
        parts: float32 ``[S, T padded, K padded]``, twice as many columns for a gated product.
        up_column: Column where a gated product's up projection starts; None without one.
        activation: See ``numerics.activate``.
    """
    spare = out if scales is None else scales
    rows.activate_rows[(tokens, triton.cdiv(width, _ACTIVATE_LINES * LINE))](
        parts,
        spare if mul is None else mul,
        spare if coding.factor is None else coding.factor,
        out,
        spare,
        parts.shape[1],
        parts.shape[2],
        spare.stride(0),
        width,
        out.stride(0),
        0 if up_column is None else up_column,
        BLOCKS=_ACTIVATE_LINES,
        PARTS=parts.shape[0],
        GATED=up_column is not None,
        ACTIVATION=activation,
        HAS_MUL=mul is not None,
        **coding.constants,
        EARLY=early,
        num_warps=_ACTIVATE_WARPS,
        **launch_options(early),
    )


@dataclass(frozen=True)
class Heads:
    """Heads of attention.

    Attributes:
        count: Query heads.
        kv: Key heads.
        dim: Width of one.
    """

    count: int
    kv: int
    dim: int

    @property
    def block(self) -> int:
        """Columns of a head, up to a power of two that products take."""
        return max(_LEAST_DIM, triton.next_power_of_2(self.dim))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    out: Tensor | Shares,
    heads: Heads,
    tokens: int,
    *,
    suffix_start: int | None = None,
    causal: bool = False,
    most_keys: int | None = None,
    blocks: AttentionBlocks = AttentionBlocks(),
    early: bool = False,
) -> None:
    """See ``attention.attention``.

    Args:
        q: ``[T, ...]`` with the queries first, heads side by side.
        k: ``[keys, ...]`` starting at the first key head.
        v: ``[keys, ...]`` starting at the first value head.
        keys: int32 ``[1]``: keys that are there.
        out: ``[T, heads * dim]``, or buffers of as many shares as they have room for.
        heads: Sizes.
        tokens: T.
        suffix_start: Row of ``k`` and ``v`` where the tokens' own keys start, which make the last share; None if they
            attend to ``keys`` only.
        causal: Token t sees keys 0 to t.
        most_keys: Most that ``keys`` can be; rows of ``k`` if None.
        blocks: Block sizes.
        early: See ``numerics.begin``.
    """
    split = isinstance(out, Shares)
    count = out.mixed.shape[0] if split else 1
    shared = count - 1 if suffix_start is not None else count
    per_key_head = heads.count // heads.kv
    room = k.shape[0] if most_keys is None else most_keys
    per_split = round_up(triton.cdiv(room, max(shared, 1)), blocks.keys)
    target = out.mixed if split else out
    require_addressable(q, k, v, target.flatten(0, -2) if split else target)
    grid = (triton.cdiv(tokens * per_key_head, blocks.rows), count, heads.kv)
    described, box = blocks.described and describable(k) and describable(v), [blocks.keys, heads.block]
    attention_kernels.attention[grid](
        q,
        TensorDescriptor.from_tensor(k, box) if described else k,
        TensorDescriptor.from_tensor(v, box) if described else v,
        keys,
        target,
        out.peak if split else target,
        out.total if split else target,
        tokens,
        target.shape[1] if split else 0,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if split else out.stride(0),
        per_split,
        0 if suffix_start is None else suffix_start,
        heads.dim**-0.5,
        QUERY_HEADS=per_key_head,
        DIM=heads.dim,
        DIM_BLOCK=heads.block,
        BLOCK_ROWS=blocks.rows,
        BLOCK_KEYS=blocks.keys,
        SUFFIX=suffix_start is not None,
        CAUSAL=causal,
        SPLIT=split,
        STAGES=blocks.stages,
        DESCRIBED=described,
        EARLY=early,
        num_warps=blocks.warps,
        **launch_options(early),
    )


def rotate_heads(
    qkv: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
    tokens: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    early: bool = False,
) -> None:
    """Norm (with ``norms`` of queries and keys) and turn heads.

    Args:
        qkv: ``[T, W]``, or shares of a product that are added first: float32 ``[S, T padded, W]``.
        q_out: Where queries go, ``[T, ...]``; may be ``qkv``.
        k_out: Where keys go, ``[T, ...]``.
        v_out: Where values go, of the same strides.
        cos: float32 ``[T, head_dim / 2]``.
        sin: Same shape.
        heads: Sizes.
        tokens: T.
        norms: Weights of the norms of queries and keys, float32 ``[head_dim]``.
        eps: Of the norms.
        early: See ``numerics.begin``.
    """
    spare = cos
    attention_kernels.rotate_heads[(tokens,)](
        qkv,
        q_out,
        k_out,
        v_out,
        cos,
        sin,
        spare if norms is None else norms[0],
        spare if norms is None else norms[1],
        qkv.stride(-2),
        qkv.stride(0) if qkv.ndim == 3 else 0,
        q_out.stride(0),
        k_out.stride(0),
        eps,
        Q_HEADS=heads.count,
        KV_HEADS=heads.kv,
        HEADS=triton.next_power_of_2(heads.count + 2 * heads.kv),
        NORM=norms is not None,
        PARTS=qkv.shape[0] if qkv.ndim == 3 else 1,
        HALF_DIM=heads.dim // 2,
        HALF_BLOCK=triton.next_power_of_2(heads.dim // 2),
        EARLY=early,
        num_warps=_ROTATE_WARPS,
        **launch_options(early),
    )

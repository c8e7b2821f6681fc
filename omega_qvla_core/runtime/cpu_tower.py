"""Layers of the towers with rotary positions on a CPU: both of Pi 0.5, and the language tower of GR00T N1.5.

What is saved against the model's own code: q/k/v and gate/up are one product each; a norm is one operator (a LayerNorm
over ``[x, -x]``, whose mean is zero and whose variance is the mean square); rotary positions are one complex product,
for which the rows of query and key weights are laid out in pairs; keys and values are written where the next attention
reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omega_qvla_core.models.layers import Block, RMSNorm, rotary_angles
from omega_qvla_core.runtime.cpu_buffers import Buffers
from omega_qvla_core.runtime.cpu_linear import Product, merge


@dataclass(frozen=True)
class LayerWeights:
    """Products of one layer, for any number of tokens; ``keys_values`` alone for a layer that stops there."""

    qkv: Product
    keys_values: Product
    out: Product
    gate_up: Product
    down: Product

    @classmethod
    def of(cls, block: Block, last: bool) -> LayerWeights:
        """Read a layer; ``last`` makes the product of keys and values alone."""
        attention, mlp = block.self_attn, block.mlp
        queries = _paired_rows(attention.num_heads, attention.head_dim)
        keys = _paired_rows(attention.num_kv_heads, attention.head_dim)
        qkv = merge([attention.q_proj, attention.k_proj, attention.v_proj], [queries, keys, None])
        return cls(
            qkv,
            merge([attention.k_proj, attention.v_proj], [keys, None]) if last else qkv,
            merge([attention.o_proj], [None]),
            merge([mlp.gate_proj, mlp.up_proj], [None, None]),
            merge([mlp.down_proj], [None]),
        )

    def copied_bytes(self) -> int:
        """See ``Product``."""
        products = {id(one): one for one in (self.qkv, self.keys_values, self.out, self.gate_up, self.down)}
        return sum(one.copied_bytes() for one in products.values())


class State:
    """The residual stream ``x [M, width]``, in a buffer ``[M, 2 * width]`` beside its negative."""

    def __init__(self, tokens: int, width: int, buffers: Buffers) -> None:
        self.tokens, self.width = tokens, width
        self._mirrored = buffers.own(tokens, 2 * width)
        self.x, self._negative = self._mirrored.split(width, dim=1)

    def normed(self, modulation: Modulation) -> Tensor:
        """``x / rms(x) * scale + shift``, ``[M, width]``."""
        torch.neg(self.x, out=self._negative)
        both = F.layer_norm(self._mirrored, (2 * self.width,), modulation.scale, modulation.shift, modulation.eps)
        return both[:, : self.width]


@dataclass(frozen=True)
class Modulation:
    """What a norm multiplies with and adds, each ``[2 * width]`` (the second half is for the negative and not read).

    Attributes:
        scale: Factor.
        shift: Summand, or None.
        eps: Epsilon of the norm.
        gate: ``[width]`` for the update after it, or None.
    """

    scale: Tensor
    shift: Tensor | None
    eps: float
    gate: Tensor | None = None

    @classmethod
    def of(cls, modulation: Tensor, eps: float) -> Modulation:
        """From an adaptive norm's ``[1, 1, 3 * width]``."""
        scale, shift, gate = modulation[0, 0].float().chunk(3)
        return cls((1.0 + scale).repeat(2), shift.repeat(2), eps, gate.clone())


@dataclass(frozen=True)
class Cache:
    """Keys and values ``[kv heads, S, head_dim]``; a layer writes tokens ``start`` to ``stop`` and sees all before."""

    keys: Tensor
    values: Tensor
    start: int
    stop: int


class Layer:
    """A transformer layer over fixed buffers.

    Args:
        block: Read for its sizes and head norms; its linears come from ``weights``.
        weights: Of the block.
        state: That it updates.
        cache: Where its keys and values go, and those that it sees.
        angles: From ``turns``, for all tokens of the cache.
        buffers: Shared with layers that run before or after it.
        causal: Whether a token sees itself and those before it only; the cache then holds this layer's tokens alone.
    """

    def __init__(
        self,
        block: Block,
        weights: LayerWeights,
        state: State,
        cache: Cache,
        angles: Tensor,
        buffers: Buffers,
        causal: bool = False,
    ) -> None:
        attention, tokens = block.self_attn, state.tokens
        self._state, self._causal, self._silu = state, causal, block.mlp.silu
        self._heads, self._kv_heads, self._head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self._qkv, self._keys_values = (one.bind(tokens, buffers) for one in (weights.qkv, weights.keys_values))
        self._out, self._down = weights.out.bind(tokens, buffers), weights.down.bind(tokens, buffers)
        self._gate_up, self._mlp_dim = weights.gate_up.bind(tokens, buffers), weights.gate_up.outputs // 2
        self._query_norm = HeadNorm.of(attention.q_norm)
        self._key_norm = HeadNorm.of(attention.k_norm)
        self._angles = angles[cache.start : cache.stop]
        queries = buffers.get("queries", self._heads, tokens, self._head_dim)
        self._query_place = _complex(queries).transpose(0, 1)
        self._key_place = _complex(cache.keys[:, cache.start : cache.stop]).transpose(0, 1)
        self._value_place = cache.values[:, cache.start : cache.stop].transpose(0, 1)
        if causal:
            # The query heads of one key head are heads that read the same memory: each row sees keys of its own.
            self._queries = queries.view(self._kv_heads, -1, tokens, self._head_dim)
            seen = (one[:, None].expand(-1, self._queries.shape[1], -1, -1) for one in (cache.keys, cache.values))
        else:
            # They are rows of one longer sequence: see models.layers.Attention.
            self._queries = queries.view(1, self._kv_heads, -1, self._head_dim)
            seen = (one[None, :, : cache.stop] for one in (cache.keys, cache.values))
        self._seen_keys, self._seen_values = seen
        self._mixed = buffers.get("mixed", tokens, self._heads * self._head_dim)
        self._mixed_heads = self._mixed.view(tokens, self._heads, self._head_dim).transpose(0, 1)
        self._hidden = buffers.get("hidden", tokens, self._mlp_dim)

    def run(self, step: int, modulations: tuple[Modulation, Modulation]) -> None:
        """Update the state; ``step`` is the denoise step, 0 in the language tower."""
        before, after = modulations
        heads = self._qkv(self._state.normed(before), step).view(self._state.tokens, -1, self._head_dim)
        queries = heads[:, : self._heads]
        if self._query_norm is not None:
            self._query_norm.apply_(queries)
        torch.mul(_complex(queries), self._angles, out=self._query_place)
        self._write(heads[:, self._heads :])
        mixed = F.scaled_dot_product_attention(
            self._queries, self._seen_keys, self._seen_values, is_causal=self._causal
        )
        self._mixed_heads.copy_(mixed.view(self._heads, self._state.tokens, self._head_dim))
        self._update(self._out(self._mixed, step), before.gate)
        gate_up = self._gate_up(self._state.normed(after), step)
        self._activate(gate_up[:, : self._mlp_dim])
        self._hidden.mul_(gate_up[:, self._mlp_dim :])
        self._update(self._down(self._hidden, step), after.gate)

    def write_keys_values(self, modulation: Modulation) -> None:
        """Keys and values alone, all that is needed of the last language layer of Pi 0.5."""
        out = self._keys_values(self._state.normed(modulation), 0)
        self._write(out.view(self._state.tokens, -1, self._head_dim))

    def _write(self, heads: Tensor) -> None:
        keys = heads[:, : self._kv_heads]
        if self._key_norm is not None:
            self._key_norm.apply_(keys)
        torch.mul(_complex(keys), self._angles, out=self._key_place)
        self._value_place.copy_(heads[:, self._kv_heads :])

    def _activate(self, gate: Tensor) -> None:
        if self._silu:
            torch.ops.aten.silu.out(gate, out=self._hidden)
        else:
            torch.ops.aten.gelu.out(gate, approximate="tanh", out=self._hidden)

    def _update(self, update: Tensor, gate: Tensor | None) -> None:
        if gate is None:
            self._state.x.add_(update)
        else:
            self._state.x.addcmul_(update, gate)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of every query or key, in the order of ``_paired_rows``; in place.

    Attributes:
        weight: ``[head_dim]``.
        eps: Epsilon.
    """

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, norm: RMSNorm | None) -> HeadNorm | None:
        """Of a norm in the model's order; None of None."""
        return None if norm is None else cls(norm.weight.detach()[_paired_rows(1, len(norm.weight))], norm.eps)

    def apply_(self, heads: Tensor) -> None:
        """Normalise ``[M, heads, head_dim]``."""
        heads.mul_(heads.square().mean(-1, True).add_(self.eps).rsqrt_()).mul_(self.weight)


def plain_norms(block: Block) -> tuple[Modulation, Modulation]:
    """The two norms of a block that no condition modulates."""
    return plain_norm(block.input_layernorm), plain_norm(block.post_attention_layernorm)


def plain_norm(norm: RMSNorm) -> Modulation:
    """A norm that no condition modulates."""
    scale = 1.0 + norm.weight.detach().float() if norm.unit_offset else norm.weight.detach().float()
    return Modulation(scale.repeat(2), None, norm.eps)


def turns(tokens: int, head_dim: int, theta: float) -> Tensor:
    """Rotary positions 0 to ``tokens - 1`` as complex numbers ``[tokens, 1, head_dim / 2]``."""
    cos, sin = rotary_angles(torch.arange(tokens)[None], head_dim, theta)
    return torch.complex(cos[0, 0], sin[0, 0])[:, None]


def _paired_rows(heads: int, head_dim: int) -> Tensor:
    """Rows of a query or key weight such that the two numbers that rotary positions mix lie side by side."""
    pairs = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    return (torch.arange(heads)[:, None] * head_dim + pairs).reshape(-1)


def _complex(values: Tensor) -> Tensor:
    """``[..., head_dim]`` in pairs -> complex ``[..., head_dim / 2]``, a view."""
    return torch.view_as_complex(values.unflatten(-1, (-1, 2)))

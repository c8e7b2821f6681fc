"""Transformer pieces that the towers of all model families share.

One implementation for the language towers (Gemma in Pi 0.5, Qwen3 in GR00T N1.5) and the action expert of Pi 0.5: a
``Flavour`` says where the two language models differ, and the expert differs by its normalization, adaptive RMSNorm
(scale, shift and gate from the flow-matching time) instead of plain RMSNorm. Every linear that the quantizer replaces
(``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj``) is a plain ``nn.Linear``
attribute that is only ever called, so that a module of the same call signature can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rotated queries and keys of one position set: (cos, sin), each float32 [B, 1, S, head_dim / 2].
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Flavour:
    """Where language models differ.

    Attributes:
        unit_offset: RMSNorm multiplies with ``1 + weight`` in float32 (Gemma), not with ``weight`` after casting back.
        qk_norm: Queries and keys of every head are normalised before they are rotated.
        silu: The gate of the MLP is SiLU, not tanh-GELU.
    """

    unit_offset: bool
    qk_norm: bool
    silu: bool


GEMMA = Flavour(unit_offset=True, qk_norm=False, silu=False)
QWEN3 = Flavour(unit_offset=False, qk_norm=True, silu=True)


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, with the factor ``1 + weight`` (Gemma) or ``weight`` (Qwen3).

    ``forward(x [..., width], modulation=None)`` gives ``(normalized x, None)``: there is no gate in language towers.
    """

    def __init__(self, width: int, eps: float, unit_offset: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if unit_offset else torch.ones(width))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        normed = _normalise(x, self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.weight.float())).to(x.dtype), None
        return normed.to(x.dtype) * self.weight.to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from a condition: ``dense(cond)`` chunked in that order.

    ``forward(x [B, S, width], modulation)`` gives ``(norm(x) * (1 + scale) + shift, gate [B, 1, width])``.
    The dense layer starts at zero, so that a new block is the identity (as the reference initializes it).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def modulation(self, cond: Tensor) -> Tensor:
        """Scale, shift and gate ``[B, 1, 3 * width]`` for conditions ``[B, width]``; B may be 1 for a whole batch."""
        return self.dense(cond)[:, None]

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = _normalise(x, self.eps) * (1.0 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and no biases.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Width of one head; ``num_heads * head_dim`` need not be the model's width.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, unit_offset=False)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps, unit_offset=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of ``x [B, S, width]``, each ``[B, num_kv_heads, S, head_dim]``."""
        keys = split_heads(self.k_proj(x), self.num_kv_heads)
        if self.k_norm is not None:
            keys, _ = self.k_norm(keys)
        return apply_rotary(keys, rotary), split_heads(self.v_proj(x), self.num_kv_heads)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``x`` to the given keys.

        Args:
            x: ``[B, S, width]``, the queries' input.
            rotary: Angles of the queries' positions.
            keys: ``[B, num_kv_heads, K, head_dim]``, rotated.
            values: Same shape.
            mask: bool, False for what is invisible: ``[B, K]`` for all queries alike, or ``[B, S, K]``; None if
                everything is visible. One key must be True for each query.
            query_mask: bool ``[B, S]``; False queries mix to zero. None if there are none.

        Returns:
            ``[B, S, width]``.
        """
        batch, length, _ = x.shape
        queries = split_heads(self.q_proj(x), self.num_heads)
        if self.q_norm is not None:
            queries, _ = self.q_norm(queries)
        queries = apply_rotary(queries, rotary)
        # The query heads of one key head differ in nothing but their queries: as rows of one longer sequence they need
        # no repeated keys, and the products become larger.
        queries = queries.reshape(batch, self.num_kv_heads, -1, self.head_dim)
        if mask is not None:
            groups = self.num_heads // self.num_kv_heads
            mask = mask[:, None, None] if mask.dim() == 2 else mask.repeat(1, groups, 1)[:, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed = merge_heads(mixed.reshape(batch, self.num_heads, length, self.head_dim))
        if query_mask is not None:
            mixed = mixed.masked_fill(~query_mask[..., None], 0.0)
        return self.o_proj(mixed)


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, no biases; the activation is tanh-GELU or SiLU."""

    def __init__(self, width: int, mlp_dim: int, silu: bool = False) -> None:
        super().__init__()
        self.silu = silu
        self.gate_proj = nn.Linear(width, mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer, of a language tower (``adaptive=False``) or of the expert of Pi 0.5."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        adaptive: bool = False,
        flavour: Flavour = GEMMA,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads, num_kv_heads, head_dim, eps if flavour.qk_norm else None)
        self.mlp = GatedMLP(width, mlp_dim, flavour.silu)
        self.input_layernorm = AdaRMSNorm(width, eps) if adaptive else RMSNorm(width, eps, flavour.unit_offset)
        self.post_attention_layernorm = AdaRMSNorm(width, eps) if adaptive else RMSNorm(width, eps, flavour.unit_offset)

    def modulation(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """What the two adaptive norms make of conditions ``[B, width]``, for ``forward``."""
        return self.input_layernorm.modulation(cond), self.post_attention_layernorm.modulation(cond)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values that this layer would compute for ``x``; all that a last prefix layer is needed for."""
        return self.self_attn.keys_values(self.input_layernorm(x)[0], rotary)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        modulation: tuple[Tensor | None, Tensor | None] = (None, None),
        past: tuple[Tensor, Tensor] | None = None,
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: ``[B, S, width]``.
            rotary: Angles of the positions of ``x``.
            mask: bool ``[B, P + S]`` or ``[B, S, P + S]`` (P = 0 without ``past``), or None; see ``Attention``.
            modulation: From ``modulation``, for an adaptive layer.
            past: Keys and values ``[B, num_kv_heads, P, head_dim]`` that come before those of ``x``.
            query_mask: bool ``[B, S]`` or None; see ``Attention``.

        Returns:
            The output ``[B, S, width]`` and this layer's own keys and values ``[B, num_kv_heads, S, head_dim]``.
        """
        normed, gate = self.input_layernorm(x, modulation[0])
        keys, values = self.self_attn.keys_values(normed, rotary)
        seen_keys, seen_values = keys, values
        if past is not None:
            seen_keys = torch.cat((past[0].to(keys.dtype), keys), dim=2)
            seen_values = torch.cat((past[1].to(values.dtype), values), dim=2)
        x = _gated_residual(x, self.self_attn(normed, rotary, seen_keys, seen_values, mask, query_mask), gate)
        normed, gate = self.post_attention_layernorm(x, modulation[1])
        return _gated_residual(x, self.mlp(normed), gate), keys, values


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, heads * head_dim]`` -> ``[B, heads, S, head_dim]``."""
    batch, length, width = x.shape
    return x.view(batch, length, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, S, head_dim]`` -> ``[B, S, heads * head_dim]``."""
    return x.transpose(1, 2).flatten(2)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of rotary positions, half-split layout, float32.

    Args:
        position_ids: int64 ``[B, S]``.
        head_dim: Width of one head (even).
        theta: Base of the frequencies, 10000 in Gemma.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponents)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate ``x [B, heads, S, head_dim]``: first half with second half ("rotate_half" layout), in float32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _normalise(x: Tensor, eps: float) -> Tensor:
    """``x`` over its root mean square along the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _gated_residual(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """``x + update * gate``; the gate is used raw, and the language tower has none."""
    return x + (update if gate is None else update * gate)

"""Transformer blocks that the language tower and the action expert of Pi 0.5 share.

One implementation for both: the only difference is the normalization, plain RMSNorm in the language tower and
adaptive RMSNorm (scale, shift and gate from the flow-matching time) in the expert. Every linear that the quantizer
replaces (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj``) is a plain
``nn.Linear`` attribute that is only ever called, so that a module of the same call signature can take its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rotated queries and keys of one position set: (cos, sin), each float32 [B, 1, S, head_dim / 2].
Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """RMSNorm with the factor ``1 + weight`` (Gemma), computed in float32.

    ``forward(x [B, S, width], cond=None)`` gives ``(normalized x, None)``: there is no gate in the language tower.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return (_normalise(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and gate come from a condition: ``dense(cond)`` chunked in that order.

    ``forward(x [B, S, width], cond [B, width])`` gives ``(norm(x) * (1 + scale) + shift, gate [B, 1, width])``.
    The dense layer starts at zero, so that a new block is the identity (as the reference initializes it).
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.dense(cond)[:, None].chunk(3, dim=-1)
        normed = _normalise(x, self.eps) * (1.0 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and no biases.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Width of one head; ``num_heads * head_dim`` need not be the model's width.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values of ``x [B, S, width]``, each ``[B, num_kv_heads, S, head_dim]``."""
        batch, length, _ = x.shape
        shape = (batch, length, self.num_kv_heads, self.head_dim)
        keys = apply_rotary(self.k_proj(x).view(shape).transpose(1, 2), rotary)
        return keys, self.v_proj(x).view(shape).transpose(1, 2)

    def forward(self, x: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, key_mask: Tensor) -> Tensor:
        """Attend from ``x`` to the given keys.

        Args:
            x: ``[B, S, width]``, the queries' input.
            rotary: Angles of the queries' positions.
            keys: ``[B, num_kv_heads, K, head_dim]``, rotated.
            values: Same shape.
            key_mask: bool ``[B, K]``; False keys are invisible to every query. One must be True in each row.

        Returns:
            ``[B, S, width]``.
        """
        batch, length, _ = x.shape
        queries = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        queries = apply_rotary(queries, rotary)
        # The query heads of one key head differ in nothing but their queries, and the mask depends on keys only: as
        # rows of one longer sequence they need no repeated keys, and the products become larger.
        queries = queries.reshape(batch, self.num_kv_heads, -1, self.head_dim)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=key_mask[:, None, None, :])
        mixed = mixed.reshape(batch, self.num_heads, length, self.head_dim).transpose(1, 2)
        return self.o_proj(mixed.reshape(batch, length, self.num_heads * self.head_dim))


class GatedMLP(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``, no biases."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer, of the language tower (``adaptive=False``) or of the expert."""

    def __init__(
        self, width: int, mlp_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, adaptive: bool
    ) -> None:
        super().__init__()
        norm = AdaRMSNorm if adaptive else RMSNorm
        self.self_attn = Attention(width, num_heads, num_kv_heads, head_dim)
        self.mlp = GatedMLP(width, mlp_dim)
        self.input_layernorm = norm(width, eps)
        self.post_attention_layernorm = norm(width, eps)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values that this layer would compute for ``x``; all that a last prefix layer is needed for."""
        return self.self_attn.keys_values(self.input_layernorm(x)[0], rotary)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        key_mask: Tensor,
        cond: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: ``[B, S, width]``.
            rotary: Angles of the positions of ``x``.
            key_mask: bool ``[B, P + S]`` (``[B, S]`` without ``past``).
            cond: Condition ``[B, width]`` of the adaptive norms.
            past: Keys and values ``[B, num_kv_heads, P, head_dim]`` that come before those of ``x``.

        Returns:
            The output ``[B, S, width]`` and this layer's own keys and values ``[B, num_kv_heads, S, head_dim]``.
        """
        normed, gate = self.input_layernorm(x, cond)
        keys, values = self.self_attn.keys_values(normed, rotary)
        seen_keys, seen_values = keys, values
        if past is not None:
            seen_keys = torch.cat((past[0].to(keys.dtype), keys), dim=2)
            seen_values = torch.cat((past[1].to(values.dtype), values), dim=2)
        x = _gated_residual(x, self.self_attn(normed, rotary, seen_keys, seen_values, key_mask), gate)
        normed, gate = self.post_attention_layernorm(x, cond)
        return _gated_residual(x, self.mlp(normed), gate), keys, values


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

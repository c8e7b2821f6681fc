"""Attention blocks of the GR00T N1.5 action head: the adapter over the features and the diffusion transformer (DiT).

One block for both. In the DiT its first norm is modulated by the flow time and its second has no weights; a block
attends to its own tokens or, in the DiT's even layers, to the features, whose keys and values do not depend on the
time and come from outside. Layer norms and the residual stream are float32, products in the type of the weights, as
the official code computes under autocast. Names are those of the official checkpoint. There is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.models.gr00t_config import LAYER_NORM_EPS, StackConfig
from omega_qvla_core.models.layers import merge_heads, split_heads

FINAL_NORM_EPS = 1e-6
TIME_CHANNELS = 256
"""Sines and cosines of the timestep; fixed in the official code."""
LONGEST_PERIOD = 10000.0

# Keys and values of what a block attends to, each [B, heads, K, head_dim].
KeysValues = tuple[Tensor, Tensor]


class FloatLayerNorm(nn.LayerNorm):
    """LayerNorm that computes in float32 and gives float32, whatever the input's and the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class TimeLayerNorm(nn.Module):
    """LayerNorm without weights, scaled and shifted by the time: ``linear(silu(temb))`` chunked scale first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = FloatLayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)

    def modulation(self, activated: Tensor) -> Tensor:
        """Scale and shift ``[B, 1, 2 * width]`` for ``silu(temb)`` ``[B, width]``."""
        return self.linear(activated)[:, None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.float().chunk(2, dim=-1)
        return self.norm(x) * (1.0 + scale) + shift


class HeadAttention(nn.Module):
    """Multi-head attention with biases, without mask and positions."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of ``[B, K, context_width]``."""
        context = as_input_of(self.to_k, context)
        return split_heads(self.to_k(context), self.num_heads), split_heads(self.to_v(context), self.num_heads)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """Attend from ``x [B, S, width]`` to ``context``, or to itself."""
        x = as_input_of(self.to_q, x)
        queries = split_heads(self.to_q(x), self.num_heads)
        keys, values = self.keys_values(x) if context is None else context
        # A quantized linear may give another type than its neighbours.
        mixed = F.scaled_dot_product_attention(queries, keys.to(queries.dtype), values.to(queries.dtype))
        mixed = merge_heads(mixed)
        return self.to_out[0](as_input_of(self.to_out[0], mixed))


class _GeluLinear(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(as_input_of(self.proj, x)), approximate="tanh")


class FeedForward(nn.Module):
    """``net.2(gelu_tanh(net.0.proj(x)))`` with four times the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The official module has its dropout at index 1.
        self.net = nn.ModuleList([_GeluLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class HeadBlock(nn.Module):
    """``x + attention(norm1(x))``, then ``x + ff(norm3(x))``; no gates.

    Args:
        config: Sizes of the stack.
        context_width: Width of the features that it attends to; None for self-attention.
        modulated: Whether the flow time modulates the first norm.
    """

    def __init__(self, config: StackConfig, context_width: int | None, modulated: bool) -> None:
        super().__init__()
        width = config.width
        self.attends_to_features = context_width is not None
        self.norm1 = TimeLayerNorm(width) if modulated else FloatLayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn1 = HeadAttention(width, config.num_heads, context_width or width)
        self.norm3 = FloatLayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=not modulated)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, modulation: Tensor | None = None, context: KeysValues | None = None) -> Tensor:
        """``[B, S, width]``, float32, with the norm's modulation and the features' keys and values where it has any."""
        normed = self.norm1(x) if modulation is None else self.norm1(x, modulation)
        x = x + self.attn1(normed, context)
        return x + self.ff(self.norm3(x))


class Adapter(nn.Module):
    """Self-attention blocks over the features, padding included."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(HeadBlock(config, None, modulated=False) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` -> the same."""
        for block in self.transformer_blocks:
            x = block(x)
        return x


class TimestepEncoder(nn.Module):
    """Cosines and sines of the timestep, then two linears with SiLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.timestep_embedder.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """int64 ``[B]`` -> ``[B, width]``."""
        half = TIME_CHANNELS // 2
        # Divided by half - 1, unlike the action encoder's. Angles reach 1000 rad, so that even the order of the float32
        # operations counts: both functions keep the official one.
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = _angles(timestep, -math.log(LONGEST_PERIOD) * steps / (half - 1))
        channels = torch.cat((angles.cos(), angles.sin()), dim=-1)
        first, second = self.timestep_embedder.linear_1, self.timestep_embedder.linear_2
        return second(F.silu(first(as_input_of(first, channels))))


class DiT(nn.Module):
    """The diffusion transformer.

    Args:
        config: Sizes.
        context_width: Width of the features.
        output_dim: Width of the output.
        interleave: Whether odd blocks attend to their own tokens.
    """

    def __init__(self, config: StackConfig, context_width: int, output_dim: int, interleave: bool) -> None:
        super().__init__()
        width = config.width
        self.timestep_encoder = TimestepEncoder(width)
        self.transformer_blocks = nn.ModuleList(
            HeadBlock(config, None if interleave and index % 2 else context_width, modulated=True)
            for index in range(config.depth)
        )
        self.norm_out = FloatLayerNorm(width, eps=FINAL_NORM_EPS, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, output_dim)

    def contexts(self, features: Tensor) -> tuple[KeysValues | None, ...]:
        """Per block the keys and values of the features ``[B, T, context_width]``, None for self-attention."""
        return tuple(
            block.attn1.keys_values(features) if block.attends_to_features else None
            for block in self.transformer_blocks
        )

    def modulations(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """All that reads the timestep int64 ``[B]``: one ``[B, 1, 2 * width]`` per block, then that of the output."""
        temb = self.timestep_encoder(timestep)
        activated = F.silu(temb)
        blocks = [block.norm1.modulation(activated) for block in self.transformer_blocks]
        return (*blocks, self.proj_out_1(activated)[:, None])

    def forward(self, x: Tensor, modulations: Sequence[Tensor], contexts: Sequence[KeysValues | None]) -> Tensor:
        """Tokens ``[B, S, width]`` -> ``[B, S, output_dim]``."""
        x = x.float()
        for block, modulation, context in zip(self.transformer_blocks, modulations, contexts):
            x = block(x, modulation, context)
        # Shift first, the opposite of the blocks.
        shift, scale = modulations[-1].float().chunk(2, dim=-1)
        x = self.norm_out(x) * (1.0 + scale) + shift
        return self.proj_out_2(as_input_of(self.proj_out_2, x))


def action_time_features(timestep: Tensor, width: int) -> Tensor:
    """Sines, then cosines of timesteps int64 ``[B]``, float32 ``[B, width]``, for the action encoder."""
    steps = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    angles = _angles(timestep, -steps * (math.log(LONGEST_PERIOD) / (width // 2)))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def as_input_of(linear: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the type of the linear's weights; as it is for a quantized linear, which takes any."""
    weight = getattr(linear, "weight", None)
    return x if weight is None else x.to(weight.dtype)


def _angles(timestep: Tensor, exponents: Tensor) -> Tensor:
    return timestep.float()[:, None] * exponents.exp()

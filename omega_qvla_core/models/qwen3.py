"""The Qwen3 language tower of GR00T N1.5, cut at its selected layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.models.gr00t_config import Qwen3Config
from omega_qvla_core.models.layers import QWEN3, Block, RMSNorm, Rotary, rotary_angles


@dataclass(frozen=True)
class TowerAttention:
    """Positions and masks that all layers share.

    Attributes:
        rotary: Angles of the positions.
        visible: bool ``[B or 1, T, T]``.
        query_mask: bool ``[B, T]``, None without padding.
    """

    rotary: Rotary
    visible: Tensor
    query_mask: Tensor | None

    def through(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Output ``[B, T, width]`` of one layer."""
        return layer(x, self.rotary, self.visible, query_mask=self.query_mask)[0]


class Qwen3Tower(nn.Module):
    """Causal tower with rotary positions; its output is normalised.

    Padding behaves as in the attention kernel that the official release runs (flash attention with sequences cut out):
    keys at padding are never seen, and queries at padding mix to zero. Positions count padding too. What comes out at
    padding matters: the action head attends to it.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            Block(
                config.width,
                config.mlp_dim,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                config.rms_norm_eps,
                flavour=QWEN3,
            )
            for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.width, config.rms_norm_eps, QWEN3.unit_offset)

    def forward(self, x: Tensor, pad_mask: Tensor, complete: bool = False) -> Tensor:
        """Run the tower.

        Args:
            x: ``[B, T, width]``, embedded tokens.
            pad_mask: bool ``[B, T]``, False for padding.
            complete: Whether there is no padding.

        Returns:
            ``[B, T, width]``.
        """
        attention = self.attention(pad_mask, complete)
        for layer in self.layers:
            x = attention.through(layer, x)
        return self.norm(x)[0]

    def attention(self, pad_mask: Tensor, complete: bool = False) -> TowerAttention:
        """What every layer reads beside its input, for prompts of ``forward``'s mask."""
        length, device = pad_mask.shape[1], pad_mask.device
        positions = torch.arange(length, device=device)[None]
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
        if complete:
            return TowerAttention(rotary, visible, None)
        # Every query sees itself, so that a row without a visible key has a softmax at all.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        return TowerAttention(rotary, (visible & pad_mask[:, None]) | itself, pad_mask)

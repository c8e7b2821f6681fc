"""SigLIP vision tower in plain PyTorch, with the key names of the official PaliGemma checkpoints.

No class token, no pooling head, learned positions, pre-norm blocks with biases. Source of the computation: the vision
tower of PaliGemma as openpi's PyTorch port runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.layers import merge_heads, split_heads


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower.

    Attributes:
        width: Width of the tower.
        depth: Number of layers.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the MLPs.
        patch_size: Edge of a patch, pixels.
        image_size: Edge of the (square) image, pixels.
        layer_norm_eps: Epsilon of every LayerNorm.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f"vision.{field.name} is {getattr(self, field.name)}; it must be positive")
        if self.width % self.num_heads:
            raise ConfigError(f"vision.width {self.width} is not a multiple of vision.num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is not a multiple of vision.patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


class SiglipVision(nn.Module):
    """Vision encoder of kind ``siglip``: the same tower over every camera; reads neither text nor proprioception.

    Attributes:
        out_width: Width of its tokens, which a projector brings to the language tower's.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.out_width = config.width
        self.vision_model = _VisionModel(config)

    def forward(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        text: Tensor,
        text_mask: Tensor,
        state: Tensor | None,
        skip_absent: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all cameras, camera by camera.

        Args:
            images: One float tensor ``[B, 3, image_size, image_size]`` in [-1, 1] per camera.
            image_masks: One bool tensor ``[B]`` per camera; False means that the camera is absent.
            text: Not used.
            text_mask: Not used.
            state: Not used.
            skip_absent: Do not run the tower over absent cameras; their tokens are then zeros.

        Returns:
            Tokens ``[B, cameras * num_patches, width]`` and their mask, bool ``[B, cameras * num_patches]``.

        Raises:
            ValueError: If an image does not have the configured size.
        """
        size = self.config.image_size
        for index, image in enumerate(images):
            if tuple(image.shape[1:]) != (3, size, size):
                raise ValueError(f"image {index} has shape {tuple(image.shape)}; it must be [B, 3, {size}, {size}]")
        stacked = torch.stack(tuple(images), dim=1)
        present = torch.stack(tuple(image_masks), dim=1)
        mask = present.repeat_interleave(self.config.num_patches, dim=1)
        if not skip_absent or bool(present.all()):
            tokens = self.encode(stacked.flatten(0, 1))
        else:
            seen = self.encode(stacked[present])
            tokens = seen.new_zeros(present.numel(), *seen.shape[1:])
            tokens[present.flatten()] = seen
        return tokens.view(stacked.shape[0], -1, self.config.width), mask

    def encode(self, images: Tensor) -> Tensor:
        """Tokens ``[N, num_patches, width]`` of images ``[N, 3, image_size, image_size]``; N may be 0.

        Raises:
            ValueError: If the images do not have the configured size.
        """
        size = self.config.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; they must be [N, 3, {size}, {size}]")
        return self.vision_model(images)


class _VisionModel(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        # Embeddings may be kept in float32 under a bfloat16 tower.
        x = self.embeddings(images).to(self.post_layernorm.weight.dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class _Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class _Layer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.self_attn = _SelfAttention(config.width, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = _MLP(config.width, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            split_heads(projection(x), self.num_heads) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(queries, keys, values)))


class _MLP(nn.Module):
    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

"""A small vision encoder for policies that are trained from scratch: convolutional stem + text-queried keypoints.

Patches of a ViT need far more data than a tabletop set of demonstrations holds. Here every camera has a convolutional
stem whose coarse map becomes ``GRID x GRID`` patch tokens, and one *keypoint token*: the pooled instruction queries two
feature maps by attention over positions (a spatial softmax), and the token holds where each query looks and what it
sees there. "The red cube" thus becomes image coordinates, which patches alone had no time to learn. Proprioception
comes as one more token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 4
"""Patch tokens per side and camera."""


@dataclass(frozen=True)
class KeypointConfig:
    """Sizes of the keypoint vision encoder.

    Attributes:
        image_size: Height and width of every camera image in pixels; a multiple of 32.
        num_cameras: Number of cameras; each has a stem of its own, since a front and a wrist view share little.
        state_dim: Width of the (normalised) proprioception vector.
        stem_channels: Channels of the maps at 1/2, 1/4 and 1/8 of the image's size.
        num_queries: Keypoint queries on each of the two maps (1/4 and 1/8 of the image's size).
        key_dim: Width of the query and key vectors.
        value_dim: Width of the feature that a query reads.
    """

    image_size: int = 64
    num_cameras: int = 2
    state_dim: int = 7
    stem_channels: tuple[int, int, int] = (24, 48, 96)
    num_queries: int = 6
    key_dim: int = 32
    value_dim: int = 16

    @property
    def tokens_per_camera(self) -> int:
        """Patch tokens and the keypoint token of one camera."""
        return GRID * GRID + 1

    @property
    def num_tokens(self) -> int:
        """All tokens that the encoder gives, the proprioception token last."""
        return self.num_cameras * self.tokens_per_camera + 1


class KeypointReader(nn.Module):
    """Reads one feature map where the instruction tells it to look.

    Args:
        channels: Channels of the map.
        size: Height and width of the map.
        text_dim: Width of the pooled instruction.
        config: Sizes.
    """

    def __init__(self, channels: int, size: int, text_dim: int, config: KeypointConfig) -> None:
        super().__init__()
        self.num_queries, self.key_dim = config.num_queries, config.key_dim
        self.query = nn.Linear(text_dim, config.num_queries * config.key_dim)
        self.key = nn.Conv2d(channels, config.key_dim, 1)
        self.value = nn.Conv2d(channels, config.value_dim, 1)
        centre = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
        grid = torch.stack([centre[None, :].expand(size, size), centre[:, None].expand(size, size)])
        self.register_buffer("grid", grid.reshape(2, size * size), persistent=False)
        self.out_dim = config.num_queries * (2 + config.value_dim)

    def forward(self, feature_map: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a map.

        Args:
            feature_map: ``[B, C, S, S]``.
            text: ``[B, text_dim]``.

        Returns:
            ``[B, num_queries * (2 + value_dim)]`` coordinates in [-1, 1] (x, y) and features of every query, and the
            attention logits ``[B, num_queries, S * S]``.
        """
        batch = feature_map.shape[0]
        query = self.query(text).view(batch, self.num_queries, self.key_dim)
        key = self.key(feature_map).flatten(2)
        logits = torch.bmm(query, key) * self.key_dim**-0.5
        read = torch.cat([self.grid.to(key.dtype).expand(batch, -1, -1), self.value(feature_map).flatten(2)], dim=1)
        seen = torch.bmm(logits.float().softmax(dim=-1).to(read.dtype), read.transpose(1, 2))
        return seen.flatten(1), logits


class CameraEncoder(nn.Module):
    """Stem, patch tokens and keypoint token of one camera."""

    def __init__(self, config: KeypointConfig, width: int) -> None:
        super().__init__()
        c1, c2, c3 = config.stem_channels
        self.conv1 = nn.Conv2d(3, c1, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        merge = config.image_size // 8 // GRID
        self.patch = nn.Conv2d(c3, width, merge, stride=merge)
        self.position = nn.Parameter(nn.init.normal_(torch.empty(GRID * GRID, width)).mul_(0.02))
        self.fine = KeypointReader(c2, config.image_size // 4, width, config)
        self.coarse = KeypointReader(c3, config.image_size // 8, width, config)
        self.keypoint = nn.Linear(self.fine.out_dim + self.coarse.out_dim, width)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image ``[B, 3, H, W]`` and pooled text ``[B, width]`` -> tokens ``[B, 17, width]``, fine logits."""
        half = F.gelu(self.conv1(image))
        quarter = F.gelu(self.conv2(half))
        eighth = F.gelu(self.conv3(quarter))
        patches = self.patch(eighth).flatten(2).transpose(1, 2) + self.position
        fine, logits = self.fine(quarter, text)
        coarse, _ = self.coarse(eighth, text)
        keypoint = self.keypoint(torch.cat([fine, coarse], dim=-1))
        return torch.cat([patches, keypoint[:, None]], dim=1), logits


class KeypointVision(nn.Module):
    """The vision encoder of the tabletop policy. See the module's docstring.

    Args:
        config: Sizes.
        lm_width: Width of the language tower, which reads the tokens.
    """

    def __init__(self, config: KeypointConfig, lm_width: int) -> None:
        super().__init__()
        if config.image_size % (8 * GRID):
            raise ValueError(f"vision.image_size {config.image_size} is not a multiple of {8 * GRID}")
        self.config = config
        self.text = nn.Sequential(nn.Linear(lm_width, lm_width), nn.GELU(), nn.Linear(lm_width, lm_width))
        self.cameras = nn.ModuleList(CameraEncoder(config, lm_width) for _ in range(config.num_cameras))
        self.state = nn.Sequential(nn.Linear(config.state_dim, lm_width), nn.GELU(), nn.Linear(lm_width, lm_width))
        self.attention_logits: list[Tensor] = []
        """Fine attention logits of every camera, kept in training mode only, for the grounding loss."""

    def forward(
        self,
        images: list[Tensor],
        image_masks: list[Tensor],
        text: Tensor,
        text_mask: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode all cameras and the proprioception.

        Args:
            images: One ``[B, 3, S, S]`` float tensor in [-1, 1] per camera.
            image_masks: One bool ``[B]`` per camera; a masked camera's tokens are not attended to.
            text: ``[B, L, lm_width]`` embedded instruction.
            text_mask: bool ``[B, L]``.
            state: ``[B, state_dim]`` normalised proprioception.

        Returns:
            Tokens ``[B, num_tokens, lm_width]`` and their mask ``[B, num_tokens]``.

        Raises:
            ValueError: Another number of cameras than configured, or no state.
        """
        if len(images) != len(self.cameras) or state is None:
            raise ValueError(f"the keypoint encoder needs {len(self.cameras)} cameras and a state, got {len(images)}")
        weight = text_mask.to(text.dtype)[..., None]
        pooled = self.text((text * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0))
        tokens, masks, logits = [], [], []
        for encoder, image, mask in zip(self.cameras, images, image_masks, strict=True):
            camera_tokens, camera_logits = encoder(image, pooled)
            tokens.append(camera_tokens)
            masks.append(mask[:, None].expand(-1, camera_tokens.shape[1]))
            logits.append(camera_logits)
        tokens.append(self.state(state)[:, None])
        masks.append(torch.ones_like(masks[0][:, :1]))
        self.attention_logits = logits if self.training else []
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1)

"""What is run in a comparison: models by name, shapes, and inputs of a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.policy_processor import ModelInputs

ModelConfig = Pi05Config | Gr00tConfig


@dataclass(frozen=True)
class BenchShape:
    """Sizes of one inference.

    Attributes:
        cameras: Cameras that are present.
        text_tokens: Tokens of the prompt, without those of images.
        horizon: Steps of the chunk.
        num_steps: Denoise steps.
    """

    cameras: int
    text_tokens: int
    horizon: int
    num_steps: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"shape: {name} is {value}; it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> BenchShape:
        """Read ``cameras/text/chunk/steps``, such as ``3/200/50/10``.

        Raises:
            ConfigError: It is not of that form.
        """
        parts = text.split("/")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise ConfigError(f"shape {text!r} is not cameras/text/chunk/steps, such as 3/200/50/10")
        return cls(*(int(part) for part in parts))

    def __str__(self) -> str:
        return f"{self.cameras}/{self.text_tokens}/{self.horizon}/{self.num_steps}"


MODELS = ("tabletop", "pi05", "gr00t_n15")

SHAPES: dict[str, tuple[BenchShape, ...]] = {
    "tabletop": (BenchShape(2, 6, 16, 4),),
    "pi05": (BenchShape(3, 200, 50, 10), BenchShape(2, 21, 10, 10)),
    "gr00t_n15": (BenchShape(2, 20, 16, 4), BenchShape(2, 20, 16, 8)),
}
"""Shapes that are measured where none is given: openpi's padded one and LIBERO's real work; four and eight steps."""


def shaped(config: ModelConfig, shape: BenchShape) -> ModelConfig:
    """The configuration with the shape's chunk and room for its prompt.

    Raises:
        ConfigError: The vision encoder has another number of cameras.
    """
    if isinstance(config, Gr00tConfig):
        return replace(config, action_horizon=shape.horizon)
    if isinstance(config.vision, KeypointConfig) and config.vision.num_cameras != shape.cameras:
        raise ConfigError(f"shape {shape} has {shape.cameras} cameras; this model has {config.vision.num_cameras}")
    return replace(config, action_horizon=shape.horizon, max_token_len=max(config.max_token_len, shape.text_tokens))


def model_inputs(config: ModelConfig, shape: BenchShape, device: str | torch.device) -> ModelInputs:
    """Random images, one prompt of the shape's length, a state of zeros; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    images = [torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for _ in range(shape.cameras)]
    present = torch.ones(1, dtype=torch.bool, device=device)
    tokens = _tokens(config, shape).to(device)
    state_dim = _state_dim(config)
    return ModelInputs(
        images=[image.to(device) for image in images],
        image_masks=[present for _ in images],
        tokens=tokens,
        token_mask=torch.ones_like(tokens, dtype=torch.bool),
        state=torch.zeros(1, state_dim, device=device),
        measured=np.zeros((1, state_dim)),
        embodiment=(0,) if isinstance(config, Gr00tConfig) else None,
    )


def start_noise(config: ModelConfig) -> Tensor:
    """float32 ``[1, H, A]``, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, config.action_horizon, config.action_dim, generator=generator)


def _tokens(config: ModelConfig, shape: BenchShape) -> Tensor:
    text = torch.arange(shape.text_tokens) % 7 + 1
    if isinstance(config, Gr00tConfig):
        seen = torch.full((shape.cameras * config.vision.num_patches,), config.language.image_token_id)
        return torch.cat((seen, text))[None]
    return text[None]


def _state_dim(config: ModelConfig) -> int:
    if isinstance(config, Gr00tConfig):
        return config.state_dim
    return config.vision.state_dim if isinstance(config.vision, KeypointConfig) else config.action_dim

"""Blank inputs of a shape, to try the CPU engine with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.runtime.engine import EngineShape


def example_inputs(config: Pi05Config | Gr00tConfig, shape: EngineShape) -> ModelInputs:
    """Black images, a prompt of one token over and over (and the images' tokens, in GR00T N1.5), a state of zeros."""
    size, is_gr00t = config.vision.image_size, isinstance(config, Gr00tConfig)
    present = torch.ones(1, dtype=torch.bool)
    tokens = _gr00t_tokens(config, shape) if is_gr00t else torch.zeros(1, shape.text_tokens, dtype=torch.int64)
    state_dim = config.state_dim if is_gr00t else _pi05_state_dim(config)
    return ModelInputs(
        images=[torch.full((1, 3, size, size), -1.0) for _ in range(shape.cameras)],
        image_masks=[present for _ in range(shape.cameras)],
        tokens=tokens,
        token_mask=torch.ones_like(tokens, dtype=torch.bool),
        state=torch.zeros(1, state_dim),
        measured=np.zeros((1, state_dim)),
        embodiment=(shape.embodiment,) if is_gr00t else None,
    )


def _gr00t_tokens(config: Gr00tConfig, shape: EngineShape) -> Tensor:
    image = config.language.image_token_id
    tokens = torch.full((1, shape.text_tokens), 0 if image else 1)
    tokens[:, : shape.cameras * config.vision.num_patches] = image
    return tokens


def _pi05_state_dim(config: Pi05Config) -> int:
    return config.vision.state_dim if isinstance(config.vision, KeypointConfig) else config.action_dim

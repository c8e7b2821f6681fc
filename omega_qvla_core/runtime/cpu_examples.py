"""What the CPU engine does before the language tower: embeddings of cameras and prompt, and inputs to try it with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.runtime.engine import EngineShape


def embed(model: Pi05, inputs: ModelInputs) -> Tensor:
    """Embeddings ``[P, lm_width]`` of the cameras and tokens that are there."""
    return inputs.embed(model).embeddings[0]


def example_inputs(config: Pi05Config, shape: EngineShape) -> ModelInputs:
    """Blank inputs of a shape: black images, the first token of the table, a state of zeros."""
    size = config.vision.image_size
    present = torch.ones(1, dtype=torch.bool)
    state_dim = config.vision.state_dim if isinstance(config.vision, KeypointConfig) else config.action_dim
    return ModelInputs(
        images=[torch.full((1, 3, size, size), -1.0) for _ in range(shape.cameras)],
        image_masks=[present for _ in range(shape.cameras)],
        tokens=torch.zeros(1, shape.text_tokens, dtype=torch.int64),
        token_mask=torch.ones(1, shape.text_tokens, dtype=torch.bool),
        state=torch.zeros(1, state_dim),
        measured=np.zeros((1, state_dim)),
    )

"""Small models of both families with random weights, and inputs for them."""

from __future__ import annotations

import torch

from omega_qvla_core.models.gr00t_config import Gr00tConfig, Qwen3Config, StackConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig

IMAGE_TOKEN = 19
VISION = SiglipConfig(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=14, image_size=28)


def pi05_config() -> Pi05Config:
    return Pi05Config(
        lm_width=32,
        lm_depth=2,
        lm_mlp_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        expert_width=16,
        expert_mlp_dim=32,
        vocab_size=20,
        action_dim=7,
        action_horizon=6,
        max_token_len=8,
        vision=VISION,
    )


def gr00t_config(**changes) -> Gr00tConfig:
    sizes = {
        "language": Qwen3Config(
            width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=20, image_token_id=19
        ),
        "vision": VISION,
        "feature_width": 24,
        "project_features": True,
        "adapter": StackConfig(depth=2, num_heads=3, head_dim=8),
        "dit": StackConfig(depth=4, num_heads=2, head_dim=8),
        "hidden_size": 12,
        "future_tokens": 3,
        "state_dim": 9,
        "action_dim": 7,
        "action_horizon": 6,
        "num_embodiments": 4,
        "max_positions": 10,
    }
    return Gr00tConfig(**{**sizes, **changes})


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, also where a new model has zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def noise_for(model, batch: int) -> torch.Tensor:
    shape = (batch, model.config.action_horizon, model.config.action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def pi05_inputs(batch: int = 2) -> dict:
    """Camera 1 is absent in row 0, camera 2 everywhere; prompts of 3 and 5 of 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 5])[:batch, None]
    return {
        "images": [torch.rand(batch, 3, 28, 28, generator=generator) * 2 - 1 for _ in range(3)],
        "image_masks": [
            torch.ones(batch, dtype=torch.bool),
            torch.arange(batch) != 0,
            torch.zeros(batch, dtype=torch.bool),
        ],
        "tokens": torch.randint(1, 19, (batch, 8), generator=generator),
        "token_mask": torch.arange(8) < lengths,
        "state": torch.randn(batch, 7, generator=generator),
    }


def gr00t_inputs(batch: int = 2, padding: int = 0) -> dict:
    """Two cameras of 4 tokens each, 5 words, then padding on the left that all rows have."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 19, (batch, 5), generator=generator)
    image = torch.full((batch, 8), IMAGE_TOKEN)
    pad = torch.zeros(batch, padding, dtype=torch.int64)
    tokens = torch.cat((pad, image, words), dim=1)
    return {
        "images": [torch.rand(batch, 3, 28, 28, generator=generator) * 2 - 1 for _ in range(2)],
        "image_masks": [torch.ones(batch, dtype=torch.bool)] * 2,
        "tokens": tokens,
        "token_mask": torch.arange(tokens.shape[1]).expand_as(tokens) >= padding,
        "state": torch.randn(batch, 9, generator=generator),
    }


def small_model(family: str) -> torch.nn.Module:
    """A random model of a family by name."""
    return randomised(Pi05(pi05_config()) if family == "pi05" else Gr00tN15(gr00t_config()))


def small_inputs(family: str, batch: int = 2) -> dict:
    """Arguments of ``embed_prefix``."""
    return pi05_inputs(batch) if family == "pi05" else gr00t_inputs(batch)

"""Models to measure: sizes by name, random weights.

``mid`` is small enough for seconds per chunk on two CPU cores and large enough that products outweigh calls; ``tiny``
is for tests.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from omega_qvla_core.checkpoints.families import build_model, family_of_config
from omega_qvla_core.checkpoints.strict_loading import tensor_dtype
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig, Qwen3Config, StackConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig

SIZES = ("tiny", "mid", "full")

# Standard deviation of the random weights; small enough for finite activations at any depth.
_WEIGHT_STD = 0.02

_SO400M = SiglipConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304, patch_size=14, image_size=224)
_MID_VISION = SiglipConfig(width=256, depth=4, num_heads=4, mlp_dim=1024, patch_size=14, image_size=224)
_TINY_VISION = SiglipConfig(width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=14, image_size=56)

_PI05_FULL = Pi05Config(
    lm_width=2048,
    lm_depth=18,
    lm_mlp_dim=16384,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    expert_width=1024,
    expert_mlp_dim=4096,
    vocab_size=257152,
    action_dim=32,
    action_horizon=50,
    max_token_len=200,
    vision=_SO400M,
)
_GR00T_FULL = Gr00tConfig(
    language=Qwen3Config(2048, 12, 6144, 16, 8, 128, 151680, 151669),
    vision=_SO400M,
    feature_width=2048,
    adapter=StackConfig(4, 32, 64),
    dit=StackConfig(16, 32, 48),
    hidden_size=1024,
    future_tokens=32,
    state_dim=64,
    action_dim=32,
    action_horizon=16,
)

PRESETS: dict[tuple[str, str], Pi05Config | Gr00tConfig] = {
    ("pi05", "full"): _PI05_FULL,
    ("pi05", "mid"): replace(
        _PI05_FULL,
        lm_width=384,
        lm_depth=6,
        lm_mlp_dim=1536,
        num_heads=6,
        head_dim=64,
        expert_width=192,
        expert_mlp_dim=768,
        vocab_size=4096,
        vision=_MID_VISION,
    ),
    ("pi05", "tiny"): replace(
        _PI05_FULL,
        lm_width=64,
        lm_depth=3,
        lm_mlp_dim=128,
        num_heads=4,
        head_dim=16,
        expert_width=32,
        expert_mlp_dim=64,
        vocab_size=300,
        max_token_len=48,
        vision=_TINY_VISION,
    ),
    ("gr00t_n15", "full"): _GR00T_FULL,
    ("gr00t_n15", "mid"): replace(
        _GR00T_FULL,
        language=Qwen3Config(384, 6, 1152, 6, 3, 64, 4096, 4000),
        vision=_MID_VISION,
        feature_width=384,
        adapter=StackConfig(2, 6, 64),
        dit=StackConfig(8, 8, 48),
        hidden_size=256,
        num_embodiments=4,
    ),
    ("gr00t_n15", "tiny"): replace(
        _GR00T_FULL,
        language=Qwen3Config(64, 3, 128, 4, 2, 16, 320, 300),
        vision=_TINY_VISION,
        feature_width=64,
        adapter=StackConfig(2, 4, 16),
        dit=StackConfig(4, 2, 16),
        hidden_size=24,
        num_embodiments=4,
    ),
}


def preset(family: str, size: str) -> Pi05Config | Gr00tConfig:
    """Sizes by name.

    Raises:
        ConfigError: If family or size is unknown.
    """
    if (family, size) not in PRESETS:
        known = ", ".join(f"{one} {other}" for one, other in PRESETS)
        raise ConfigError(f"there is no preset {family} {size}; known: {known}")
    return PRESETS[(family, size)]


def random_model(config: Pi05Config | Gr00tConfig, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model with random weights, made where it runs and in its own type."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is not available: torch finds no CUDA GPU; use cpu")
    with torch.device("meta"):
        model = build_model(config)
    family, generator = family_of_config(config), torch.Generator(device).manual_seed(seed)
    for name, empty in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.empty(empty.shape, device=device, dtype=tensor_dtype(name, family, dtype))
        value.normal_(std=_WEIGHT_STD, generator=generator)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return model.eval()

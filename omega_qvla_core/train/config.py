"""Configuration of a training run, as data with a schema."""

from __future__ import annotations

from dataclasses import dataclass, fields

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05 import Pi05Config

HORIZON = 16
"""Steps of an action chunk: 0.8 s at 20 Hz."""


@dataclass(frozen=True)
class TrainConfig:
    """One behaviour-cloning run.

    The defaults are the recipe of the shipped policy; docs/training.md tells where each comes from.

    Attributes:
        steps: Optimiser steps.
        batch: Observations per step.
        noise_samples: (noise, time) pairs per observation; they share one pass of the prefix.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Linear warm-up.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: Largest gradient norm.
        ema: Decay of the averaged weights, which are the ones that are exported.
        seed: Seed of weights, batches, noise and augmentation.
        counterfactual: Share of observations whose instruction names a random colour. Where that is another colour
            than the demonstration's, the flow loss is masked and only the grounding losses are taken.
        far_weight: How much more often a frame is drawn whose tool is further than ``far_distance_m`` from the cube.
        far_distance_m: See ``far_weight``.
        readout_weight: Weight of the object-position readout loss; 0 for an ablation.
        grounding_weight: Weight of the keypoint attention loss; 0 for an ablation.
        jitter: Largest relative change of brightness and contrast.
        state_noise: Standard deviation of the noise on the normalised proprioception.
        log_every: Steps between two lines of the log.
        save_every: Steps between two resumable states.
    """

    steps: int = 6000
    batch: int = 512
    noise_samples: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0
    counterfactual: float = 0.35
    far_weight: float = 2.0
    far_distance_m: float = 0.12
    readout_weight: float = 3.0
    grounding_weight: float = 0.3
    jitter: float = 0.2
    state_noise: float = 0.02
    log_every: int = 100
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "noise_samples", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.counterfactual <= 1 or not 0 <= self.ema < 1:
            raise ConfigError(
                f"train.counterfactual {self.counterfactual} and train.ema {self.ema} must be within 0..1"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"train.warmup_steps {self.warmup_steps} must be below train.steps {self.steps}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(field.name for field in fields(cls))


def tabletop_model_config(vocab_size: int, max_token_len: int, state_dim: int, action_dim: int) -> Pi05Config:
    """Sizes of the shipped policy: all quantized widths are multiples of 64, the quantizer's group and block."""
    return Pi05Config(
        lm_width=128,
        lm_depth=3,
        lm_mlp_dim=384,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        expert_width=128,
        expert_mlp_dim=384,
        vocab_size=vocab_size,
        action_dim=action_dim,
        action_horizon=HORIZON,
        max_token_len=max_token_len,
        vision=KeypointConfig(image_size=64, num_cameras=2, state_dim=state_dim),
    )

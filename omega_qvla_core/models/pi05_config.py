"""Sizes of a Pi 0.5 model, as stored in a checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.keypoint_vision import KeypointConfig, KeypointVision
from omega_qvla_core.models.siglip import SiglipConfig, SiglipVision
from omega_qvla_core.strict_json import dataclass_from_json, dataclass_to_json

VisionConfig = SiglipConfig | KeypointConfig

# "kind" in config.json -> class of the encoder's configuration.
_VISION_KINDS: dict[str, type] = {"siglip": SiglipConfig, "keypoint": KeypointConfig}


@dataclass(frozen=True)
class Pi05Config:
    """Sizes and constants of the language tower, the action expert and the flow-matching head.

    Attributes:
        lm_width: Width of the language tower.
        lm_depth: Layers of the language tower, and of the expert, which attends to it layer by layer.
        lm_mlp_dim: Hidden width of the language tower's MLPs.
        num_heads: Query heads of both towers.
        num_kv_heads: Key and value heads of both towers.
        head_dim: Width of one head of both towers.
        expert_width: Width of the action expert and of the time embedding.
        expert_mlp_dim: Hidden width of the expert's MLPs.
        vocab_size: Rows of the token table.
        action_dim: Width of the model's actions (padded width for official checkpoints).
        action_horizon: Steps of one action chunk.
        max_token_len: Length of the padded prompt, tokens.
        vision: Sizes of the vision encoder; its type chooses the encoder.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        time_min_period: Shortest period of the time embedding (time runs from 1 to 0).
        time_max_period: Longest period of the time embedding.
    """

    lm_width: int
    lm_depth: int
    lm_mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_width: int
    expert_mlp_dim: int
    vocab_size: int
    action_dim: int
    action_horizon: int
    max_token_len: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    time_min_period: float = 4e-3
    time_max_period: float = 4.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "vision" and value <= 0:
                raise ConfigError(f"model.{field.name} is {value}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}"
            )
        for name in ("head_dim", "expert_width"):
            if getattr(self, name) % 2:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be even")

    @property
    def vision_kind(self) -> str:
        """``siglip`` or ``keypoint``."""
        return next(kind for kind, config in _VISION_KINDS.items() if isinstance(self.vision, config))

    @classmethod
    def from_json(cls, data: object, where: str = "model") -> Pi05Config:
        """Read the ``model`` object of ``config.json``.

        Raises:
            ConfigError: For an unknown key (naming the nearest valid one), a missing key, or a value out of range.
        """
        return dataclass_from_json(cls, data, where, readers={"vision": _vision_from_json})

    def to_json(self) -> dict[str, Any]:
        """The object that ``from_json`` reads back to an equal configuration."""
        values = dataclass_to_json(self)
        values["vision"] = {"kind": self.vision_kind, **values["vision"]}
        return values

    @classmethod
    def from_reference_json(cls, data: Mapping[str, Any]) -> Pi05Config:
        """Map the flat ``config.json`` of reference fixtures (one SigLIP tower, sizes by other names) to ours.

        Keys that describe the reference run (seeds, names) are ignored; sizes are not guessed.

        Raises:
            ConfigError: If a size is missing.
        """
        try:
            vision = SiglipConfig(
                width=data["vision_width"],
                depth=data["vision_depth"],
                num_heads=data["vision_heads"],
                mlp_dim=data["vision_mlp_dim"],
                patch_size=data["patch_size"],
                image_size=data["image_size"],
                layer_norm_eps=data["vision_layer_norm_eps"],
            )
            same = {field.name: data[field.name] for field in fields(cls) if field.name != "vision"}
        except KeyError as error:
            raise ConfigError(f"reference config.json lacks the key {error}; it must state every size") from error
        return cls(**same, vision=vision)


def build_vision(config: Pi05Config) -> nn.Module:
    """The vision encoder that ``config.vision`` asks for.

    Every encoder is called as ``encoder(images, image_masks, text, text_mask, state)`` and returns the tokens of all
    cameras, ``[B, N, width]``, with their mask ``[B, N]``. The width is ``lm_width``, or ``encoder.out_width`` for an
    encoder whose tokens a projector brings to ``lm_width``.
    """
    if isinstance(config.vision, SiglipConfig):
        return SiglipVision(config.vision)
    return KeypointVision(config.vision, config.lm_width)


def _vision_from_json(data: object, where: str) -> VisionConfig:
    if isinstance(data, SiglipConfig | KeypointConfig):
        return data
    if not isinstance(data, Mapping) or data.get("kind") not in _VISION_KINDS:
        found = data.get("kind") if isinstance(data, Mapping) else data
        raise ConfigError(f"{where}.kind is {found!r}; it must be one of {', '.join(_VISION_KINDS)}")
    sizes = {key: value for key, value in data.items() if key != "kind"}
    return dataclass_from_json(_VISION_KINDS[data["kind"]], sizes, where)

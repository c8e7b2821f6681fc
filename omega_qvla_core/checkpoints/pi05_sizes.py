"""Sizes of Pi 0.5 from the files of openpi and LeRobot, which name variants instead of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omega_qvla_core.checkpoints.tensor_names import model_names
from omega_qvla_core.checkpoints.weight_files import WeightFiles
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig

# width, depth, mlp_dim, num_heads, num_kv_heads, head_dim of openpi's gemma.get_config.
_VARIANTS = {
    "gemma_2b": (2048, 18, 16384, 8, 1, 256),
    "gemma_300m": (1024, 18, 4096, 8, 1, 256),
}
DEFAULT_LANGUAGE, DEFAULT_EXPERT = "gemma_2b", "gemma_300m"
VOCABULARY = 257152
MAX_TOKENS = 200
DEFAULT_STEPS = 10
_SO400M = SiglipConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304, patch_size=14, image_size=224)


def pi05_config(
    language: object, expert: object, action_dim: int, horizon: int, max_tokens: int, image_size: int, where: str
) -> Pi05Config:
    """Sizes of two variants.

    Raises:
        ConfigError: If a variant is unknown or the two do not go together.
    """
    sizes = []
    for field, name in (("paligemma_variant", language), ("action_expert_variant", expert)):
        if name not in _VARIANTS:
            raise ConfigError(f"{where}: {field} is {name!r}; this release knows {', '.join(_VARIANTS)}")
        sizes.append(_VARIANTS[str(name)])
    (lm_width, depth, lm_mlp, heads, kv_heads, head_dim), (expert_width, _, expert_mlp, *_) = sizes
    vision = SiglipConfig(**{**vars(_SO400M), "image_size": image_size})
    return Pi05Config(
        lm_width=lm_width,
        lm_depth=depth,
        lm_mlp_dim=lm_mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        expert_width=expert_width,
        expert_mlp_dim=expert_mlp,
        vocab_size=VOCABULARY,
        action_dim=action_dim,
        action_horizon=horizon,
        max_token_len=max_tokens,
        vision=vision,
    )


def openpi_config(config: Mapping[str, Any], horizon: int | None, weights: WeightFiles, where: str) -> Pi05Config:
    """Sizes of an openpi folder.

    Args:
        config: Decoded ``config.json`` of the converter, or an explicit list of sizes (``"kind": "pi05"``); empty for
            folders of openpi's own training script, which writes none.
        horizon: Steps of a chunk that the robot setup states.
        weights: The headers.
        where: Name of ``config.json`` in messages.

    Raises:
        ConfigError: If sizes are missing or contradict each other.
    """
    if config.get("kind") == "pi05":
        try:
            # Through our own reader, which checks the type of every number.
            found = Pi05Config.from_json(Pi05Config.from_reference_json(config).to_json(), where)
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{where}: a size is no positive number ({error})") from error
        if horizon not in (None, found.action_horizon):
            raise ConfigError(f"{where}: action_horizon is {found.action_horizon}, robot.horizon {horizon}; must agree")
        return found
    stated = config.get("action_horizon")
    if stated is None and horizon is None:
        raise ConfigError(f"{where} does not state action_horizon; set robot.horizon to the steps of a trained chunk")
    if stated is not None and horizon not in (None, stated):
        raise ConfigError(f"{where}: action_horizon is {stated}, robot.horizon is {horizon}; they must agree")
    return pi05_config(
        config.get("paligemma_variant", DEFAULT_LANGUAGE),
        config.get("action_expert_variant", DEFAULT_EXPERT),
        number(config.get("action_dim", _action_dim(weights)), "action_dim", where),
        number(stated if stated is not None else horizon, "action_horizon", where),
        MAX_TOKENS,
        _SO400M.image_size,
        where,
    )


def lerobot_config(config: Mapping[str, Any], where: str) -> Pi05Config:
    """Sizes of a LeRobot folder.

    Raises:
        ConfigError: If a field is missing, or asks for a computation that this release does not have.
    """
    for field in ("use_visual_memory", "use_proprioceptive_memory"):
        if config.get(field, False):
            raise ConfigError(f"{where}: {field} is true; this release computes Pi 0.5 without memory")
    resolution = config.get("image_resolution", [224, 224])
    if not isinstance(resolution, list) or len(resolution) != 2 or resolution[0] != resolution[1]:
        raise ConfigError(f"{where}: image_resolution is {resolution!r}; the network sees square images")
    for field, wanted in (("min_period", 4e-3), ("max_period", 4.0)):
        if config.get(field, wanted) != wanted:
            raise ConfigError(f"{where}: {field} is {config[field]!r}; this release computes with {wanted}")
    return pi05_config(
        config.get("paligemma_variant"),
        config.get("action_expert_variant"),
        number(config.get("max_action_dim"), "max_action_dim", where),
        number(config.get("chunk_size"), "chunk_size", where),
        number(config.get("tokenizer_max_length", MAX_TOKENS), "tokenizer_max_length", where),
        number(resolution[0], "image_resolution", where),
        where,
    )


def number(value: object, field: str, where: str) -> int:
    """A positive whole number of a foreign file; ConfigError names file and field."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {field} is {value!r}; it must be a positive whole number")
    return value


def _action_dim(weights: WeightFiles) -> int:
    name = model_names(weights.tensors, "pi05", weights.source).get("action_out_proj.bias")
    if name is None:
        raise CheckpointError(f"{weights.source} lacks action_out_proj.bias; fetch the whole checkpoint")
    return weights.tensors[name].elements

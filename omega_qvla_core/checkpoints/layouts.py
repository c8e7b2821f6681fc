"""Which kind of checkpoint a folder holds, from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omega_qvla_core.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE, WeightFiles, find_weights
from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.strict_json import read_json

Layout = Literal["omega_qvla", "pack", "openpi", "lerobot", "nvidia"]
Family = Literal["pi05", "gr00t_n15"]

CONFIG_FILE = "config.json"
PACK_FILE = "pack.safetensors"

FAMILY_TITLES: dict[str, str] = {"pi05": "Pi 0.5", "gr00t_n15": "GR00T N1.5"}

# Beginning of a tensor's name -> family it is of. LeRobot prefixes with "model.", its port of GR00T "_groot_model.".
_MARKS = {
    "paligemma_with_expert.": "pi05",
    "model.paligemma_with_expert.": "pi05",
    "backbone.eagle_model.": "gr00t_n15",
    "_groot_model.backbone.": "gr00t_n15",
}
_GEMMA_EXPERT_NORM = "paligemma_with_expert.gemma_expert.model.norm.weight"
_KNOWN = "openpi PyTorch, LeRobot pi05 and NVIDIA gr00t_n1_5 folders, and our own"


@dataclass(frozen=True)
class Detected:
    """What a folder is.

    Attributes:
        layout: Whose files these are.
        family: Model family.
        config: Decoded ``config.json``; empty if there is none.
    """

    layout: Layout
    family: Family
    config: dict[str, Any]


def detect(folder: Path) -> Detected:
    """Recognise a checkpoint folder.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or one that this release does not read; the message names
            file and field.
    """
    path = folder / CONFIG_FILE
    config = read_json(path, "the checkpoint's configuration") if path.is_file() else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must be a JSON object, found {type(config).__name__}")
    if "format_version" in config:
        return _own(folder, config)
    found = _by_config(path, config)
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        weights = find_weights(folder)
        marked = family_of(weights)
        _refuse_pi0(weights)
        if found is None and marked == "pi05":
            return Detected("openpi", "pi05", config)
        if found is not None and marked not in (None, found.family):
            raise CheckpointError(
                f"{folder}: the weights are of {FAMILY_TITLES[marked or '']}, but {CONFIG_FILE} describes "
                f"{FAMILY_TITLES[found.family]}; put the files of one checkpoint together"
            )
        if found is None:
            title = f"weights of {FAMILY_TITLES[marked]}" if marked else "weights of an unknown model"
            raise CheckpointError(f"{folder} holds {title} but no {CONFIG_FILE} that says so; fetch it ({_KNOWN})")
    if found is None:
        find_weights(folder)
        raise CheckpointError(f"{folder} holds no checkpoint that this release reads: {_KNOWN}")
    return found


def family_of(weights: WeightFiles) -> Family | None:
    """Family that the tensors' names speak for; None if they say nothing."""
    for name in weights.tensors:
        for start, family in _MARKS.items():
            if name.startswith(start):
                return family  # type: ignore[return-value]
    return None


def _refuse_pi0(weights: WeightFiles) -> None:
    """The older Pi 0 has the same names, but plain norms in its expert."""
    for name, stored in weights.tensors.items():
        if name.removeprefix("model.") == _GEMMA_EXPERT_NORM:
            raise CheckpointError(
                f"{stored.file} holds Pi 0 (tensor {name}: plain norms in the action expert); this release reads Pi 0.5"
            )


def _own(folder: Path, config: dict[str, Any]) -> Detected:
    family = config.get("family")
    if not isinstance(family, str) or family not in FAMILY_TITLES:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: family is {family!r}; this release reads {', '.join(FAMILY_TITLES)}"
        )
    return Detected("pack" if (folder / PACK_FILE).is_file() else "omega_qvla", family, config)


def _by_config(path: Path, config: dict[str, Any]) -> Detected | None:
    """LeRobot writes ``type``, transformers ``model_type``, openpi neither."""
    if "type" in config:
        if config["type"] != "pi05":
            raise CheckpointError(
                f"{path}: type is {config['type']!r}; of LeRobot's policies this release reads 'pi05'"
            )
        return Detected("lerobot", "pi05", config)
    if "model_type" in config:
        if config["model_type"] != "gr00t_n1_5":
            raise CheckpointError(f"{path}: model_type is {config['model_type']!r}; this release reads 'gr00t_n1_5'")
        return Detected("nvidia", "gr00t_n15", config)
    if "paligemma_variant" in config or config.get("kind") == "pi05":
        return Detected("openpi", "pi05", config)
    return None

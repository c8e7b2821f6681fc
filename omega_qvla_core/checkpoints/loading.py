"""Any checkpoint folder -> description and model: the one way in, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from omega_qvla_core.checkpoints import lerobot, nvidia, openpi
from omega_qvla_core.checkpoints.description import PolicyDescription, read_description
from omega_qvla_core.checkpoints.families import ModelConfig, build_empty, check_depths, model_config
from omega_qvla_core.checkpoints.foundation import FoundationDescription
from omega_qvla_core.checkpoints.layouts import Detected, detect
from omega_qvla_core.checkpoints.pi05_sizes import lerobot_config, openpi_config
from omega_qvla_core.checkpoints.sidecar import SIDECAR_FILE, Sidecar, read_sidecar
from omega_qvla_core.checkpoints.strict_loading import load_model
from omega_qvla_core.checkpoints.weight_files import WeightFiles, find_weights
from omega_qvla_core.processing.robot_setup import RobotSetup

Description = PolicyDescription | FoundationDescription


@dataclass(frozen=True)
class Headers:
    """What a folder's small files and headers say; no weight is read.

    Attributes:
        folder: The folder.
        detected: Layout and family.
        sidecar: What the files themselves do not say.
        weights: The tensors' headers.
        model: Sizes of the network.
    """

    folder: Path
    detected: Detected
    sidecar: Sidecar
    weights: WeightFiles
    model: ModelConfig


def read_headers(folder: Path, robot: RobotSetup | str | Path | None = None, tokenizer: Path | None = None) -> Headers:
    """Read the headers of a public or own checkpoint (not of a pack).

    Raises:
        CheckpointError: If files are missing, damaged, pickles, or of an unknown layout.
        ConfigError: If a configuration is not valid.
    """
    detected = detect(folder)
    sidecar = read_sidecar(folder, robot, tokenizer)
    weights = find_weights(folder)
    model = _model_config(folder, detected, sidecar, weights)
    check_depths(model, len(weights.tensors), str(folder / "config.json"))
    return Headers(folder, detected, sidecar, weights, model)


def describe(headers: Headers) -> Description:
    """Everything but the weights.

    Raises:
        CheckpointError: If statistics or tokenizer are missing.
        ConfigError: If the robot is not known, or the parts do not fit together.
    """
    folder, config, sidecar, model = headers.folder, headers.detected.config, headers.sidecar, headers.model
    if headers.detected.layout == "openpi":
        return openpi.describe(folder, sidecar, model)
    if headers.detected.layout == "lerobot":
        return lerobot.describe(folder, config, sidecar, model)
    if headers.detected.layout == "nvidia":
        return nvidia.describe(folder, config, sidecar, model)
    return read_description(folder)


def load_foundation(headers: Headers, dtype: torch.dtype) -> tuple[Description, nn.Module]:
    """Description and filled model, on the CPU.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, mis-shaped or damaged.
        ConfigError: See ``describe``.
    """
    description = describe(headers)
    where = str(headers.folder / "config.json")
    model = load_model(lambda: build_empty(headers.model, where), headers.weights, headers.detected.family, dtype)
    return description, model


def _model_config(folder: Path, detected: Detected, sidecar: Sidecar, weights: WeightFiles) -> ModelConfig:
    config, where = detected.config, str(folder / "config.json")
    if detected.layout in ("omega_qvla", "pack"):
        return read_description(folder).model
    if sidecar.model is not None:
        return model_config(detected.family, sidecar.model, f"{folder / SIDECAR_FILE}: model")
    if detected.layout == "nvidia":
        return nvidia.gr00t_config(folder, config)
    if detected.layout == "lerobot":
        return lerobot_config(config, where)
    return openpi_config(config, None if sidecar.robot is None else sidecar.robot.horizon, weights, where)

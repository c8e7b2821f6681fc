"""LeRobot's ``PI05Policy`` folders: ``config.json``, ``model.safetensors`` and the two processor pipelines.

Steps of the pipelines are found by their registry name; their order and number differ between LeRobot versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla_core.checkpoints.foundation import FoundationDescription, with_steps
from omega_qvla_core.checkpoints.pi05_sizes import DEFAULT_STEPS, number
from omega_qvla_core.checkpoints.sidecar import Sidecar
from omega_qvla_core.checkpoints.weight_files import open_safetensors, refuse_pickle
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.normalizers import LEROBOT_EPS, Normalizer
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.robot_setup import ActionMeaning, RobotSetup
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer
from omega_qvla_core.strict_json import read_json

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"

_MODES = {
    "QUANTILES": "lerobot_quantiles",
    "QUANTILE10": "lerobot_quantile10",
    "MEAN_STD": "lerobot_mean_std",
    "MIN_MAX": "lerobot_min_max",
    "IDENTITY": "lerobot_identity",
}


def describe(folder: Path, config: Mapping[str, Any], sidecar: Sidecar, model: Pi05Config) -> FoundationDescription:
    """Everything but the weights.

    Raises:
        CheckpointError: If a pipeline, its statistics or the tokenizer are missing.
        ConfigError: If the robot is not known, or the parts do not fit together.
    """
    where = str(folder / "config.json")
    setup = sidecar.require_robot(folder, "lerobot")
    setup = with_steps(setup, number(config.get("num_inference_steps", DEFAULT_STEPS), "num_inference_steps", where))
    if setup.horizon not in (None, model.action_horizon):
        raise ConfigError(f"{where}: chunk_size is {model.action_horizon}, robot.horizon is {setup.horizon}")
    pipeline = read_steps(folder / PREPROCESSOR)
    setup = replace(setup, action_modes=action_modes(folder, pipeline, setup))
    _check_prompt(folder, pipeline, model)
    state, actions = statistics(folder, setup)
    return FoundationDescription(
        name=sidecar.name,
        family="pi05",
        model=model,
        policy=setup,
        state=state,
        actions=actions,
        tokenizer=TextTokenizer.load(sidecar.tokenizer, "pi05"),
        slots=camera_features(config, where),
    )


def camera_features(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of the visual input features, in the file's order.

    Raises:
        ConfigError: If there are none.
    """
    features = config.get("input_features")
    if not isinstance(features, Mapping):
        raise ConfigError(f"{where}: input_features is missing; the cameras are read from it")
    names = tuple(
        str(name)
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("type") == "VISUAL"
    )
    if not names:
        raise ConfigError(f"{where}: input_features lists no VISUAL feature; the policy would be blind")
    return names


def feature_width(config: Mapping[str, Any], group: str, name: str, where: str) -> int:
    """Width of a vector that ``config.json`` states.

    Raises:
        ConfigError: If it does not.
    """
    features = config.get(group)
    feature = features.get(name) if isinstance(features, Mapping) else None
    shape = feature.get("shape") if isinstance(feature, Mapping) else None
    if not isinstance(shape, list) or len(shape) != 1:
        raise ConfigError(f"{where}: {group}.{name}.shape is {shape!r}; it must be a list of one number")
    return number(shape[0], f"{group}.{name}.shape", where)


def statistics(folder: Path, setup: RobotSetup) -> tuple[VectorNormalizer, VectorNormalizer]:
    """Normalization of the state (from the preprocessor) and of the actions (from the postprocessor).

    Raises:
        CheckpointError: If a file is missing or damaged.
        ConfigError: If a field is missing, of the wrong width or not finite.
    """
    found = []
    for file, step_name, kind, key, names in (
        (PREPROCESSOR, "normalizer_processor", "STATE", STATE, setup.state_names),
        (POSTPROCESSOR, "unnormalizer_processor", "ACTION", ACTION, setup.action_names),
    ):
        path = folder / file
        step = require_step(read_steps(path), step_name, path)
        config = step.get("config", {})
        modes = config.get("norm_map", {})
        mode = modes.get(kind, "IDENTITY") if isinstance(modes, Mapping) else modes
        if not isinstance(mode, str) or mode not in _MODES:
            raise ConfigError(f"{path}: norm_map.{kind} is {mode!r}; known: {', '.join(_MODES)}")
        if config.get("eps", LEROBOT_EPS) != LEROBOT_EPS:
            raise ConfigError(f"{path}: eps is {config['eps']!r}; this release computes with {LEROBOT_EPS:g}")
        stats, where = step_statistics(folder, step, key, path)
        normalizer = Normalizer(_MODES[mode], len(names), stats, where)
        found.append(VectorNormalizer((normalizer,), names))
    return found[0], found[1]


def step_statistics(folder: Path, step: Mapping[str, Any], key: str, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """A step's statistics of one feature, float64 by name, and their name in messages."""
    name = step.get("state_file")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path}: state_file of {step.get('registry_name')} is {name!r}; fetch the whole folder")
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the normalization is read from it; fetch it")
    refuse_pickle(file)
    stats: dict[str, np.ndarray] = {}
    with open_safetensors(file) as opened:
        for stored in opened.keys():  # noqa: SIM118 - not a dict
            feature, _, statistic = stored.rpartition(".")
            if feature == key:
                stats[statistic] = opened.get_tensor(stored).double().numpy()
    return stats, f"{file}: {key}"


def read_steps(path: Path) -> list[Mapping[str, Any]]:
    """Steps of a pipeline.

    Raises:
        CheckpointError: If the file is missing or holds no list of steps.
    """
    data = read_json(path, "the processor pipeline")
    steps = data.get("steps") if isinstance(data, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise CheckpointError(f"{path}: steps is missing; is it LeRobot's processor file?")
    for step in steps:
        if not isinstance(step.get("config", {}), Mapping):
            raise CheckpointError(f"{path}: config of {step.get('registry_name')!r} is no object; fetch it again")
    return steps


def find_step(steps: list[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The step of a registry name."""
    return next((step for step in steps if step.get("registry_name") == name), None)


def require_step(steps: list[Mapping[str, Any]], name: str, path: Path) -> Mapping[str, Any]:
    """The step of a registry name; CheckpointError if there is none."""
    found = find_step(steps, name)
    if found is None:
        raise CheckpointError(f"{path}: steps lists no {name}; fetch the processor files of this checkpoint")
    return found


def action_modes(folder: Path, steps: list[Mapping[str, Any]], setup: RobotSetup) -> tuple[ActionMeaning, ...]:
    """Meaning of every action: as the setup says, checked against the pipeline, or as the pipeline says.

    Raises:
        ConfigError: If setup and pipeline contradict each other.
    """
    step = find_step(steps, "relative_actions_processor") or {}
    config = step.get("config", {})
    deltas = _delta_mask(config, setup.action_names) if config.get("enabled", False) else (False,) * 1024
    if not setup.action_modes:
        return tuple("delta" if delta else "absolute" for _, delta in zip(setup.action_names, deltas))
    for name, mode, delta in zip(setup.action_names, setup.action_modes, deltas):
        if (mode == "delta") != delta:
            meaning = "relative to the state" if delta else "not relative to the state"
            raise ConfigError(
                f"{folder / PREPROCESSOR}: relative_actions_processor makes {name!r} {meaning}, but robot.action_modes "
                f"says {mode!r}; correct robot.action_modes"
            )
    return setup.action_modes


def _delta_mask(config: Mapping[str, Any], names: tuple[str, ...]) -> tuple[bool, ...]:
    """As LeRobot builds it: every action whose name in the file holds no excluded word is relative."""
    excluded = [str(word).lower() for word in config.get("exclude_joints") or [] if word]
    file_names = config.get("action_names")
    if not excluded or file_names is None:
        return (True,) * len(names)
    lower = [str(name).lower() for name in file_names]
    return tuple(
        index >= len(lower) or not any(word in lower[index] for word in excluded) for index in range(len(names))
    )


def _check_prompt(folder: Path, steps: list[Mapping[str, Any]], model: Pi05Config) -> None:
    path = folder / PREPROCESSOR
    prompt = find_step(steps, "pi05_prepare_state_tokenizer_processor_step") or {}
    if not prompt.get("config", {}).get("include_state_in_prompt", True):
        raise ConfigError(f"{path}: include_state_in_prompt is false; this release writes LeRobot's prompt with state")
    length = (find_step(steps, "tokenizer_processor") or {}).get("config", {}).get("max_length", model.max_token_len)
    if length != model.max_token_len:
        raise ConfigError(f"{path}: max_length is {length!r}, config.json: tokenizer_max_length {model.max_token_len}")

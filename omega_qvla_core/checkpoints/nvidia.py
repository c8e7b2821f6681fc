"""NVIDIA's GR00T N1.5 folders: shards, ``config.json`` and ``experiment_cfg/metadata.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omega_qvla_core.checkpoints.foundation import FoundationDescription, with_steps
from omega_qvla_core.checkpoints.pi05_sizes import number
from omega_qvla_core.checkpoints.sidecar import Sidecar
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.robot_setup import POSITION_MEANINGS, RobotSetup, VectorPart
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer
from omega_qvla_core.strict_json import read_json

METADATA_FILE = Path("experiment_cfg") / "metadata.json"
EAGLE_FILE = "eagle_config.json"
DEFAULT_STEPS = 4


def gr00t_config(folder: Path, config: Mapping[str, Any]) -> Gr00tConfig:
    """Sizes; ``eagle_config.json`` counts where the folder has one (the release ships it with its code).

    Raises:
        ConfigError: If a size is missing or unusual.
    """
    eagle = folder / EAGLE_FILE
    try:
        return Gr00tConfig.from_official_json(
            config, read_json(eagle, "the vision-language sizes") if eagle.is_file() else None
        )
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def describe(folder: Path, config: Mapping[str, Any], sidecar: Sidecar, model: Gr00tConfig) -> FoundationDescription:
    """Everything but the weights.

    Raises:
        CheckpointError: If metadata or tokenizer are missing.
        ConfigError: If the robot is not known, or the parts do not fit together.
    """
    setup = sidecar.require_robot(folder, "gr00t")
    head = config.get("action_head_cfg", {})
    where = str(folder / "config.json")
    setup = with_steps(
        setup, number(head.get("num_inference_timesteps", DEFAULT_STEPS), "num_inference_timesteps", where)
    )
    if setup.horizon not in (None, model.action_horizon):
        raise ConfigError(f"{where}: action_horizon is {model.action_horizon}, robot.horizon is {setup.horizon}")
    metadata = embodiment_metadata(folder, setup)
    state = statistics(folder, metadata, "state", setup.state_parts, setup.state_names)
    actions = statistics(folder, metadata, "action", setup.action_parts, setup.action_names)
    modes = _action_modes(folder, metadata, setup, actions)
    if not setup.action_names:
        actions = replace(actions, names=_telling_names(actions.names, modes))
    setup = replace(setup, state_names=state.names, action_names=actions.names, action_modes=modes)
    return FoundationDescription(
        name=sidecar.name,
        family="gr00t_n15",
        model=model,
        policy=setup,
        state=state,
        actions=actions,
        tokenizer=TextTokenizer.load(sidecar.tokenizer, "gr00t_n15"),
        slots=(),
        resolutions=video_resolutions(folder, metadata, setup),
    )


def embodiment_metadata(folder: Path, setup: RobotSetup) -> Mapping[str, Any]:
    """The metadata of the setup's embodiment.

    Raises:
        CheckpointError: If the file is missing.
        ConfigError: If the embodiment is not in it; an unknown one is never replaced by another.
    """
    path = folder / METADATA_FILE
    data = read_json(path, "statistics and modalities")
    if not isinstance(data, Mapping) or setup.embodiment_tag not in data:
        found = ", ".join(data) if isinstance(data, Mapping) else "none"
        raise ConfigError(
            f"{path} has no embodiment {setup.embodiment_tag!r} (there are {found}); set robot.embodiment_tag"
        )
    return _inside(data, str(setup.embodiment_tag), str(path))


def statistics(
    folder: Path, metadata: Mapping[str, Any], kind: str, parts: tuple[VectorPart, ...], names: tuple[str, ...]
) -> VectorNormalizer:
    """Normalization of state or actions, in the setup's order.

    Raises:
        ConfigError: If a key is missing, or its statistics are of another width than its modality.
    """
    path = str(folder / METADATA_FILE)
    groups = _inside(_inside(metadata, "statistics", path), kind, f"{path}: statistics")
    shapes = _inside(_inside(metadata, "modalities", path), kind, f"{path}: modalities")
    normalizers, own_names = [], []
    for part in parts:
        where = f"{path}: statistics.{kind}.{part.key}"
        shape = _inside(shapes, part.key, f"{path}: modalities.{kind}").get("shape")
        width = number(shape[0] if isinstance(shape, list) and len(shape) == 1 else shape, "shape", where)
        stats = read_stats(_inside(groups, part.key, f"{path}: statistics.{kind}"), where)
        normalizers.append(Normalizer(f"gr00t_{part.normalization}", width, stats, where))
        own_names += [part.key] if width == 1 else [f"{part.key}_{index}" for index in range(width)]
    return VectorNormalizer(tuple(normalizers), names or tuple(own_names))


def video_resolutions(folder: Path, metadata: Mapping[str, Any], setup: RobotSetup) -> dict[str, tuple[int, int]]:
    """Height and width of every camera's training video. The file has them as (width, height).

    Raises:
        ConfigError: If a camera is not in the file.
    """
    path = str(folder / METADATA_FILE)
    videos = _inside(_inside(metadata, "modalities", path), "video", f"{path}: modalities")
    found = {}
    for camera in setup.cameras:
        where = f"{path}: modalities.video.{camera.source}"
        size = _inside(videos, camera.source, f"{path}: modalities.video").get("resolution")
        if not isinstance(size, list) or len(size) != 2:
            raise ConfigError(f"{where}.resolution is {size!r}; it must be a list of width and height")
        found[camera.source] = (number(size[1], "resolution", where), number(size[0], "resolution", where))
    return found


def _action_modes(
    folder: Path, metadata: Mapping[str, Any], setup: RobotSetup, actions: VectorNormalizer
) -> tuple[Any, ...]:
    """One meaning per action; the setup's, which must not call absolute what the file calls relative."""
    path = f"{folder / METADATA_FILE}: modalities.action"
    shapes = metadata["modalities"]["action"]
    stated = [
        bool(shapes[part.key].get("absolute", True))
        for part, normalizer in zip(setup.action_parts, actions.parts)
        for _ in range(normalizer.width)
    ]
    if not setup.action_modes:
        raise ConfigError(
            f"{folder}: robot.action_modes is missing; say of each of {', '.join(actions.names)} whether it is "
            "absolute, delta, relative or velocity (the file's own flags are not reliable)"
        )
    if len(setup.action_modes) != len(stated):
        raise ConfigError(f"robot.action_modes has {len(setup.action_modes)} entries for {len(stated)} actions")
    for name, mode, absolute in zip(actions.names, setup.action_modes, stated):
        if mode == "absolute" and not absolute:
            raise ConfigError(f"{path}: {name!r} is not absolute, but robot.action_modes says so; correct it")
    return setup.action_modes


def _telling_names(names: tuple[str, ...], modes: tuple[str, ...]) -> tuple[str, ...]:
    """``x`` that is no position becomes ``x_relative``: joints are matched by name, and the state has an ``x`` too."""
    return tuple(name if mode in POSITION_MEANINGS else f"{name}_{mode}" for name, mode in zip(names, modes))


def _inside(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = data.get(key)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} has no object {key!r} (there are {', '.join(map(str, data)) or 'none'})")
    return found

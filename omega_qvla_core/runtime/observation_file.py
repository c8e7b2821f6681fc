"""Observations on disk, for calibration: one safetensors file, with where each observation came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omega_qvla_core.errors import ObservationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.whole_file import write_whole

FORMAT = "omega-qvla-observations-1"


@dataclass(frozen=True)
class ObservationSet:
    """Observations and their origin.

    Attributes:
        observations: The observations.
        sources: One short text per observation, such as ``place:red seed 200003 step 12``.
    """

    observations: tuple[Observation, ...]
    sources: tuple[str, ...]


def save_observations(path: Path, observations: Sequence[Observation], sources: Sequence[str]) -> None:
    """Write observations whose images all have one size per camera.

    Raises:
        ObservationError: There is none, or cameras and sizes differ between observations.
    """
    if not observations or len(observations) != len(sources):
        raise ObservationError(
            f"{path}: {len(observations)} observations with {len(sources)} sources; need as many, > 0"
        )
    cameras = sorted(observations[0].images)
    try:
        tensors = {f"images.{key}": np.stack([o.images[key] for o in observations]) for key in cameras}
        tensors["state"] = np.stack([np.asarray(o.state, dtype=np.float64) for o in observations])
    except (KeyError, ValueError) as error:
        raise ObservationError(f"{path}: observations differ in cameras or sizes ({error})") from error
    metadata = {
        "format": FORMAT,
        "instructions": json.dumps([o.instruction for o in observations]),
        "sources": json.dumps(list(sources)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def load_observations(path: Path) -> ObservationSet:
    """Read what ``save_observations`` wrote.

    Raises:
        ObservationError: The file is missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict: it has no iterator)
    except (SafetensorError, OSError) as error:
        raise ObservationError(f"{path} is not an observation file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ObservationError(f"{path}: format {metadata.get('format')!r} is not {FORMAT!r}; record it again")
    instructions, sources = json.loads(metadata["instructions"]), json.loads(metadata["sources"])
    images = {name.removeprefix("images."): value for name, value in tensors.items() if name.startswith("images.")}
    lengths = {len(instructions), len(sources), len(tensors["state"]), *(len(value) for value in images.values())}
    if len(lengths) != 1:
        raise ObservationError(f"{path}: tensors and texts differ in length {sorted(lengths)}; record it again")
    observations = tuple(
        Observation({key: value[i] for key, value in images.items()}, tensors["state"][i], instructions[i])
        for i in range(len(instructions))
    )
    return ObservationSet(observations, tuple(sources))

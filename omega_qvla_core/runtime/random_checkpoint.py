"""Checkpoints of any size with random weights, written without ever being in memory: to try a machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from omega_qvla_core.checkpoints.description import write_description
from omega_qvla_core.checkpoints.weight_files import SINGLE_FILE
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.quant.memory import meta_model
from omega_qvla_core.runtime.random_policy import HORIZON, random_policy
from omega_qvla_core.whole_file import write_whole

_CHUNK = 1 << 24


def write_random_checkpoint(
    folder: str | Path, config: Pi05Config, seed: int = 0, progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """Write a policy of our own layout with normal random weights in bfloat16, and the robot of ``random_policy``.

    Args:
        folder: Made if it does not exist.
        config: Sizes; the chunk gets that policy's length.
        seed: Of the weights.
        progress: Called with (done, total, what is next).

    Returns:
        The path of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, action_horizon=HORIZON)
    base = random_policy().description
    size = config.vision.image_size
    cameras = tuple(CameraSpec(camera.key, size, size) for camera in base.policy.cameras)
    description = replace(base, name="random", model=config, policy=replace(base.policy, cameras=cameras))
    write_description(description, folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    path, generator = folder / SINGLE_FILE, torch.Generator().manual_seed(seed)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(_header(shapes))
            for index, (name, shape) in enumerate(shapes.items()):
                if progress is not None:
                    progress(index, len(shapes), name)
                std, left = shape[-1] ** -0.5, math.prod(shape)
                while left:
                    count = min(left, _CHUNK)
                    values = (torch.randn(count, generator=generator) * std).bfloat16()
                    file.write(values.view(torch.uint8).numpy().data)
                    left -= count

    write_whole(path, write)
    return path


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

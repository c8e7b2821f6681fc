"""Exactly resumable training state, in safetensors: weights, averaged weights, optimiser moments, step.

Batches, noise and augmentation are drawn from generators seeded with (seed, step), so nothing else is needed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.train.config import TrainConfig
from omega_qvla_core.whole_file import write_whole

FORMAT = "omega-qvla-train-state-1"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.AdamW, step: int, config: TrainConfig
) -> None:
    """Write the state atomically: an interrupted write leaves the former file whole."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    metadata = {"format": FORMAT, "step": str(step), "config": json.dumps(asdict(config))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def load_state(
    path: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.AdamW, config: TrainConfig
) -> int:
    """Restore what ``save_state`` wrote.

    Returns:
        Number of steps already done.

    Raises:
        CheckpointError: The file is damaged, or belongs to a run with another configuration.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict: it has no iterator)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a training state ({error}); delete it to start again") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {metadata.get('format')!r} is not {FORMAT!r}; delete it to start again")
    stored, asked = json.loads(metadata["config"]), asdict(config)
    changed = [name for name in asked if stored.get(name) != asked[name]]
    if changed:
        changes = ", ".join(f"{name} {stored.get(name)} -> {asked[name]}" for name in changed)
        raise CheckpointError(f"{path} belongs to another run ({changes}); give the same settings or another folder")
    model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    for name, average in ema.items():
        average.copy_(tensors[f"ema.{name}"])
    step = int(metadata["step"])
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" in tensors:
            state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
    return step

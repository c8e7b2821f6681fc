"""Our checkpoint folder: three JSON files and ``model.safetensors``, loaded strictly.

Weights are stored in bfloat16 and computed with in float32. Nothing is loaded before every name and shape has been
checked, so that a policy never runs with a random or half loaded tensor.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import omega_qvla_core
from omega_qvla_core.checkpoints.description import CONFIG_FILE, PolicyDescription, read_description, write_description
from omega_qvla_core.checkpoints.families import build_empty, build_model, check_depths, family_of_config
from omega_qvla_core.checkpoints.foundation import FoundationDescription
from omega_qvla_core.checkpoints.layouts import PACK_FILE
from omega_qvla_core.checkpoints.strict_loading import matching_names
from omega_qvla_core.checkpoints.weight_files import WeightFiles, find_weights, open_safetensors, read_header
from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.whole_file import write_whole

WEIGHTS_FILE = "model.safetensors"
SHIPPED = Path(omega_qvla_core.__file__).parent / "assets" / "policies"


def shipped_policies() -> tuple[str, ...]:
    """Names of the policies that come with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_FILE}")))


def resolve_folder(path_or_name: str | Path) -> Path:
    """Folder of a checkpoint. A bare shipped name means the shipped policy; write ``./name`` for a folder of that name.

    Raises:
        CheckpointError: If there is no such folder; the message lists the shipped names.
    """
    if isinstance(path_or_name, str) and path_or_name in shipped_policies():
        return SHIPPED / path_or_name
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    shipped = ", ".join(shipped_policies()) or "none"
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder, or a shipped name ({shipped})")
    near = difflib.get_close_matches(str(path_or_name), shipped_policies(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(f"there is no checkpoint folder {str(path_or_name)!r}; shipped names: {shipped}{hint}")


def is_pack(folder: Path) -> bool:
    """Whether the folder holds a quantized pack."""
    return (folder / PACK_FILE).is_file()


def load_checkpoint(folder: Path) -> tuple[PolicyDescription, Pi05]:
    """Load an unquantized policy in our own layout.

    Args:
        folder: From ``resolve_folder``.

    Returns:
        The description and the model: float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If a file is missing, damaged or a pickle, or any tensor is missing, unexpected or mis-shaped.
        ConfigError: If a JSON file's content is not valid.
    """
    description = read_description(folder)
    # Checked before anything is allocated: a wrong size in config.json must not fill the memory.
    weights, where = find_weights(folder), str(folder / CONFIG_FILE)
    check_depths(description.model, len(weights.tensors), where)
    empty = build_empty(description.model, where)
    matching_names(empty.state_dict(), weights, family_of_config(description.model))
    model = build_model(description.model)
    load_weights(model, folder / WEIGHTS_FILE)
    return description, model.eval()


def save_checkpoint(description: PolicyDescription | FoundationDescription, model: nn.Module, folder: Path) -> None:
    """Write a folder in our own layout.

    Weights of our own policies are stored in bfloat16; those of public checkpoints in the type they are computed with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_description(description, folder)
    dtype = torch.bfloat16 if isinstance(description, PolicyDescription) else None
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS_FILE, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy every tensor of a safetensors file into ``model``; accepts the key list of official files.

    Raises:
        CheckpointError: If the file is missing, damaged or a pickle, or any tensor is missing, unexpected, mis-shaped
            or not of a floating-point type. The model is then unchanged.
    """
    if not path.is_file():
        find_weights(path.parent)
        raise CheckpointError(f"{path} is missing; a checkpoint folder holds its weights in {WEIGHTS_FILE}")
    own = model.state_dict()
    weights = WeightFiles(path, (path,), read_header(path))
    names = matching_names(own, weights, family_of_config(model.config))
    with torch.no_grad(), open_safetensors(path) as file:
        for name, file_name in names.items():
            own[name].copy_(file.get_tensor(file_name))

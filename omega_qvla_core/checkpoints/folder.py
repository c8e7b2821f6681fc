"""Our checkpoint folder: three JSON files and ``model.safetensors``, loaded strictly.

Weights are stored in bfloat16 and computed with in float32. Nothing is loaded before every name and shape has been
checked, so that a policy never runs with a random or half loaded tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import omega_qvla_core
from omega_qvla_core.checkpoints.description import CONFIG_FILE, PolicyDescription, read_description, write_description
from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.models.pi05 import Pi05, canonical_state_dict

WEIGHTS_FILE = "model.safetensors"
PACK_FILE = "pack.safetensors"
SHIPPED = Path(omega_qvla_core.__file__).parent / "assets" / "policies"

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMES_SHOWN = 3


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
    raise CheckpointError(f"there is no checkpoint folder {str(path_or_name)!r}; shipped names: {shipped}")


def is_pack(folder: Path) -> bool:
    """Whether the folder holds a quantized pack."""
    return (folder / PACK_FILE).is_file()


def load_checkpoint(folder: Path) -> tuple[PolicyDescription, Pi05]:
    """Load an unquantized policy.

    Args:
        folder: From ``resolve_folder``.

    Returns:
        The description and the model: float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If a file is missing, damaged or a pickle, or any tensor is missing, unexpected or mis-shaped.
        ConfigError: If a JSON file's content is not valid.
    """
    description = read_description(folder)
    with torch.device("meta"):
        expected = Pi05(description.model)
    # Checked before anything is allocated: a wrong size in config.json must not fill the memory.
    _matching_names(expected, folder / WEIGHTS_FILE)
    model = Pi05(description.model)
    load_weights(model, folder / WEIGHTS_FILE)
    return description, model.eval()


def save_checkpoint(description: PolicyDescription, model: Pi05, folder: Path) -> None:
    """Write a folder that ``load_checkpoint`` reads, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_description(description, folder)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    # An interrupted write must not leave a file that a later load takes for the whole one.
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_FILE)


def load_weights(model: Pi05, path: Path) -> None:
    """Copy every tensor of a safetensors file into ``model``; accepts the key list of official openpi files.

    Raises:
        CheckpointError: If the file is missing, damaged or a pickle, or any tensor is missing, unexpected, mis-shaped
            or not of a floating-point type. The model is then unchanged.
    """
    names, own = _matching_names(model, path), model.state_dict()
    with torch.no_grad(), _open(path) as file:
        for name, file_name in names.items():
            own[name].copy_(file.get_tensor(file_name))


def _matching_names(model: Pi05, path: Path) -> dict[str, str]:
    """Name of each tensor of ``model`` in the file, once all names, shapes and types are known to fit."""
    _check_weights_file(path)
    own = model.state_dict()
    with _open(path) as file:
        names = canonical_state_dict({name: name for name in file.keys()})  # noqa: SIM118 - not a dict
        _check_names(set(own), set(names), path)
        for name, file_name in names.items():
            stored = file.get_slice(file_name)
            if stored.get_dtype() not in _FLOATS or tuple(stored.get_shape()) != tuple(own[name].shape):
                raise CheckpointError(
                    f"{path}: tensor {file_name} is {stored.get_dtype()} {list(stored.get_shape())}; "
                    f"{CONFIG_FILE} makes it floating point {list(own[name].shape)}"
                )
    return names


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """``safe_open`` whose errors name the file and the remedy."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); fetch it again, or compare its size with the source's"
        ) from error


def _check_weights_file(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4)
        # A zip archive (torch.save) or a raw pickle under the right name.
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(f"{path} holds a pickle; pickles run code when loaded, convert it to safetensors")
        return
    pickles = sorted(item.name for item in path.parent.iterdir() if item.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} is missing; {pickles[0]} beside it is a pickle, which runs code when loaded and is never read. "
            f"Convert it to {WEIGHTS_FILE}"
        )
    raise CheckpointError(f"{path} is missing; a checkpoint folder holds its weights in {WEIGHTS_FILE}")


def _check_names(wanted: set[str], found: set[str], path: Path) -> None:
    problems = []
    for label, names in (("lacks", wanted - found), ("has the unexpected", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            problems.append(f"{label} {len(names)} tensors: {shown}{more}")
    if problems:
        raise CheckpointError(f"{path} {'; it '.join(problems)}. It was made for another model than {CONFIG_FILE} says")

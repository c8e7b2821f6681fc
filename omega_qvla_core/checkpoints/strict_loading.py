"""Fill a model with a checkpoint's tensors: every name, shape and type is checked before the first weight is read.

The model is built without memory and takes the tensors as they come, file by file, so that no more than the model and
one file are in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from omega_qvla_core.checkpoints.tensor_names import model_names
from omega_qvla_core.checkpoints.weight_files import FLOATS, WeightFiles
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.empty import on_meta_device

Model = TypeVar("Model", bound=nn.Module)

_NAMES_SHOWN = 3

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Tensors that stay in float32 when a model computes in bfloat16, as in the reference (openpi's selected parameters).
_KEPT_FLOAT32 = {
    "pi05": re.compile(
        r"^(action_in_proj|action_out_proj|time_mlp_in|time_mlp_out)\.|"
        r"vision_tower\.vision_model\.embeddings\.|"
        r"\.(input_layernorm|post_attention_layernorm)\.|"
        r"\.(language_model|gemma_expert\.model)\.norm\."
    ),
    "gr00t_n15": re.compile(r"(?!)"),
}


def compute_dtype(name: str) -> torch.dtype:
    """``float32`` or ``bfloat16`` by name.

    Raises:
        ConfigError: For any other name.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known; give {' or '.join(DTYPES)}")
    return DTYPES[name]


def tensor_dtype(name: str, family: str, dtype: torch.dtype) -> torch.dtype:
    """Type in which a model that computes in ``dtype`` keeps one of its tensors."""
    return torch.float32 if _KEPT_FLOAT32[family].search(name) else dtype


def matching_names(expected: Mapping[str, Tensor], weights: WeightFiles, family: str) -> dict[str, str]:
    """Name in the files of every tensor of a model, once all names, shapes and types are known to fit.

    Args:
        expected: State dict of the model; may be on the meta device.
        weights: The files.
        family: Key of ``FAMILY_TITLES``.

    Raises:
        CheckpointError: If any tensor is missing, unexpected, mis-shaped or not floating point; the message names it.
    """
    names = model_names(weights.tensors, family, weights.source)
    problems = []
    for label, different in (
        ("lacks", expected.keys() - names.keys()),
        ("has the unexpected", names.keys() - expected.keys()),
    ):
        if different:
            shown = ", ".join(sorted(different)[:_NAMES_SHOWN])
            more = f" and {len(different) - _NAMES_SHOWN} more" if len(different) > _NAMES_SHOWN else ""
            problems.append(f"{label} {len(different)} tensors: {shown}{more}")
    if problems:
        raise CheckpointError(
            f"{weights.source} {'; it '.join(problems)}. It was made for another model than config.json says"
        )
    for name, file_name in names.items():
        stored = weights.tensors[file_name]
        if stored.dtype not in FLOATS or stored.shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{stored.file}: tensor {file_name} is {stored.dtype} {list(stored.shape)}; config.json makes it "
                f"floating point {list(expected[name].shape)}"
            )
    return names


def load_model(build: Callable[[], Model], weights: WeightFiles, family: str, dtype: torch.dtype) -> Model:
    """Build a model and fill it.

    Args:
        build: Makes the model; runs on the meta device.
        weights: From ``find_weights``.
        family: Key of ``FAMILY_TITLES``.
        dtype: Type to compute in; some tensors stay in float32 (see ``tensor_dtype``).

    Returns:
        The model on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: See ``matching_names``; or a file was damaged since its header was read.
    """
    with on_meta_device():
        model = build()
    names = matching_names(model.state_dict(), weights, family)
    owners = {file_name: name for name, file_name in names.items()}
    for file_name, tensor in weights.read():
        if file_name in owners:
            name = owners[file_name]
            # A copy of its own: what the file gives may be a view of it, and the file may be exchanged.
            _assign(model, name, tensor.to(tensor_dtype(name, family, dtype), copy=True))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(f"{weights.source} leaves {left[0]} without a value; fetch the whole checkpoint")
    return model.eval()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path) if path else model
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor

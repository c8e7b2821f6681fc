"""Reading a folder of recorded tensors: ``config.json``, ``model``, ``inputs`` and ``outputs.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from omega_qvla_core.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE, open_safetensors, read_header
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.strict_json import read_json

INPUTS_FILE = "inputs.safetensors"
OUTPUTS_FILE = "outputs.safetensors"
EAGLE_FILE = "eagle_config.json"
META_FILE = "meta.json"

# What separates the case from the rest of a tensor's name.
_SEPARATORS = {"pi05": ".", "gr00t_n15": "/"}


@dataclass(frozen=True)
class Fixture:
    """A folder of recorded tensors.

    Attributes:
        folder: Where it is.
        family: ``pi05`` or ``gr00t_n15``.
        config: Sizes of the model.
        inputs: By case, then by name.
        outputs: By case, then by name.
        meta: ``meta.json``; empty if there is none.
    """

    folder: Path
    family: str
    config: Pi05Config | Gr00tConfig
    inputs: Mapping[str, Mapping[str, Tensor]]
    outputs: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]


def read_fixture(folder: Path) -> Fixture:
    """Read everything but the weights.

    Raises:
        CheckpointError: A file is missing or damaged.
        ConfigError: ``config.json`` is of no known family, or a size in it is missing or wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the one that holds {INPUTS_FILE} and {OUTPUTS_FILE}")
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(f"{folder / SINGLE_FILE} is missing; a parity folder holds weights beside tensors")
    data = read_json(folder / "config.json", "the sizes of the model")
    family = _family(folder, data)
    meta = read_json(folder / META_FILE, "the list of cases") if (folder / META_FILE).is_file() else {}
    return Fixture(
        folder=folder,
        family=family,
        config=_config(folder, family, data),
        inputs=_by_case(folder / INPUTS_FILE, _SEPARATORS[family]),
        outputs=_by_case(folder / OUTPUTS_FILE, _SEPARATORS[family]),
        meta=meta if isinstance(meta, Mapping) else {},
    )


def _family(folder: Path, data: Any) -> str:
    data = data if isinstance(data, Mapping) else {}
    if data.get("kind") == "pi05" or "expert_width" in data:
        return "pi05"
    if data.get("model_type") == "gr00t_n1_5" or "action_head_cfg" in data:
        return "gr00t_n15"
    raise ConfigError(
        f"{folder / 'config.json'} is of no known family: neither kind 'pi05' nor model_type 'gr00t_n1_5'"
    )


def _config(folder: Path, family: str, data: Mapping[str, Any]) -> Pi05Config | Gr00tConfig:
    try:
        if family == "pi05":
            return Pi05Config.from_reference_json(data)
        eagle = folder / EAGLE_FILE
        language = read_json(eagle, "the sizes of the vision-language model") if eagle.is_file() else None
        return Gr00tConfig.from_official_json(data, language)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{folder}: {error}") from error


def _by_case(path: Path, separator: str) -> dict[str, dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a parity folder holds {INPUTS_FILE} and {OUTPUTS_FILE}")
    names = read_header(path)
    cases: dict[str, dict[str, Tensor]] = {}
    with open_safetensors(path) as file:
        for full_name in names:
            case, found, name = full_name.partition(separator)
            if not found:
                raise CheckpointError(f"{path}: tensor {full_name!r} names no case; expected case{separator}tensor")
            cases.setdefault(case, {})[name] = file.get_tensor(full_name)
    return cases


def need(inputs: Mapping[str, Tensor], case: str, name: str, shape: tuple[int | None, ...], floating: bool) -> Tensor:
    """An input of a case, once its shape and type are known to fit.

    Args:
        inputs: Of the case.
        case: For messages.
        name: Of the input.
        shape: Wanted sizes; None where any will do.
        floating: Whether it holds floating-point numbers (else integers or booleans).

    Raises:
        CheckpointError: It is missing, or does not fit.
    """
    if name not in inputs:
        raise CheckpointError(f"{INPUTS_FILE}: case {case} lacks {name}")
    found = inputs[name]
    fits = found.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
    )
    if not fits or found.is_floating_point() != floating:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kind = "floating point" if floating else "whole numbers"
        raise CheckpointError(
            f"{INPUTS_FILE}: case {case}: {name} is {found.dtype} {list(found.shape)}; config.json makes it {kind} "
            f"[{wanted}]"
        )
    return found


def check_tokens(tokens: Tensor, mask: Tensor, vocab_size: int, case: str) -> None:
    """Refuse token ids outside the table, and rows without a single valid token.

    Raises:
        CheckpointError: See above.
    """
    if tokens.numel() == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise CheckpointError(f"{INPUTS_FILE}: case {case} has token ids outside 0..{vocab_size - 1}")
    if not bool(mask.any(dim=1).all()):
        raise CheckpointError(f"{INPUTS_FILE}: case {case} has a row without a valid token")

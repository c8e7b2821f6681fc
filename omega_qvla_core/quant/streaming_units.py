"""The units of work that a checkpoint is quantized in: sites, parts of scope ``whole``, tensors that stay."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla_core.errors import PackError
from omega_qvla_core.quant.parts import StoredPart, build_part
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import InputSite
from omega_qvla_core.quant.whole import table_names, unread_names, whole_targets

# Tensors that stay as they are go together up to this size.
_FLOATS_BYTES = 256 << 20

SITE, TABLES, PART, FLOATS = "site", "tables", "part", "floats"


@dataclass(frozen=True)
class Unit:
    """A step of the work.

    Attributes:
        name: For messages.
        kind: One of ``SITE``, ``TABLES`` (all modulation layers), ``PART``, ``FLOATS``.
        tensors: Names of the checkpoint's tensors that it is made of.
        site: Of a ``SITE``.
        parts: Names of the modules that a ``TABLES`` or ``PART`` unit gives parts for.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]
    site: InputSite | None = None
    parts: tuple[str, ...] = ()


def units_of(model: nn.Module, sites: Sequence[InputSite], recipe: Recipe) -> Iterator[Unit]:
    """All units of a model, in the order of their files."""
    done: set[str] = set()
    for site in sites:
        names = own_tensors(model, site.readers)
        done.update(names)
        yield Unit(site.name, SITE, names, site)
    if recipe.whole is not None:
        tables = (*table_names(model), *unread_names(model))
        names = own_tensors(model, tables)
        done.update(names)
        yield Unit("step tables", TABLES, names, parts=tables)
        for name in whole_targets(model):
            if name not in tables:
                names = own_tensors(model, (name,))
                done.update(names)
                yield Unit(name, PART, names, parts=(name,))
    yield from _float_units(model, done)


def own_tensors(model: nn.Module, modules: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters of some modules."""
    return tuple(f"{name}.{key}" for name in modules for key, _ in model.get_submodule(name).named_parameters())


def part_tensors(name: str, part: StoredPart) -> dict[str, Tensor]:
    """The tensors of a part under the names that a pack gives them."""
    return {f"{_part_start(name)}{key}": tensor for key, tensor in part.tensors().items()}


def read_part(path: Path, name: str) -> StoredPart:
    """A part from the file of its unit.

    Raises:
        PackError: The file is damaged or does not hold the part.
    """
    start = _part_start(name)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            spec = json.loads((file.metadata() or {})["info"])["parts"][name]
            keys = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
            tensors = {key.removeprefix(start): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise PackError(f"{path} is damaged ({error}); delete it and run again: the other units are kept") from error
    return build_part(name, spec, tensors)


def _part_start(name: str) -> str:
    return f"part.{name}."


def _float_units(model: nn.Module, done: set[str]) -> Iterator[Unit]:
    batch: list[str] = []
    size = count = 0
    for name, tensor in model.state_dict().items():
        if name in done:
            continue
        if batch and size + tensor.numel() * 2 > _FLOATS_BYTES:
            yield Unit(f"unquantized tensors {count}", FLOATS, tuple(batch))
            batch, size, count = [], 0, count + 1
        batch.append(name)
        size += tensor.numel() * 2
    if batch:
        yield Unit(f"unquantized tensors {count}", FLOATS, tuple(batch))

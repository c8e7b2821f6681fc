"""What stages of a layer-by-layer calibration hand to each other through files, and the weights that one of them needs.

A file appears under its name only when it is whole; one that was cut off counts as missing and is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.quant.part_files import read_info, write_unit
from omega_qvla_core.quant.parts import StoredPart, replace_module
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import SIDES, InputSite
from omega_qvla_core.quant.streaming_source import CheckpointSource
from omega_qvla_core.quant.whole import whole_targets

Parts = Callable[[str], StoredPart]
"""Gives what scope ``whole`` puts in the place of a module, by the module's name; a new one for every call."""


class ActivationFiles:
    """Tensors by file and name.

    Args:
        folder: Made with the first file.
        device: Where tensors are read to.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def has(self, file: str) -> bool:
        """Whether a file is there and whole."""
        return read_info(self._path(file)) is not None

    def read(self, file: str, name: str) -> Tensor:
        """One tensor.

        Raises:
            QuantizationError: The file is damaged.
        """
        path = self._path(file)
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                return opened.get_tensor(name).to(self._device, copy=True)
        except (SafetensorError, OSError) as error:
            raise QuantizationError(f"{path} is damaged ({error}); delete it and run again") from error

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file; it is on the disk before it has its name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_unit(self._path(file), {name: tensor.cpu() for name, tensor in tensors.items()}, {})

    def remove(self, file: str) -> None:
        """Remove a file, if it is there."""
        self._path(file).unlink(missing_ok=True)

    def _path(self, file: str) -> Path:
        return self._folder / f"{file}.safetensors"


class StageWeights:
    """Weights of a model on ``meta``, there only while a stage runs, as a quantized model holds them.

    Args:
        model: Its modules are filled and emptied in place.
        source: Tensors of the checkpoint.
        recipe: Which tensors stay, and in which type a pack stores them: they are rounded to it.
        sites: All of the model.
        parts: Of scope ``whole``; None for scope ``paper``.
        device: Where weights go.
    """

    def __init__(
        self,
        model: nn.Module,
        source: CheckpointSource,
        recipe: Recipe,
        sites: Sequence[InputSite],
        parts: Parts | None,
        device: torch.device,
    ) -> None:
        self._model, self._source, self._recipe, self._device = model, source, recipe, device
        self._sides = {reader: site.side for site in sites for reader in site.readers}
        self._parts = parts
        self._targets = () if parts is None else whole_targets(model)

    def fill(self, modules: Sequence[str]) -> None:
        """Read the tensors of some modules.

        Raises:
            QuantizationError: A tensor holds NaN or Inf, or does not fit into its type.
        """
        for prefix in modules:
            own = [name for name in self._targets if _lies_in(name, prefix)]
            for name in own:
                replace_module(self._model, name, self._parts(name).to(self._device))  # type: ignore[misc]
            for name, owner, leaf in self._tensors(prefix):
                if name.rpartition(".")[0] not in own:
                    _put(owner, leaf, self._rounded(name).to(self._device))

    def empty(self, modules: Sequence[str]) -> None:
        """Let the tensors of some modules go."""
        for prefix in modules:
            for _, owner, leaf in self._tensors(prefix):
                _put(owner, leaf, getattr(owner, leaf).to("meta"))

    def _tensors(self, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
        """(full name, module that owns it, name in that module) of every stored tensor below a module."""
        module = self._model.get_submodule(prefix)
        for key in module.state_dict():
            path, _, leaf = key.rpartition(".")
            yield f"{prefix}.{key}", module.get_submodule(path), leaf

    def _rounded(self, name: str) -> Tensor:
        """A tensor rounded as ``round_unquantized`` rounds those that stay."""
        tensor, owner = self._source.get(name), name.rpartition(".")[0]
        if not tensor.is_floating_point():
            return tensor
        tensor, side = tensor.float(), self._sides.get(owner)
        if side is None or not self._recipe.resolve(owner, side).quantized:
            stored = torch.float16 if side in SIDES else getattr(torch, self._recipe.unquantized_dtype)
            tensor = tensor.to(stored).float()
        if not torch.isfinite(tensor).all():
            raise QuantizationError(f"{name} holds NaN, Inf or values beyond its type; check the checkpoint")
        return tensor


def _lies_in(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor

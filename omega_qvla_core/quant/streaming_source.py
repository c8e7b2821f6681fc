"""What is read from disk, tensor by tensor, and what stands in for calibration where a recipe needs none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omega_qvla_core.checkpoints.weight_files import WeightFiles, open_safetensors

# Tokens of the random input on which the error of a site is measured when there is no calibration.
_PROBE_TOKENS = 16


class Probe:
    """Stands in for calibration statistics where a recipe reads none: random normal tokens, the same for every run."""

    steps = 0

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.counts = [_PROBE_TOKENS]
        self._tokens = torch.randn(_PROBE_TOKENS, columns, generator=torch.Generator().manual_seed(0))

    def check(self, min_tokens: int) -> None:
        """Always enough."""

    def tokens(self) -> list[Tensor]:
        """One row."""
        return [self._tokens]

    def absmax(self) -> Tensor:
        """``[1, I]``."""
        return self._tokens.abs().amax(dim=0, keepdim=True)


class CheckpointSource:
    """Tensors of the checkpoint by the model's names, read one at a time; a file is open only meanwhile."""

    def __init__(self, weights: WeightFiles, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, names

    def get(self, name: str) -> Tensor:
        """The tensor, as stored; a copy that does not keep the file mapped."""
        file_name = self._names[name]
        with open_safetensors(self._weights.tensors[file_name].file) as file:
            return file.get_tensor(file_name).clone()

    def digest(self, names: Sequence[str]) -> str:
        """SHA-256 over names and contents of some tensors, as stored."""
        found = hashlib.sha256()
        for name in sorted(names):
            found.update(f"{name}|".encode())
            found.update(self.get(name).reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def identity(self) -> list[list[Any]]:
        """Names, sizes and times of the files: what must not change between two runs."""
        stats = [(path.name, path.stat()) for path in self._weights.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

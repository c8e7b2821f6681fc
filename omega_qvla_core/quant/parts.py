"""What scope ``whole`` puts in the place of modules that are no linears of a site: tables and weight-only codes.

Each part computes what the module that it replaces computed, holds what a pack stores as buffers, and is rebuilt from
its description and these. They multiply no activations by codes: a looked-up row or a picked weight is dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import PackError, QuantizationError, StepContextError
from omega_qvla_core.kernels import code_range, pack_codes, unpack_codes
from omega_qvla_core.models.gr00t_embodiment import Embodiment, EmbodimentLinear
from omega_qvla_core.models.step_context import current_step
from omega_qvla_core.quant.scales import search_scales, spread_scales

# Rows that are quantized at a time, so that a large table needs little working memory.
_ROWS = 8192


class StoredPart(nn.Module):
    """A part by its description (JSON) and tensors.

    Args:
        spec: ``kind``, ``replaced`` (elements of the module that it stands for), and what its kind needs.
        tensors: Buffers.
    """

    kind = ""
    names: tuple[str, ...] = ()

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = dict(spec)
        for name in self.names:
            self.register_buffer(name, tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """What a pack stores."""
        return {name: getattr(self, name) for name in self.names}

    def _apply(self, fn: Any, recurse: bool = True) -> StoredPart:
        """Conversions of type must not touch what a pack stores; only the device follows."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class QuantizedEmbedding(StoredPart):
    """A token table as codes with a float16 scale per row and group; looked-up rows are dequantized to float32."""

    kind = "embedding"
    names = ("codes", "scales")

    @classmethod
    def of(cls, table: Tensor, bits: int, group: int) -> QuantizedEmbedding:
        """Quantize ``[V, W]``, some rows at a time."""
        codes, scales = quantize_rows(table, bits, group)
        spec = {"kind": cls.kind, "bits": bits, "group": group, "width": table.shape[1], "replaced": table.numel()}
        return cls(spec, {"codes": codes, "scales": scales})

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[...]`` -> float32 ``[..., W]``."""
        rows = tokens.reshape(-1)
        found = _dequantized(self.codes[rows], self.scales[rows], self.spec)
        return found.view(*tokens.shape, self.spec["width"])


class QuantizedEmbodimentLinear(StoredPart):
    """``EmbodimentLinear`` with codes, for all embodiments or some. The weight in use is kept dequantized."""

    kind = "embodiment_linear"
    names = ("codes", "scales", "bias")

    @classmethod
    def of(cls, linear: EmbodimentLinear, bits: int, group: int, kept: tuple[int, ...]) -> QuantizedEmbodimentLinear:
        """Quantize the weights of the embodiments ``kept``."""
        parts = [quantize_rows(linear.W[index].detach().t(), bits, group) for index in kept]
        spec = {
            "kind": cls.kind,
            "bits": bits,
            "group": group,
            "width": linear.W.shape[1],
            "kept": list(kept),
            "replaced": linear.W.numel() + linear.b.numel(),
        }
        tensors = {
            "codes": torch.stack([codes for codes, _ in parts]),
            "scales": torch.stack([scales for _, scales in parts]),
            "bias": linear.b.detach()[list(kept)].half(),
        }
        return cls(spec, tensors)

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(spec, tensors)
        self._used: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """``[B, S, in]`` -> float32 ``[B, S, out]``.

        Raises:
            QuantizationError: The pack does not hold an embodiment.
        """
        x = x.float()
        if len(set(embodiment)) == 1:
            weight, bias = self.weights_of(embodiment[0])
            return x @ weight + bias
        return torch.stack([one @ weight + bias for one, (weight, bias) in zip(x, map(self.weights_of, embodiment))])

    def weights_of(self, embodiment: int) -> tuple[Tensor, Tensor]:
        """float32 weight ``[in, out]`` and bias ``[out]`` of one embodiment.

        Raises:
            QuantizationError: The pack does not hold it.
        """
        row = self._row(embodiment)
        return self._weight(row).t(), self.bias[row].float()

    def _row(self, embodiment: int) -> int:
        kept = self.spec["kept"]
        if embodiment not in kept:
            raise QuantizationError(
                f"embodiment {embodiment} is not in this pack, which keeps {', '.join(map(str, kept))}; quantize again "
                "with embodiments 'all'"
            )
        return kept.index(embodiment)

    def _weight(self, row: int) -> Tensor:
        if self._used is None or self._used[0] != row or self._used[1].device != self.codes.device:
            self._used = (row, _dequantized(self.codes[row], self.scales[row], self.spec))
        return self._used[1]


class StepTable(StoredPart):
    """A modulation layer whose input is the flow time alone: its output per denoise step, float16 ``[T, O]``."""

    kind = "step_table"
    names = ("table",)

    @classmethod
    def of(cls, rows: Tensor, replaced: int) -> StepTable:
        """A table of the rows ``[T, O]``."""
        return cls({"kind": cls.kind, "replaced": replaced}, {"table": rows.half()})

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> float32 ``[B, O]``: the current step's row, whatever ``x`` holds.

        Raises:
            StepContextError: Outside the denoise loop, or in one of another number of steps.
        """
        step, steps = current_step(), self.table.shape[0]
        if step is None or step.total != steps:
            found = "outside the denoise loop" if step is None else f"with {step.total} steps"
            raise StepContextError(
                f"a modulation table of {steps} denoise steps runs {found}; use {steps} steps or quantize again"
            )
        return self.table[step.index].float().expand(x.shape[0], -1)


class Unread(StoredPart):
    """Stands where a layer fed nothing but tables: it passes its input on, as float32, and stores nothing."""

    kind = "unread"

    @classmethod
    def of(cls, replaced: int) -> Unread:
        """In the place of a module with that many elements."""
        return cls({"kind": cls.kind, "replaced": replaced}, {})

    @property
    def weight(self) -> Tensor:
        """Empty; the models read its type."""
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() if x.dim() > 1 else x.float()[:, None]


KINDS: dict[str, type[StoredPart]] = {
    part.kind: part for part in (QuantizedEmbedding, QuantizedEmbodimentLinear, StepTable, Unread)
}


def build_part(name: str, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredPart:
    """A part as a pack describes it.

    Raises:
        PackError: Its kind is unknown, or a tensor is missing or left over.
    """
    kind = KINDS.get(str(spec.get("kind")))
    if kind is None or not isinstance(spec.get("replaced"), int):
        raise PackError(f"{name} is described as {dict(spec)!r}; this release knows {', '.join(KINDS)}")
    if set(tensors) != set(kind.names):
        different = sorted(set(tensors) ^ set(kind.names))
        raise PackError(f"{name}: the pack's tensors differ from a {kind.kind}'s in {', '.join(different)}")
    return kind(spec, tensors)


def stored_parts(model: nn.Module) -> Iterator[tuple[str, StoredPart]]:
    """Every part of a model by name, in model order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StoredPart))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, module)


def quantize_rows(table: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float16 (or float32) scales ``[V, G]`` of ``[V, W]``, rounded to nearest."""
    low, high = code_range(bits)
    codes, scales = [], []
    for rows in table.detach().split(_ROWS):
        rows = rows.double()
        found = search_scales(rows, group, bits, "paper")
        spread = spread_scales(found.double(), group, rows.shape[1])
        codes.append(pack_codes((rows / spread).round().clamp(low, high).to(torch.int8), bits))
        scales.append(found)
    dtype = torch.float32 if any(one.dtype == torch.float32 for one in scales) else torch.float16
    return torch.cat(codes), torch.cat([one.to(dtype) for one in scales])


def _dequantized(codes: Tensor, scales: Tensor, spec: Mapping[str, Any]) -> Tensor:
    width = spec["width"]
    return unpack_codes(codes, spec["bits"], width).float() * spread_scales(scales.float(), spec["group"], width)

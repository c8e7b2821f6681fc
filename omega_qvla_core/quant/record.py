"""What is known about a quantization besides its tensors; travels inside the pack."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from omega_qvla_core.errors import PackError, QuantizationError
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.strict_json import check_keys

_ATTRIBUTE = "quantization_record"


@dataclass(frozen=True)
class QuantizationRecord:
    """Where a quantized model comes from.

    Attributes:
        recipe: How it was quantized.
        num_steps: Denoise steps that it was calibrated for.
        source: Identity of the unquantized model: ``name`` and ``sha256`` of its tensors.
        calibration: Manifest: number of observations, their hashes, noise seeds, tokens sampled.
        sites: Per site name its calibration error, errors per step and notes.
        libraries: Versions that made it.
    """

    recipe: Recipe
    num_steps: int
    source: dict[str, str]
    calibration: dict[str, Any]
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"recipe": self.recipe.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> QuantizationRecord:
        """Inverse of ``to_json``.

        Raises:
            ConfigError: An unknown or missing key, or a recipe that this version does not read.
            PackError: A value of the wrong kind.
        """
        values = dict(check_keys(data, [one.name for one in fields(cls)], [], "quantization record"))
        recipe = Recipe.from_json(values.pop("recipe"))
        if not isinstance(values["num_steps"], int) or not isinstance(values["sites"], dict):
            raise PackError("the quantization record is damaged: num_steps or sites is of the wrong kind")
        return cls(recipe=recipe, **values)


def attach_record(model: nn.Module, record: QuantizationRecord) -> None:
    """Keep the record with the model."""
    setattr(model, _ATTRIBUTE, record)


def record_of(model: nn.Module) -> QuantizationRecord:
    """The record of a quantized model.

    Raises:
        QuantizationError: The model is not quantized.
    """
    record = getattr(model, _ATTRIBUTE, None)
    if record is None:
        raise QuantizationError("the model is not quantized; make one with quantize_policy or load_pack")
    return record

"""Errors of a recipe on single layers stored in a file, with activations to calibrate and to evaluate on.

The file is safetensors with, per layer NAME: ``NAME.weight`` ``[O, I]``, ``NAME.x_calib`` ``[T, n, I]`` and
``NAME.x_eval`` ``[T, m, I]``. T is the number of denoise steps; a layer with one step counts as language side.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.calibrate import calibrate
from omega_qvla_core.quant.quantize import quantize_linears
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import ACTION_HEAD, LANGUAGE, sites_of_linears

_PARTS = ("weight", "x_calib", "x_eval")


@dataclass(frozen=True)
class LayerData:
    """One layer of the file, float32: ``weight [O, I]``, ``x_calib [T, n, I]``, ``x_eval [T, m, I]``."""

    weight: Tensor
    x_calib: Tensor
    x_eval: Tensor

    @property
    def steps(self) -> int:
        """Denoise steps; 0 for the language side, which has one row and no step."""
        return self.x_calib.shape[0] if self.x_calib.shape[0] > 1 else 0


def check_layers(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Quantize every layer of a file on its ``x_calib`` and measure it on its ``x_eval``.

    Args:
        path: The file.
        recipe: How; ``presets.with_activations`` varies the activations of a recipe.

    Returns:
        ``{"recipe": name, "layers": {NAME: {"error": x, "per_step": [...]}}}``, error = ``|y' - y| / |y|`` over all of
        ``x_eval``.

    Raises:
        CheckpointError: The file is missing, damaged or laid out otherwise.
        QuantizationError: A layer cannot be done.
    """
    layers = read_layers(path)
    return {"recipe": recipe.name, "layers": {name: layer_error(layer, recipe) for name, layer in layers.items()}}


def read_layers(path: Path) -> dict[str, LayerData]:
    """The layers of a file by name, sorted."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    names = sorted({name.rsplit(".", 1)[0] for name in tensors})
    if not names:
        raise CheckpointError(f"{path} holds no tensors; expected NAME.weight, NAME.x_calib and NAME.x_eval")
    return {name: _layer(path, name, tensors) for name in names}


def layer_error(layer: LayerData, recipe: Recipe) -> dict[str, Any]:
    """``{"error": x, "per_step": [...]}`` of one layer."""
    model = quantized_layer(layer, recipe)
    weight = layer.weight
    wrong, right = [], []
    for index, x in enumerate(layer.x_eval):
        with _step(index, layer.steps):
            y = x @ weight.T
            wrong.append(float((model.linear(x) - y).double().square().sum()))
            right.append(float(y.double().square().sum()))
    per_step = [(w / max(r, 1e-30)) ** 0.5 for w, r in zip(wrong, right)]
    return {"error": (sum(wrong) / max(sum(right), 1e-30)) ** 0.5, "per_step": per_step}


def quantized_layer(layer: LayerData, recipe: Recipe) -> nn.Module:
    """A module whose attribute ``linear`` is the layer, calibrated on ``x_calib`` and quantized."""
    model = nn.Module()
    model.linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
    model.linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    sites = sites_of_linears(["linear"], ACTION_HEAD if layer.steps else LANGUAGE)
    with torch.no_grad(), calibrate(model, sites) as calibration:
        for index, x in enumerate(layer.x_calib):
            with _step(index, layer.steps):
                model.linear(x)
    quantize_linears(model, sites, recipe, calibration)
    return model


def _step(index: int, steps: int) -> Any:
    return denoise_step(index, steps) if steps else nullcontext()


def _layer(path: Path, name: str, tensors: Mapping[str, Tensor]) -> LayerData:
    missing = [part for part in _PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{path}: layer {name} lacks {name}.{missing[0]}")
    weight, x_calib, x_eval = (tensors[f"{name}.{part}"].float() for part in _PARTS)
    fits = weight.dim() == 2 and all(x.dim() == 3 and x.shape[2] == weight.shape[1] for x in (x_calib, x_eval))
    if not fits or x_calib.shape[0] != x_eval.shape[0]:
        shapes = f"{tuple(weight.shape)}, {tuple(x_calib.shape)}, {tuple(x_eval.shape)}"
        raise CheckpointError(f"{path}: layer {name} has shapes {shapes}; expected [O, I], [T, n, I], [T, m, I]")
    return LayerData(weight, x_calib, x_eval)

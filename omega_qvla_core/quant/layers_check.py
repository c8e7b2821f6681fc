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

from omega_qvla_core.errors import CheckpointError, QuantizationError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.calibrate import calibrate
from omega_qvla_core.quant.quantize import Progress, quantize_linears
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import ACTION_HEAD, LANGUAGE, sites_of_linears
from omega_qvla_core.strict_json import read_json

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


def check_layers(path: Path, recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Quantize every layer of a file on its ``x_calib`` and measure it on its ``x_eval``.

    Args:
        path: The file.
        recipe: How; ``presets.with_activations`` varies the activations of a recipe.
        progress: Called with (done, total, layer).

    Returns:
        ``{"recipe": name, "layers": {NAME: {"error": x, "per_step": [...]}}}``, error = ``|y' - y| / |y|`` over all of
        ``x_eval``.

    Raises:
        CheckpointError: The file is missing, damaged or laid out otherwise.
        QuantizationError: A layer cannot be done.
    """
    layers, found = read_layers(path), {}
    for index, (name, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(index, len(layers), name)
        try:
            found[name] = layer_error(layer, recipe)
        except QuantizationError as error:
            raise QuantizationError(f"layer {name} of {path}: {error}") from error
    if progress is not None:
        progress(len(layers), len(layers), "")
    return {"recipe": recipe.name, "layers": found}


def reference_ratios(result: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Errors of ``check_layers`` as multiples of those that the method's published code scores.

    Args:
        result: From ``check_layers``.
        path: JSON: per layer ``paper_recipe`` (a key of ``scores``) and ``scores``, each with the error ``w4a4``.

    Returns:
        Per layer that the file knows, in the order of ``result``.

    Raises:
        CheckpointError: The file is missing or laid out otherwise, or knows none of the layers.
    """
    reference = read_json(path, "the reference's errors")
    ratios = {}
    for name, found in result["layers"].items():
        try:
            if name in reference:
                scores = reference[name]["scores"]
                ratios[name] = found["error"] / float(scores[reference[name]["paper_recipe"]]["w4a4"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: layer {name} lacks a usable {error}") from error
    if not ratios:
        raise CheckpointError(f"{path} knows none of the layers {', '.join(result['layers'])}")
    return ratios


def read_layers(path: Path) -> dict[str, LayerData]:
    """The layers of a file by name, sorted."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    unknown = sorted(name for name in tensors if name.rpartition(".")[2] not in _PARTS or "." not in name)
    if unknown:
        raise CheckpointError(f"{path} holds {unknown[0]}; expected NAME.weight, NAME.x_calib and NAME.x_eval only")
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
    if not fits or x_calib.shape[0] != x_eval.shape[0] or not all(t.numel() for t in (weight, x_calib, x_eval)):
        shapes = f"{tuple(weight.shape)}, {tuple(x_calib.shape)}, {tuple(x_eval.shape)}"
        raise CheckpointError(f"{path}: layer {name} has shapes {shapes}; expected [O, I], [T, n, I], [T, m, I]")
    for part, tensor in zip(_PARTS, (weight, x_calib, x_eval)):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name}.{part} holds NaN or Inf; record the layer again")
    return LayerData(weight, x_calib, x_eval)

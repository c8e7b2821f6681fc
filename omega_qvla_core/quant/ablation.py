"""Tables that compare recipes: by layer against recorded errors, and by the actions of whole models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.action_error import ActionError, compare_actions
from omega_qvla_core.quant.calibrate import calibrate
from omega_qvla_core.quant.layers_check import check_layers, reference_ratios
from omega_qvla_core.quant.policy import quantize_policy
from omega_qvla_core.quant.presets import with_activations
from omega_qvla_core.quant.quantizable import QuantizablePolicy
from omega_qvla_core.quant.quantize import Progress, quantize_linears
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import find_sites

LAYER_RECIPES: tuple[tuple[str, str | None], ...] = (
    ("paper_w4a4", "static"),
    ("paper_w4a4", None),
    ("executable_w4a4", None),
    ("executable_w4a4", "token"),
    ("auto_w4a4", None),
)
"""Recipe and ``--activations`` of the rows of the table of layers."""

MODEL_RECIPES = ("paper_w4a4", "executable_w4a4", "auto_w4a4", "w4a8", "w4a16", "w8a8")

# Draws of noise per recorded observation: to calibrate with, and others to measure with.
_CALIBRATION_DRAWS = 8
_EVALUATION_DRAWS = 4

# Steps of the recorded models of the method's two families.
_STEPS = {"pi05": 10, "gr00t_n15": 4}


def layer_table(path: Path, reference: Path, progress: Progress | None = None) -> str:
    """Markdown: errors of ``LAYER_RECIPES`` on a file of layers as ratios to the published code's.

    Raises:
        CheckpointError: A file is missing or laid out otherwise.
    """
    rows = []
    for name, activations in LAYER_RECIPES:
        recipe = Recipe.preset(name)
        recipe = recipe if activations is None else with_activations(recipe, activations)
        ratios = reference_ratios(check_layers(path, recipe, progress=progress), reference)
        rows.append((recipe.name, [*ratios.values(), geometric_mean(ratios.values())]))
    return _table(["recipe", *ratios, "geometric mean"], [[f"`{n}`", *(f"{v:.3f}" for v in vs)] for n, vs in rows])


def action_table(
    recipes: Sequence[Recipe], measures: Mapping[str, Callable[[Recipe], ActionError]], progress: Progress | None = None
) -> str:
    """Markdown: action error of every recipe on every model, ``relative (median per observation)``.

    Args:
        recipes: Rows.
        measures: Columns: from ``recorded_model`` or ``held_out_policy``.
        progress: Called with (done, total, what is next).
    """
    rows, total = [], len(recipes) * len(measures)
    for index, recipe in enumerate(recipes):
        cells = [f"`{recipe.name}`"]
        for number, (name, measure) in enumerate(measures.items()):
            if progress is not None:
                progress(index * len(measures) + number, total, f"{recipe.name} {name}")
            found = measure(recipe)
            cells.append(f"{found.relative:.4f} ({found.median:.4f})")
        rows.append(cells)
    if progress is not None:
        progress(total, total, "")
    return _table(["recipe", *measures], rows)


def held_out_policy(policy: QuantizablePolicy, observations: Sequence[Observation]) -> Callable[[Recipe], ActionError]:
    """Measure recipes on a policy: calibrate on every other observation, compare actions on the rest.

    Args:
        policy: Unquantized.
        observations: To calibrate and to measure with.
    """

    def measure(recipe: Recipe) -> ActionError:
        return quantize_policy(policy, recipe, observations[::2], evaluation=observations[1::2])[1].actions

    return measure


def recorded_model(folder: Path) -> Callable[[Recipe], ActionError]:
    """Measure recipes on a folder of recorded tensors (``omega-qvla check parity`` reads the same).

    The recorded observations run with drawn noise: some draws to calibrate with, others to compare actions.

    Raises:
        CheckpointError: A file is missing or does not fit the model.
    """
    from omega_qvla_core.checkpoints.families import build_model
    from omega_qvla_core.checkpoints.strict_loading import load_model
    from omega_qvla_core.checkpoints.weight_files import find_weights
    from omega_qvla_core.parity.fixture import read_fixture

    fixture = read_fixture(folder)
    weights = find_weights(folder)
    model = load_model(lambda: build_model(fixture.config), weights, fixture.family, torch.float32)
    cases = [inputs for _, inputs in sorted(fixture.inputs.items()) if "noise" in inputs]
    if not cases:
        raise CheckpointError(f"{folder} holds no case with noise; nothing can be run")
    prefix_of = {"pi05": _pi05_prefix, "gr00t_n15": _gr00t_prefix}[fixture.family]
    steps, sites = _STEPS[fixture.family], find_sites(model)

    @torch.no_grad()
    def actions(model: nn.Module, draws: range, calibration: Any = None) -> Tensor:
        found = []
        for number, inputs in enumerate(cases):
            prefix = prefix_of(model, inputs)
            if calibration is None:
                cache = model.encode_prefix(prefix)
            else:
                with calibration.token_mask(prefix.pad_mask):
                    cache = model.encode_prefix(prefix)
            for draw in draws:
                generator = torch.Generator().manual_seed(1000 * draw + number)
                noise = torch.randn(inputs["noise"].shape, generator=generator)
                found.append(model.sample_actions(cache, noise, steps))
        return torch.cat(found)

    draws = range(_CALIBRATION_DRAWS, _CALIBRATION_DRAWS + _EVALUATION_DRAWS)
    wanted = actions(model, draws)
    with calibrate(model, sites) as calibration:
        actions(model, range(_CALIBRATION_DRAWS), calibration)

    def measure(recipe: Recipe) -> ActionError:
        quantized = copy.deepcopy(model).requires_grad_(False)
        quantize_linears(quantized, sites, recipe, calibration)
        return compare_actions(actions(quantized, draws), wanted)

    return measure


def _pi05_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    cameras = sorted(int(name[6:]) for name in inputs if re.fullmatch(r"image_\d+", name))
    return model.embed_prefix(
        [inputs[f"image_{camera}"] for camera in cameras],
        [inputs[f"image_mask_{camera}"].bool() for camera in cameras],
        inputs["tokens"],
        inputs["token_mask"].bool(),
        inputs.get("state"),
    )


def _gr00t_prefix(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    return model.embed_pixels(
        inputs["pixel_values"],
        inputs["input_ids"],
        inputs["attention_mask"].bool(),
        inputs["state"],
        inputs["embodiment_id"].tolist(),
        drop_masked=False,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"

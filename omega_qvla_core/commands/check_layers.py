"""``omega-qvla check layers`` and ``check ablation``: what recipes cost on single layers and on whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.commands.quantize import SHIPPED_CALIBRATION


def layers(
    file: Annotated[
        Path, typer.Argument(help="safetensors with NAME.weight [O,I], NAME.x_calib [T,n,I] and NAME.x_eval [T,m,I].")
    ],
    recipe: Annotated[str, typer.Option(help="Preset name, or a recipe file (.json).")] = "executable_w4a4",
    activations: Annotated[
        str | None, typer.Option(help="static, token or token_group, where the recipe leaves a choice.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="JSON with the published code's errors; adds a column of ratios.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Relative output error on x_eval of every layer, calibrated on x_calib. T is the number of denoise steps."""
    from omega_qvla_core.quant.layers_check import check_layers, reference_ratios
    from omega_qvla_core.quant.presets import with_activations
    from omega_qvla_core.quant.recipe import Recipe

    with user_errors():
        chosen = Recipe.load(recipe)
        if activations is not None:
            chosen = with_activations(chosen, activations)
        if as_json:
            result = check_layers(file, chosen)
        else:
            with progress_bar(chosen.name) as bar:
                result = check_layers(file, chosen, progress=bar.update)
        ratios = {} if reference is None else reference_ratios(result, reference)
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False))
        return
    shown = Table("layer", "error", "worst step", "ratio", title=result["recipe"], title_justify="left")
    for name, found in result["layers"].items():
        ratio = f"{ratios[name]:.3f}" if name in ratios else "-"
        shown.add_row(name, f"{found['error']:.4f}", f"{max(found['per_step']):.4f}", ratio)
    console.print(shown)


def ablation(
    layers: Annotated[Path | None, typer.Option(help="File of layers; needs --reference.")] = None,
    reference: Annotated[Path | None, typer.Option(help="JSON with the published code's errors on them.")] = None,
    recorded: Annotated[list[Path] | None, typer.Option(help="Folder of a recorded model; may be repeated.")] = None,
    policy: Annotated[str, typer.Option(help="Policy folder or shipped name; empty for none.")] = "tabletop",
    calibration: Annotated[Path, typer.Option(help="Its observations: half to calibrate, half to measure.")] = (
        SHIPPED_CALIBRATION
    ),
    splits: Annotated[int, typer.Option(min=0, help="Compare over so many random halves; 0: every other one.")] = 0,
    first_split: Annotated[int, typer.Option(min=0, help="Number of the first of these halves.")] = 0,
    results: Annotated[
        Path | None, typer.Option(help="Where finished halves are kept: an interrupted run goes on from there.")
    ] = None,
    recipes: Annotated[str, typer.Option(help="Rows, separated by commas; by default presets and the grid.")] = "",
    out: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
) -> None:
    """Error ratios of recipes on layers; action errors of recipes and of rotation x solver x per-step on models."""
    from omega_qvla_core.errors import ConfigError
    from omega_qvla_core.quant import ablation as tables
    from omega_qvla_core.quant.presets import GRID
    from omega_qvla_core.quant.recipe import Recipe
    from omega_qvla_core.quant.splits import measure_splits, splits_table
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_file import load_observations

    texts = []
    with user_errors(), progress_bar("ablation") as bar:
        if (layers is None) != (reference is None):
            raise ConfigError("--layers and --reference belong together; give both or none")
        names = [name.strip() for name in recipes.split(",") if name.strip()] or [*tables.MODEL_RECIPES, *GRID]
        rows = [Recipe.load(name) for name in names]
        measures = {f"{folder.parent.name}/{folder.name}": tables.recorded_model(folder) for folder in recorded or ()}
        if policy:
            observations = load_observations(calibration).observations
            loaded = Policy.load(policy)
            if splits:
                numbers = range(first_split, first_split + splits)
                found = measure_splits(loaded, observations, rows, numbers, results, bar.update)
                title = f"Action error of {Path(policy).name} against the unquantized policy over random halves:"
                texts.append(f"{title}\n\n{splits_table(found)}")
            else:
                measures[Path(policy).name] = tables.held_out_policy(loaded, observations)
        if layers is not None:
            title = "Error on x_eval as a ratio to the published code's:"
            texts.append(f"{title}\n\n{tables.layer_table(layers, reference, bar.update)}")
        if measures:
            title = "Action error against the unquantized model, relative (median per observation), equal noise:"
            texts.append(f"{title}\n\n{tables.action_table(rows, measures, bar.update)}")
        text = "\n".join(texts)
        if out is not None:
            out.write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)

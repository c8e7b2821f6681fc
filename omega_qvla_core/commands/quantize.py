"""``omega-qvla quantize``: a checkpoint and calibration observations in, a 4-bit pack out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla_core.quant import Recipe

MAX_OBSERVATIONS = 128
"""Observations of a recording that are kept: about as many as the shipped calibration file has (139)."""
SHIPPED_CALIBRATION = Path(__file__).parent.parent / "assets" / "calibration" / "tabletop.safetensors"


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="Policy folder or shipped name.")],
    out: Annotated[Path, typer.Option(help="Folder of the pack.")],
    recipe: Annotated[str, typer.Option(help="Preset name, or a recipe file (.json).")] = "executable_w4a4",
    calibration: Annotated[
        Path,
        typer.Option(help="Observation file, or a recording that an installed plug-in reads, such as a ROS 2 bag."),
    ] = SHIPPED_CALIBRATION,
    contract: Annotated[
        str, typer.Option(help="For a recording: robot contract, a YAML file or a shipped robot's name.")
    ] = "",
    every: Annotated[int, typer.Option(min=1, help="For a recording: take every so many-th observation.")] = 1,
    max_observations: Annotated[
        int, typer.Option("--max", min=1, help="For a recording: at most so many observations, spread evenly over it.")
    ] = MAX_OBSERVATIONS,
    instruction: Annotated[
        str, typer.Option(help="For a recording: what the arm was told; as recorded if not given.")
    ] = "",
    namespace: Annotated[str, typer.Option(help="For a recording: namespace of the robot in it.")] = "",
    remap: Annotated[
        list[str] | None,
        typer.Option(
            help="For a recording: CONTRACT_TOPIC:=RECORDED_TOPIC, for topics that were remapped. Repeatable."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder of report.json, report.md and plots; the pack's own folder if not given."),
    ] = None,
    byte_budget: Annotated[
        float | None, typer.Option(help="For auto recipes: share of the float16 bytes that may be spent, such as 0.3.")
    ] = None,
) -> None:
    """Quantize a policy; write the pack and a report with tables and plots."""
    from omega_qvla_core.runtime.observation_sources import remaps_from

    with user_errors():
        options = {
            "contract": contract,
            "every": every,
            "max_observations": max_observations,
            "instruction": instruction,
            "namespace": namespace,
            "remaps": remaps_from(remap or []),
        }
        text = quantize_to_pack(checkpoint, recipe, calibration, out, report or out, byte_budget, options)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"pack: {out}")
    console.print(f"report: {(report or out) / 'report.md'}")


def quantize_to_pack(
    checkpoint: str,
    recipe: str,
    calibration: Path,
    out: Path,
    report_folder: Path | None = None,
    byte_budget: float | None = None,
    recording: Mapping[str, Any] | None = None,
) -> str:
    """Quantize, save and describe, in ``report_folder`` too if one is given. Returns the report as markdown.

    ``recording``: fields of an ``ObservationRequest``, for a calibration that is a recording.
    """
    from omega_qvla_core.quant import Recipe, quantize_policy, save_pack, write_report
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_sources import ObservationRequest, read_observations

    chosen = Recipe.load(recipe)
    if byte_budget is not None:
        chosen = _with_budget(chosen, byte_budget)
    policy = Policy.load(checkpoint)
    with progress_bar(f"read {calibration.name}") as bar:
        request = ObservationRequest(policy.spec, progress=bar.update, **(recording or {}))
        observations = read_observations(calibration, request).observations
    with progress_bar(f"quantize {chosen.name}") as bar:
        quantized, result = quantize_policy(policy, chosen, observations, progress=bar.update)
    save_pack(quantized, out)
    if report_folder is not None:
        write_report(result, report_folder)
    return result.to_markdown()


def _with_budget(recipe: Recipe, byte_budget: float) -> Recipe:
    if recipe.auto is None:
        raise ConfigError(f"--byte-budget needs an auto recipe such as auto_w4a4; {recipe.name!r} chooses nothing")
    return replace(recipe, auto=replace(recipe.auto, byte_budget=byte_budget))

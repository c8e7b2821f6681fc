"""``omega-qvla quantize``: a checkpoint and calibration observations in, a 4-bit pack out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors

SHIPPED_CALIBRATION = Path(__file__).parent.parent / "assets" / "calibration" / "tabletop.safetensors"


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="Policy folder or shipped name.")],
    out: Annotated[Path, typer.Option(help="Folder of the pack.")],
    recipe: Annotated[str, typer.Option(help="Preset name, or a recipe file (.json).")] = "executable_w4a4",
    calibration: Annotated[Path, typer.Option(help="Observation file.")] = SHIPPED_CALIBRATION,
) -> None:
    """Quantize a policy and write the pack."""
    with user_errors():
        report = quantize_to_pack(checkpoint, recipe, calibration, out)
    console.print(report)
    console.print(f"pack: {out}")


def quantize_to_pack(checkpoint: str, recipe: str, calibration: Path, out: Path) -> str:
    """Quantize, save and describe. Returns the report as markdown."""
    from omega_qvla_core.quant import Recipe, quantize_policy, save_pack
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_file import load_observations

    chosen = Recipe.load(recipe)
    observations = load_observations(calibration).observations
    with progress_bar(f"quantize {chosen.name}") as bar:
        quantized, report = quantize_policy(Policy.load(checkpoint), chosen, observations, progress=bar.update)
    save_pack(quantized, out)
    return report.to_markdown()

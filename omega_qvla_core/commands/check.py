"""``omega-qvla check``: compare what is computed here with what a reference recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from omega_qvla_core.commands.check_layers import ablation, layers
from omega_qvla_core.commands.console import console, progress_bar, user_errors

app = typer.Typer(no_args_is_help=True, help="Compare with recorded tensors of a reference implementation.")
app.command()(layers)
app.command()(ablation)


@app.command()
def parity(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json, model, inputs and outputs.safetensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Largest error of every recorded tensor per case (Pi 0.5 or GR00T N1.5); exit code 1 past the tolerance."""
    from omega_qvla_core.parity import CaseResult, check_parity

    def table(case: CaseResult) -> Table:
        shown = Table("tensor", "largest error", "tolerance", "result", title=case.name, title_justify="left")
        for result in case.tensors:
            error = "-" if result.error is None else f"{result.error:.2e}"
            outcome = "[green]ok[/green]" if result.passed else "[red]FAILED[/red] " + result.reason
            shown.add_row(result.name, error, result.tolerance, outcome.strip())
        return shown

    with user_errors():
        if as_json:
            report = check_parity(folder)
        else:
            with progress_bar("parity") as bar:
                report = check_parity(folder, progress=bar.update)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, allow_nan=False))
    else:
        for case in report.cases:
            console.print(table(case))
        if report.skipped:
            console.print(f"{len(report.skipped)} tensors of other attention kernels are not compared")
        cases = f"{sum(case.passed for case in report.cases)} of {len(report.cases)} cases pass"
        outcome = "[green]passed[/green]" if report.passed else "[red]FAILED[/red]"
        console.print(f"{report.family}: {cases}, {report.compared} tensors compared: {outcome}")
    if not report.passed:
        raise typer.Exit(1)

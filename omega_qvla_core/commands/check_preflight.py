"""``omega-qvla check preflight``: whether a checkpoint is whole and fits the robot, before anything moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from omega_qvla_core.commands.console import console, user_errors


def preflight(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or pack folder, or a shipped name.")],
    contract: Annotated[Path | None, typer.Option(help="Robot contract (YAML of config/robots).")] = None,
    robot: Annotated[str | None, typer.Option(help="Known robot setup, or a JSON file with one.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="File or folder of the tokenizer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tensors, normalization, cameras, dimensions, action mode, horizon: one row each; exit code 1 if one fails."""
    from omega_qvla_core.checkpoints.folder import resolve_folder
    from omega_qvla_core.checkpoints.preflight import preflight as run
    from omega_qvla_core.checkpoints.preflight import read_requirements

    with user_errors():
        requirements = None if contract is None else read_requirements(contract)
        report = run(resolve_folder(checkpoint), requirements, robot, tokenizer)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        table = Table("check", "found", "expected", "result", "remedy")
        for row in report.rows:
            outcome = "[green]ok[/green]" if row.ok else "[red]FAILED[/red]"
            table.add_row(row.check, escape(row.found), escape(row.expected), outcome, escape(row.remedy))
        console.print(table)
    if not report.passed:
        raise typer.Exit(1)

"""``omega-qvla-ros trace``: figures and a picture of a trace."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from omega_qvla_core.commands.console import console, user_errors
from omega_qvla_ros.commands.options import JsonOption


def trace(
    path: Annotated[Path, typer.Argument(help="Trace of a run, as the policy node writes it (trace_file).")],
    plot: Annotated[Path | None, typer.Option(help="Also draw every chunk into this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What became of every chunk of a run: counts, reasons, latency, ages."""
    from rich.table import Table

    from omega_qvla_ros import trace_view
    from omega_qvla_ros.trace import read_trace

    with user_errors():
        found = read_trace(path)
        summary = trace_view.summarise(found)
        if plot is not None:
            trace_view.plot(found, plot)
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=1))
        return
    header = found.header
    table = Table("", "", title=f"{header.policy} ({header.quantization}) on {header.robot}", show_header=False)
    for name, value in trace_view.rows(summary):
        table.add_row(escape(name), escape(value))
    console.print(table)
    if found.cut_lines:
        console.print("the last line is cut off and was left out")
    if plot is not None:
        console.print(f"picture: {plot}")

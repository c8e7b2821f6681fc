"""Command line of the soak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_ros.processes import exit_on_signals
from omega_qvla_ros.soak.report import SoakFigures, report_table
from omega_qvla_ros.soak.run import SoakOptions, soak


def command(
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the run.")] = 30.0,
    out: Annotated[Path, typer.Option(help="Folder for soak.json and the nodes' logs.")] = Path("out/soak"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the faults.")] = 0,
    policy: Annotated[str, typer.Option(help="Checkpoint or pack: a folder or a shipped name.")] = "tabletop_w4a4",
    burners: Annotated[
        int, typer.Option(min=-1, help="Processes that keep a processor busy on and off; -1: one per processor.")
    ] = -1,
) -> None:
    """Run bridge and policy node under load and random faults; exits with 1 if anything may not happen did."""
    count = (os.cpu_count() or 1) if burners < 0 else burners
    options = SoakOptions(minutes, seed, policy, count)
    seconds = int(minutes * 60)

    with user_errors(), progress_bar("soak, s", seconds) as bar:

        def progress(figures: SoakFigures) -> None:
            note = f"{sum(figures.faults.values())} faults, {len(figures.violations())} violations"
            bar.update(min(int(figures.minutes * 60), seconds), seconds, note)

        try:
            figures = soak(options, out, progress)
        except KeyboardInterrupt:
            figures = SoakFigures.read(out / "soak.json")
    console.print(report_table(figures))
    for example in figures.examples:
        console.print(f"  {example}", highlight=False)
    console.print(f"wrote {out / 'soak.json'}")
    if figures.violations() or not figures.finished:
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    exit_on_signals()
    typer.run(command)


if __name__ == "__main__":
    main()

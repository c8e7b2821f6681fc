"""The ``omega-qvla-ros`` command: bags, traces and contracts. The nodes themselves are executables of their own."""

from __future__ import annotations

import typer

from omega_qvla_core.commands.console import setup_logging
from omega_qvla_ros.commands import bag, contract, replay, trace

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Ω-QVLA beside the robot: bags, traces and contracts. Nodes are run with ros2 run omega_qvla_ros NODE.",
)
app.add_typer(contract.app, name="contract")
app.command()(bag.bag)
app.command()(bag.repair)
app.command()(bag.calibration)
app.command()(replay.replay)
app.command()(trace.trace)


@app.callback()
def _main() -> None:
    setup_logging()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

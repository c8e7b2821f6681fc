"""The ``omega-qvla`` command."""

from __future__ import annotations

import typer

from omega_qvla_core.commands import (
    bench,
    check,
    check_preflight,
    evaluate,
    inspect,
    quantize,
    quantize_large,
    tabletop,
    train,
)
from omega_qvla_core.commands.console import setup_logging

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Ω-QVLA: quantize, pack, evaluate and train vision-language-action policies.",
)
app.add_typer(check.app, name="check")
app.add_typer(tabletop.app, name="tabletop")
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.command()(quantize.quantize)
app.command()(inspect.inspect)
app.add_typer(quantize_large.app, name="large")
app.add_typer(bench.app, name="bench")
check.app.command()(check_preflight.preflight)


@app.callback()
def _main() -> None:
    setup_logging()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

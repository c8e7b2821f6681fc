"""``omega-qvla tabletop``: demonstrations and calibration observations of the tabletop environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.envs.tabletop import seeds

app = typer.Typer(no_args_is_help=True, help="Demonstrations and calibration observations of the tabletop arm.")


@app.command()
def demos(
    out: Annotated[Path, typer.Option(help="Folder for the shards; shards that are there are kept.")],
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to record, task kinds and colours in turn.")] = 1500,
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with a renderer of its own.")] = 2,
    validation: Annotated[bool, typer.Option(help="Use the validation seeds instead of the training ones.")] = False,
) -> None:
    """Record demonstrations of the scripted expert, with command noise."""
    from omega_qvla_core.envs.tabletop.demonstrations import generate

    chosen = seeds.VALIDATION if validation else seeds.DEMONSTRATIONS
    with user_errors(), progress_bar("demonstrations", episodes) as bar:
        generate(out, episodes, processes, chosen, progress=lambda done, total: bar.update(done, total))
    console.print(f"demonstrations are in {out}")


@app.command()
def calibration(
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    policy: Annotated[str, typer.Option(help="Unquantized policy: folder or shipped name.")] = "tabletop",
    episodes: Annotated[int, typer.Option(min=1)] = 36,
    per_episode: Annotated[int, typer.Option(min=1, help="Observations kept per episode.")] = 4,
) -> None:
    """Record calibration observations in the middle of rollouts."""
    from omega_qvla_core.evaluate.calibration import record_calibration
    from omega_qvla_core.runtime import Policy

    with user_errors(), progress_bar("rollouts", episodes) as bar:
        count = record_calibration(
            Policy.load(policy), seeds.CALIBRATION[:episodes], out, per_episode=per_episode, progress=bar.update
        )
    console.print(f"{count} observations are in {out}")

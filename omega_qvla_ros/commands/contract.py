"""``omega-qvla-ros contract check``: a robot contract on its own, and against a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, user_errors
from omega_qvla_core.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Robot contracts.")


@app.callback()
def _contract() -> None:
    """Robot contracts."""


@app.command()
def check(
    contract: Annotated[str, typer.Argument(help="A YAML file, or a shipped robot's name.")],
    checkpoint: Annotated[str | None, typer.Option(help="Also check that this policy fits the robot.")] = None,
    urdf: Annotated[
        Path | None, typer.Option(help="Also take limits from this URDF, and refuse ones that are looser than its.")
    ] = None,
) -> None:
    """Read a contract as the node does; exit code 1 with the reason if it is refused."""
    from rich.table import Column, Table

    from omega_qvla_core.runtime import Policy
    from omega_qvla_ros.contract import check_policy, limits_from_urdf, load_contract, with_urdf_limits
    from omega_qvla_ros.resources import resolve_contract

    with user_errors():
        found = load_contract(resolve_contract(contract))
        if urdf is not None:
            found = with_urdf_limits(found, limits_from_urdf(_text(urdf), found.joint_names))
        limits = found.joint_limits()
        joint = Column("joint", overflow="fold")  # a name that is cut off cannot be compared with the driver's
        table = Table(joint, "unit", "position", "velocity /s", "acceleration /s^2", "jump", title=found.name)
        for k, joint in enumerate(found.joints):
            span = f"{limits.position_min[k]:g} to {limits.position_max[k]:g}"
            numbers = (limits.max_velocity[k], limits.max_acceleration[k], limits.max_jump[k])
            table.add_row(joint.name, joint.unit, span, *(f"{number:g}" for number in numbers))
        console.print(table)
        for camera in found.cameras:
            console.print(f"camera {camera.key}: {camera.topic}, {camera.timeout_s:g} s", highlight=False)
        if checkpoint is not None:
            spec = Policy.load(checkpoint).spec
            check_policy(found, spec)
            console.print(f"{spec.name!r} fits {found.name!r}", highlight=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a URDF: {error}") from error

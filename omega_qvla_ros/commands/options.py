"""Options that several verbs share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BagArgument = Annotated[Path, typer.Argument(help="Folder of a bag (MCAP or sqlite3), or one of its files.")]
ContractOption = Annotated[str, typer.Option(help="Robot contract: a YAML file or a shipped robot's name.")]
InstructionOption = Annotated[str, typer.Option(help="What the arm was told; as recorded if not given.")]
NamespaceOption = Annotated[str, typer.Option(help="Namespace of the robot in the bag.")]
RemapOption = Annotated[
    list[str] | None,
    typer.Option(help="CONTRACT_TOPIC:=RECORDED_TOPIC, for topics that were remapped. Repeatable."),
]
EveryOption = Annotated[int, typer.Option(min=1, help="Take every so many-th observation.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

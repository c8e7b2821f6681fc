"""``omega-qvla-ros bag | repair | calibration``: what is in a bag, mend it, take observations out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_ros.commands.options import (
    BagArgument,
    ContractOption,
    EveryOption,
    InstructionOption,
    NamespaceOption,
    RemapOption,
)


def bag(path: BagArgument) -> None:
    """List the topics of a bag."""
    from rich.table import Column, Table

    from omega_qvla_ros.bags.reader import Bag

    with user_errors(), Bag(path) as opened:
        names = (Column(header, overflow="fold") for header in ("topic", "type"))  # names are told apart by their ends
        table = Table(*names, "messages", title=f"{path}, {opened.duration_s:.1f} s")
        for topic in opened.topics.values():
            table.add_row(topic.name, topic.msgtype, str(topic.count))
    console.print(table)


def repair(path: BagArgument) -> None:
    """Mend a bag in place whose recorder was killed or had a full disk; everything whole in it is kept."""
    from omega_qvla_ros.bags.salvage import mend

    with user_errors():
        for file in mend(path):
            done = "was whole" if file.was_whole else "mended"
            told = f"{file.path}: {done}, {file.kept_bytes} bytes kept, {file.cut_bytes} cut off"
            console.print(told, highlight=False, soft_wrap=True)
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        console.print(f"for the ros2 command: ros2 bag reindex {path}", highlight=False, soft_wrap=True)


def calibration(
    path: BagArgument,
    contract: ContractOption,
    checkpoint: Annotated[str, typer.Option(help="Policy that the observations are for: folder or shipped name.")],
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")],
    every: EveryOption = 1,
    max_observations: Annotated[
        int, typer.Option("--max", min=1, help="At most so many observations, spread evenly over the bag.")
    ] = 128,
    instruction: InstructionOption = "",
    namespace: NamespaceOption = "",
    remap: RemapOption = None,
) -> None:
    """Write the observations of a bag as an observation file, for every command that takes --calibration."""
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_file import save_observations
    from omega_qvla_core.runtime.observation_sources import ObservationRequest, remaps_from
    from omega_qvla_ros.bags.calibration import SOURCE

    with user_errors(), progress_bar(f"read {path.name}") as bar:
        request = ObservationRequest(
            Policy.load(checkpoint).spec,
            contract,
            every,
            max_observations,
            instruction,
            namespace,
            remaps_from(remap or []),
            bar.update,
        )
        found = SOURCE.load(path, request)
        save_observations(out, found.observations, found.sources)
    console.print(f"{len(found.observations)} observations are in {out}")

"""``omega-qvla-ros replay``: a bag through a policy, compared with the run and with another policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_ros.commands.options import (
    BagArgument,
    ContractOption,
    InstructionOption,
    NamespaceOption,
    RemapOption,
)


def replay(
    path: BagArgument,
    contract: ContractOption,
    checkpoint: Annotated[str, typer.Option(help="Policy to replay: folder, pack or shipped name.")],
    out: Annotated[Path, typer.Option(help="Folder for replay.md, replay.json and replay.png.")],
    against: Annotated[str | None, typer.Option(help="Another policy, run on the same observations and noise.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace of the same run: plan at its times, with its noise, and compare with it.")
    ] = None,
    rate_hz: Annotated[
        float, typer.Option(min=0.0, help="Without a trace: inferences per second; 0 takes the contract's.")
    ] = 0.0,
    max_inferences: Annotated[int, typer.Option("--max", min=1, help="End after so many inferences.")] = 500,
    seed: Annotated[int, typer.Option(help="Without a trace: seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where the policies compute: cpu or cuda.")] = "cpu",
    instruction: InstructionOption = "",
    namespace: NamespaceOption = "",
    remap: RemapOption = None,
) -> None:
    """Run a policy on a bag, without a robot; tables of differences per joint, and a picture."""
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_sources import remaps_from
    from omega_qvla_ros.bags.playback import Playback, PlaybackOptions
    from omega_qvla_ros.bags.reader import Bag
    from omega_qvla_ros.bags.replay import ReplayOptions
    from omega_qvla_ros.bags.replay import replay as run
    from omega_qvla_ros.bags.replay_report import ReplayReport, policy_title
    from omega_qvla_ros.contract import load_contract
    from omega_qvla_ros.resources import resolve_contract
    from omega_qvla_ros.trace import read_trace

    with user_errors():
        options = ReplayOptions(rate_hz, max_inferences, seed)
        robot = load_contract(resolve_contract(contract))
        traced = None if trace is None else read_trace(trace)
        policy = Policy.load(checkpoint, device=device)
        other = None if against is None else Policy.load(against, device=device)
        with Bag(path) as bag, progress_bar(f"replay {path.name}") as bar:
            names = PlaybackOptions(namespace, remaps_from(remap or []), instruction)
            playback = Playback(bag, robot, policy.spec, names)
            found = run(playback, policy, options, other, traced, bar.update)
        report = ReplayReport(
            str(path),
            robot,
            policy_title(policy.spec),
            "" if other is None else policy_title(other.spec),
            found,
            1.0 / policy.spec.control_hz,
            policy.spec.first_action_delay_s,
            None if traced is None else len(traced.records),
        )
        report.write(out)
    console.print(report.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {out}")

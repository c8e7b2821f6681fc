"""``make demo``: two ROS 2 nodes as two processes, one simulated arm, the shipped 4-bit policy and its original.

The same episodes are run with both policies over real topics. Prints a line per episode and a table, writes a video,
a contact sheet and all figures as JSON.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from omega_qvla_core.commands.console import ProgressBar, console, progress_bar, user_errors
from omega_qvla_core.envs.tabletop.seeds import ROS_EVALUATION
from omega_qvla_core.evaluate.statistics import wilson_interval
from omega_qvla_core.evaluate.video import Clip, write_contact_sheet, write_video
from omega_qvla_ros.nodes.episode_runner_node import EpisodeRecord, EpisodeRequest, episode_requests, run_episodes
from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id, ros_environment
from omega_qvla_ros.processes import NodeProcess, exit_on_signals, first_failure, running

QUANTIZED = "tabletop_w4a4"
UNQUANTIZED = "tabletop"
OVERVIEW_RATE_HZ = 10
"""Rate of the frames of the video; the bridge's default for its overview camera."""
CONTACT_SHEET_ROWS = 6


@dataclass
class PolicyRun:
    """All episodes of one policy over topics."""

    policy: str
    records: Sequence[EpisodeRecord]
    clips: list[Clip]
    diagnostics: dict[str, str]
    bridge: dict[str, str]
    rejected_trajectories: int
    weight_bytes: int

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return sum(record.success for record in self.records)


def run_policy(policy: str, requests: Sequence[EpisodeRequest], logs: Path, bar: ProgressBar, video: bool) -> PolicyRun:
    """Start both nodes, run the episodes, stop the nodes.

    Args:
        policy: Shipped name or folder.
        requests: Episodes in order.
        logs: Folder for the nodes' log files.
        bar: Counts the episodes.
        video: Whether to collect the overview camera's frames.

    Raises:
        EpisodeError: A node did not start, or an episode could not be run.
    """
    domain_id = free_domain_id()
    enter_ros_environment(domain_id)
    environment = ros_environment(domain_id, threads=1)
    clips: list[Clip] = []
    frames: list[np.ndarray] = []

    def on_episode(record: EpisodeRecord) -> None:
        outcome = "[green]success[/green]" if record.success else f"[red]failed[/red] at stage {record.stage!r}"
        bar.print(f"  {policy:14s} {record.instruction:54s} {outcome} {record.sim_time_s:5.1f} s")
        clips.append(Clip(list(frames), record.instruction, record.success))
        frames.clear()
        bar.advance()

    starters = (
        lambda: NodeProcess(
            "omega_qvla_ros.nodes.mujoco_bridge_node",
            environment,
            logs / f"bridge_{Path(policy).name}.log",
            {"overview": video},
        ),
        lambda: NodeProcess(
            "omega_qvla_ros.nodes.policy_node",
            environment,
            logs / f"policy_{Path(policy).name}.log",
            {
                "checkpoint": policy,
                "use_sim_time": True,
                "auto_activate": True,
                "start_on_activate": False,
                "inference_threads": 1,
            },
        ),
    )
    with running(*starters) as nodes:
        run = run_episodes(
            requests,
            on_episode=on_episode,
            on_frame=(lambda _topic, frame, _time_s: frames.append(frame)) if video else None,
            failure=lambda: first_failure(nodes),
        )
    rejected = sum(record.rejected_trajectories for record in run.records)
    return PolicyRun(policy, run.records, clips, dict(run.policy), dict(run.bridge), rejected, weight_bytes(policy))


def weight_bytes(policy: str) -> int:
    """Bytes of the weights that the quantizer is for."""
    # torch takes seconds to import: only when the nodes, which need the processor at their start, have run.
    from omega_qvla_core.quant.report import in_scope_bytes
    from omega_qvla_core.runtime import Policy

    return in_scope_bytes(Policy.load(policy))


def summary_table(runs: Sequence[PolicyRun]) -> Table:
    """Success, latency, control rate and bytes of every policy."""
    table = Table(title="Over ROS 2 topics, same seeds")
    for column in ("", *(run.policy for run in runs)):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, cell) -> None:
        table.add_row(name, *(cell(run) for run in runs))

    def successes(run: PolicyRun) -> str:
        low, high = wilson_interval(run.successes, len(run.records))
        return f"{run.successes} of {len(run.records)} [{100 * low:.0f}, {100 * high:.0f} %]"

    row("successes [95 % interval]", successes)
    row("wrong colour", lambda run: str(sum(r.wrong_colour for r in run.records)))
    row(
        "mean seconds of a success",
        lambda run: f"{np.mean([r.sim_time_s for r in run.records if r.success] or [np.nan]):.1f}",
    )
    row("inference p50", lambda run: f"{run.diagnostics.get('inference_p50_ms', '?')} ms")
    row("inference p95", lambda run: f"{run.diagnostics.get('inference_p95_ms', '?')} ms")
    row("control rate held (simulated time)", lambda run: f"{run.diagnostics.get('control_rate_hz', '?')} Hz")
    # The simulator's clock waits for a machine that is too slow; without this line the rate would look good anyway.
    row("simulated seconds per second", lambda run: run.bridge.get("real_time_factor", "?"))
    row("rejected trajectories", lambda run: str(run.rejected_trajectories))
    row("quantizable weights", lambda run: f"{run.weight_bytes / 1e3:.0f} kB")
    return table


def write_results(path: Path, runs: Sequence[PolicyRun]) -> None:
    """Write every figure as JSON."""
    data = [
        {
            "policy": run.policy,
            "successes": run.successes,
            "episodes": [{k: v for k, v in asdict(r).items() if k != "policy"} for r in run.records],
            "rejected_trajectories": run.rejected_trajectories,
            "in_scope_weight_bytes": run.weight_bytes,
            "diagnostics": run.diagnostics,
            "bridge_diagnostics": run.bridge,
        }
        for run in runs
    ]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def demo(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per policy.")] = 9,
    first_seed: Annotated[int, typer.Option(min=0, help="First seed of the start poses.")] = ROS_EVALUATION.start,
    out: Annotated[Path, typer.Option(help="Folder for demo.mp4, demo.png and demo.json.")] = Path(),
    policies: Annotated[str, typer.Option(help="Policies to run, separated by commas.")] = f"{QUANTIZED},{UNQUANTIZED}",
    video: Annotated[bool, typer.Option(help="Record the first policy's episodes.")] = True,
) -> None:
    """Run the arm over ROS 2 topics with the 4-bit policy, then with the unquantized one on the same seeds."""
    names = [name.strip() for name in policies.split(",") if name.strip()]
    requests = episode_requests(episodes, first_seed)
    out.mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(prefix="omega_qvla_demo_"))
    console.print(f"node logs: {logs}")
    runs = []
    with user_errors(), progress_bar("episodes", episodes * len(names)) as bar:
        for number, name in enumerate(names):
            runs.append(run_policy(name, requests, logs, bar, video and number == 0))
    console.print(summary_table(runs))
    write_results(out / "demo.json", runs)
    if video and any(clip.frames for clip in runs[0].clips):
        write_video(out / "demo.mp4", runs[0].clips, OVERVIEW_RATE_HZ)
        write_contact_sheet(out / "demo.png", runs[0].clips[:CONTACT_SHEET_ROWS])
        console.print(f"wrote {out / 'demo.mp4'}, {out / 'demo.png'} and {out / 'demo.json'}")
    if any(run.rejected_trajectories for run in runs):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    exit_on_signals()
    typer.run(demo)


if __name__ == "__main__":
    main()

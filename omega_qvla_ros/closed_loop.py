"""Closed loop in exact simulated time: a policy, the scheduler, the guard, a stock controller and the simulated arm.

What the nodes do over topics, without topics and without wall time: an inference takes exactly as long as it is told,
a message arrives exactly when it is told. So two methods can be compared on the same episodes, on any machine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.envs.tabletop import COMMAND_PERIOD_S, JOINT_NAMES, TabletopEnv, Task, limit_command
from omega_qvla_core.envs.tabletop.seeds import VALIDATION
from omega_qvla_core.envs.tabletop.tasks import KINDS
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.rollout import RENDER_PX, observe, task_of_seed
from omega_qvla_core.evaluate.statistics import wilson_interval
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_core.runtime import Policy
from omega_qvla_ros import jtc
from omega_qvla_ros.contract import RobotContract, check_policy, load_contract
from omega_qvla_ros.guard import ChunkRejected, MotionGuard
from omega_qvla_ros.motion import Motion
from omega_qvla_ros.resources import resolve_contract
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler, Ticket
from omega_qvla_ros.splines import nanoseconds, seconds

log = logging.getLogger(__name__)

METHODS = ("none", "blend", "rtc", "rtc_only")
STEP_NS = nanoseconds(COMMAND_PERIOD_S)
SETTLE_NS = nanoseconds(0.2)
"""The arm stands so long before the first observation, as after a reset."""
RETRY_NS = nanoseconds(0.5)
"""Hold after a refused chunk; the node's ``retry_delay_s``."""
VALIDATION_OFFSET = 5000
"""First seed of ``VALIDATION`` used here: the ones before served the training."""


@dataclass(frozen=True)
class LoopOptions:
    """What is varied.

    Attributes:
        method: ``none`` (the new chunk replaces the old one), ``blend``, ``rtc`` (guided, then blended) or
            ``rtc_only`` (not blended).
        latency_steps: Time of an inference in control periods.
        execution_horizon_steps: Steps between the observations of two inferences; more where the latency is longer.
        transport_s: From sending a trajectory to the controller.
    """

    method: str = "blend"
    latency_steps: int = 2
    execution_horizon_steps: int = 4
    transport_s: float = 0.002


@dataclass
class LoopResult:
    """One episode.

    Attributes:
        success: The task was done in time.
        duration_s: Simulated time.
        seam_jump: Per switch, the largest difference of a joint's new and old target for the first new step, as a share
            of its ``max_jump``: how much the new chunk disagrees with the motion that is under way.
        seam_acceleration: Per switch, the policy's own acceleration there before the guard, as a multiple of the limit.
        peak_velocity, peak_acceleration: Of the commanded motion, as a share of the limit.
        rejected, clamped: Chunks refused; chunks in which some joint was limited, by kind.
        inferences: Chunks planned.
        holds, refused_messages: Holds; trajectories that the controller refused (must be 0).
    """

    seed: int
    task: str
    success: bool = False
    duration_s: float = 0.0
    seam_jump: list[float] = field(default_factory=list)
    seam_acceleration: list[float] = field(default_factory=list)
    peak_velocity: float = 0.0
    peak_acceleration: float = 0.0
    rejected: int = 0
    clamped: dict[str, int] = field(default_factory=dict)
    inferences: int = 0
    holds: int = 0
    refused_messages: int = 0


class ClosedLoop:
    """Runs episodes of one policy.

    Args:
        policy: The policy.
        contract: The tabletop arm's contract; its blend time and limits are used.
        options: See ``LoopOptions``.
    """

    def __init__(self, policy: Policy, contract: RobotContract, options: LoopOptions) -> None:
        if options.method not in METHODS:
            raise ConfigError(f"method {options.method!r} is not one of {', '.join(METHODS)}")
        self._policy = policy
        self._contract = contract
        self._options = options
        self._binding = check_policy(contract, policy.spec)
        self._env = TabletopEnv(image_size=RENDER_PX)
        self._speed = None

    def close(self) -> None:
        """Free the simulator's OpenGL context."""
        self._env.close()

    def run(self, seed: int, task: Task) -> LoopResult:
        """One episode, reproducible to the last bit on one machine."""
        env, contract, options = self._env, self._contract, self._options
        env.reset(seed, task)
        instruction = task.wording(seed)
        period_ns = nanoseconds(contract.period_s)
        blend_s = contract.chunk.blend_time_s if options.method in ("blend", "rtc") else 0.0
        step_s, least_s = 1.0 / self._policy.spec.control_hz, contract.chunk.min_remaining_s
        scheduler = ChunkScheduler(options.execution_horizon_steps, blend_s, step_s, least_s)
        guard = MotionGuard(contract)
        motion = Motion(contract, self._binding, self._policy.spec.horizon, scheduler, guard)
        controller = jtc.TrajectoryExecutor(JOINT_NAMES, interpolate_from_desired_state=True)
        controller.hold(env.joint_positions())
        result = LoopResult(seed, str(task))
        self._speed: np.ndarray | None = None
        running: tuple[int, Ticket, ActionChunk] | None = None
        mail: list[tuple[int, Any]] = []
        now_ns, hold_until_ns = 0, 0
        end_ns = SETTLE_NS + task.max_steps * period_ns
        while now_ns < end_ns:
            messages = []
            if running is not None and now_ns >= running[0]:
                if self._use(motion, guard, scheduler, running, now_ns, env, result):
                    messages.append(motion.tick(now_ns))
                elif guard.counters.rejected.total() > result.rejected:
                    result.rejected = guard.counters.rejected.total()
                    hold_until_ns = now_ns + RETRY_NS
                    motion.hold(now_ns)
                running = None
            if now_ns % period_ns == 0:
                messages.append(motion.tick(now_ns))
                free = running is None and now_ns >= max(SETTLE_NS, hold_until_ns)
                if free and scheduler.is_due(now_ns):
                    ticket = scheduler.begin(now_ns)
                    committed = self._committed(motion, ticket)
                    chunk = self._policy.infer(
                        observe(env, instruction), seed=inference_seed(seed, result.inferences), **committed
                    )
                    running = (now_ns + options.latency_steps * period_ns, ticket, chunk)
                    result.inferences += 1
            mail += [(now_ns + nanoseconds(options.transport_s), m) for m in messages if m is not None]
            now_ns = self._step(controller, mail, now_ns, result)
            if now_ns > SETTLE_NS and now_ns % period_ns == 0 and env.update_status().success:
                result.success = True
                break
        result.duration_s = float(seconds(now_ns - SETTLE_NS))
        result.holds = motion.counters.holds
        for kind in ("position", "velocity", "acceleration"):
            result.clamped[kind] = getattr(guard.counters, f"clamped_{kind}").total()
        return result

    def _committed(self, motion: Motion, ticket: Ticket) -> dict[str, Any]:
        if not self._options.method.startswith("rtc"):
            return {}
        latency_s = self._options.latency_steps * self._contract.period_s
        spec = self._policy.spec
        prefix = motion.committed_prefix(
            ticket.observation_ns, latency_s, spec.first_action_delay_s, self._env.joint_positions()
        )
        return {"committed": prefix}

    def _use(
        self,
        motion: Motion,
        guard: MotionGuard,
        scheduler: ChunkScheduler,
        done: tuple[int, Ticket, ActionChunk],
        now_ns: int,
        env: TabletopEnv,
        result: LoopResult,
    ) -> bool:
        _, ticket, chunk = done
        before = motion.plan
        moving = before is not None and now_ns < before.end_ns and not motion.holding
        try:
            motion.on_chunk(ticket, chunk, now_ns, env.joint_positions(), env.joint_velocities())
        except (ChunkDropped, ChunkRejected) as reason:
            log.debug("seed %d at %.2f s: %s", result.seed, seconds(now_ns), reason)
            scheduler.retry()
            return False
        if moving and motion.seam is not None:
            result.seam_jump.append(float((motion.seam.difference / guard.contract_limits.max_jump)[:-1].max()))
            result.seam_acceleration.append(
                float((motion.seam.acceleration / guard.contract_limits.max_acceleration)[:-1].max())
            )
        return True

    def _step(
        self, controller: jtc.TrajectoryExecutor, mail: list[tuple[int, Any]], now_ns: int, result: LoopResult
    ) -> int:
        """One sample of the controller, then physics, as in the simulator node."""
        env, limits = self._env, self._contract.joint_limits()
        target_ns = now_ns + STEP_NS
        for at_ns, message in [m for m in mail if m[0] <= target_ns]:
            result.refused_messages += controller.accept(message, at_ns) is not None
        mail[:] = [m for m in mail if m[0] > target_ns]
        before = env.command()
        target, speed = controller.sample(target_ns, env.joint_positions(), env.joint_velocities())
        result.peak_velocity = max(result.peak_velocity, float((np.abs(speed) / limits.max_velocity).max()))
        if self._speed is not None:
            change = np.abs(speed - self._speed) / COMMAND_PERIOD_S
            result.peak_acceleration = max(result.peak_acceleration, float((change / limits.max_acceleration).max()))
        self._speed = speed
        env.set_command(limit_command(before, target, COMMAND_PERIOD_S))
        env.advance(COMMAND_PERIOD_S)
        return target_ns


@dataclass(frozen=True)
class Summary:
    """All episodes of one setting."""

    options: LoopOptions
    results: Sequence[LoopResult]

    @property
    def successes(self) -> int:
        """Episodes that succeeded."""
        return sum(result.success for result in self.results)

    def seams(self, name: str) -> np.ndarray:
        """``seam_jump`` or ``seam_acceleration`` of all switches."""
        return np.concatenate([np.array(getattr(result, name)) for result in self.results])


def requests(episodes: int) -> Iterator[tuple[int, Task]]:
    """Seeds and tasks: kinds and colours in rotation, from the seeds for looking at while developing."""
    for index in range(episodes):
        seed = VALIDATION[VALIDATION_OFFSET + index]
        yield seed, task_of_seed(KINDS[index % len(KINDS)], seed // len(KINDS))


def summary_table(summaries: Sequence[Summary]) -> Table:
    """One row per setting."""
    table = Table(
        "method", "latency", "success", "95 %", "seam jump p50 / p95", "seam acc. p50 / p95", "peak acc.", "refused"
    )
    for summary in summaries:
        count = len(summary.results)
        low, high = wilson_interval(summary.successes, count)
        jump, acceleration = (summary.seams(name) for name in ("seam_jump", "seam_acceleration"))
        table.add_row(
            summary.options.method,
            str(summary.options.latency_steps),
            f"{summary.successes}/{count}",
            f"{low:.2f}-{high:.2f}",
            f"{np.percentile(jump, 50):.3f} / {np.percentile(jump, 95):.3f}",
            f"{np.percentile(acceleration, 50):.2f} / {np.percentile(acceleration, 95):.2f}",
            f"{max(result.peak_acceleration for result in summary.results):.3f}",
            str(sum(result.rejected for result in summary.results)),
        )
    return table


def main(
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint or pack folder, or a shipped policy's name.")
    ] = "tabletop_w4a4",
    contract: Annotated[str, typer.Option(help="Contract file or shipped name.")] = "tabletop",
    method: Annotated[list[str], typer.Option(help="none, blend, rtc or rtc_only; several times.")] = ["blend"],  # noqa: B006
    latency_steps: Annotated[list[int], typer.Option(help="Control periods of an inference; several times.")] = [2],  # noqa: B006
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per setting.")] = 60,
    max_acceleration: Annotated[float, typer.Option(min=0.0, help="Times the contract's acceleration limits.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="JSON lines of all episodes; continued where they stop.")] = None,
) -> None:
    """Success and seams of the tabletop policy in exact simulated time."""
    robot = load_contract(resolve_contract(contract))
    joints = tuple(
        dataclasses.replace(joint, max_acceleration=joint.max_acceleration * max_acceleration) for joint in robot.joints
    )
    robot = dataclasses.replace(robot, joints=joints)
    policy = Policy.load(checkpoint)
    known = _read(out)
    summaries = []
    settings = [(name, steps) for name in method for steps in latency_steps]
    with user_errors(), progress_bar("episodes", len(settings) * episodes) as bar:
        for name, steps in settings:
            options = LoopOptions(name, steps)
            loop = ClosedLoop(policy, robot, options)
            results = []
            for seed, task in requests(episodes):
                key = (checkpoint, name, steps, max_acceleration, seed)
                if key not in known:
                    known[key] = loop.run(seed, task)
                    _append(out, key, known[key])
                results.append(known[key])
                bar.advance()
            loop.close()
            summaries.append(Summary(options, results))
    console.print(summary_table(summaries))


def _append(out: Path | None, key: tuple, result: LoopResult) -> None:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": dataclasses.asdict(result)}) + "\n")


def _read(out: Path | None) -> dict[tuple, LoopResult]:
    if out is None or not out.exists():
        return {}
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {tuple(line["key"]): LoopResult(**line["result"]) for line in lines}


if __name__ == "__main__":
    typer.run(main)

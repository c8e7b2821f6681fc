"""From the session's results to the records of a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.guard import MotionGuard
from omega_qvla_ros.inference import InferenceResult
from omega_qvla_ros.scheduler import ChunkScheduler
from omega_qvla_ros.splines import seconds
from omega_qvla_ros.trace import ChunkRecord, ChunkTrace, Outcome, TraceHeader, rows


def open_trace(path: str, contract: RobotContract, spec: PolicySpec) -> ChunkTrace | None:
    """A new trace of a session; None for an empty path.

    Raises:
        RecordingError: The file cannot be made.
    """
    if not path.strip():
        return None
    header = TraceHeader(
        robot=contract.name,
        joints=contract.joint_names,
        policy=spec.name,
        quantization=spec.quantization,
        action_names=spec.action_names,
        period_s=1.0 / spec.control_hz,
        first_action_delay_s=spec.first_action_delay_s,
    )
    return ChunkTrace(Path(path), header)


class SessionTrace:
    """Makes a record of every judged inference. Called on the executor's thread; must not wait.

    Args:
        write: Takes the record, such as ``ChunkTrace.write``.
        scheduler: Counts the steps that had passed.
        guard: Counts the values that it limited.
    """

    def __init__(self, write: Callable[[ChunkRecord], None], scheduler: ChunkScheduler, guard: MotionGuard) -> None:
        self._write = write
        self._scheduler = scheduler
        self._guard = guard
        self._skipped = scheduler.skipped_steps
        self._clamped = self._clamped_values()

    def judged(self, result: InferenceResult[Any], now_ns: int, outcome: Outcome, reason: str = "") -> None:
        """An inference came back, and this became of it."""
        snapshot, ticket = result.job.snapshot, result.ticket
        skipped, clamped = self._scheduler.skipped_steps, self._clamped_values()
        self._write(
            ChunkRecord(
                time_ns=now_ns,
                sequence=ticket.sequence,
                epoch=ticket.epoch,
                task=ticket.task,
                instruction=result.job.instruction,
                observation_ns=ticket.observation_ns,
                image_stamps_ns=dict(snapshot.image_stamps_ns),
                positions=tuple(snapshot.positions.tolist()),
                noise_seed=result.job.noise_seed,
                latency_s=result.duration_s,
                age_s=float(seconds(now_ns - ticket.observation_ns)),
                outcome=outcome,
                reason=reason,
                skipped_steps=skipped - self._skipped,
                clamped=clamped - self._clamped,
                actions=() if result.chunk is None else rows(result.chunk.actions),
            )
        )
        self._skipped, self._clamped = skipped, clamped

    def _clamped_values(self) -> int:
        counters = vars(self._guard.counters)
        return sum(sum(found.values()) for name, found in counters.items() if name.startswith("clamped_"))

"""What a chunk that did not come to anything means: try again, hold, latch, or give the policy up."""

from __future__ import annotations

import logging

import numpy as np

from omega_qvla_core.errors import InstructionError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_core.runtime.device_errors import free_device_memory, is_device_error
from omega_qvla_ros.guard import ChunkRejected
from omega_qvla_ros.safety_state import SafetyState
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler
from omega_qvla_ros.stats import Percentiles

log = logging.getLogger(__name__)


class ChunkJudge:
    """Judges the chunks of one policy.

    Args:
        spec: What the policy promises.
        safety: Receives holds and latches.
        scheduler: Told to try again.
        latency_s: Inference times, for the texts.
        max_late_chunks: So many chunks in a row that come after their own end, or are withdrawn, latch.
    """

    def __init__(
        self,
        spec: PolicySpec,
        safety: SafetyState,
        scheduler: ChunkScheduler,
        latency_s: Percentiles,
        max_late_chunks: int,
    ) -> None:
        self._spec = spec
        self._safety = safety
        self._scheduler = scheduler
        self._latency_s = latency_s
        self._max_late_chunks = max_late_chunks
        self._late_in_a_row = 0
        self.device_lost = False
        """The policy cannot run any more: the node should deactivate."""

    def restart(self) -> None:
        """The motion begins anew."""
        self._late_in_a_row = 0
        self._safety.warn("late", None)

    def reset(self) -> None:
        """The operator says that the cause is gone."""
        self.restart()
        self.device_lost = False

    def fits(self, actions: np.ndarray) -> bool:
        """Whether a chunk has the promised shape. If not, it latches: another chunk will be no better."""
        expected = (self._spec.horizon, len(self._spec.action_names))
        if np.shape(actions) == expected:
            return True
        shape = list(np.shape(actions))
        reason = f"the policy gave actions of shape {shape}, its description promises {list(expected)}"
        log.error("%s", reason)
        self._safety.latch("shape", f"{reason}; load a checkpoint that keeps to it")
        return False

    def accepted(self) -> None:
        """A chunk became the commanded motion; whether it leaves in time is not known yet."""
        self._safety.policy_success()

    def left(self) -> None:
        """The message with the newest accepted chunk left."""
        self._late_in_a_row = 0
        self._safety.warn("late", None)

    def withdrawn(self, age_ns: int, expected_ns: int, lead_ns: int) -> None:
        """An accepted chunk was withdrawn, because its message was not ready in time: late, as if it had come too late.

        Args:
            age_ns: What planning it took until its message was to leave.
            expected_ns: What that was expected to take.
            lead_ns: ``chunk.switch_lead_s``, which a message needs on its way.
        """
        self._late(
            f"the newest was not planned in time: its message was ready after {age_ns / 1e6:.0f} ms, "
            f"{expected_ns / 1e6:.0f} ms were allowed for (chunk.switch_lead_s is {lead_ns / 1e6:.0f} ms). The "
            "processor is too busy to plan in time; take other work off it, or use a faster one"
        )

    def refused(self, rejected: ChunkRejected, now_ns: int) -> None:
        """The guard refused a chunk."""
        log.error("chunk refused (%s): %s", rejected.kind, rejected)
        self._safety.policy_error(f"chunk refused: {rejected}", now_ns)
        self._scheduler.retry()

    def dropped(self, dropped: ChunkDropped) -> None:
        """The scheduler dropped a chunk; too many late ones in a row latch."""
        log.debug("chunk dropped (%s): %s", dropped.kind, dropped)
        self._scheduler.retry()
        if dropped.kind != "late":
            return
        chunk_s = self._spec.horizon / self._spec.control_hz
        self._late(
            f"the newest came after its own end: inference takes {self._latency_s.values()[-1]:.2f} s, a chunk "
            f"lasts {chunk_s:.2f} s. The arm cannot move continuously like this, and this node does not step; use a "
            "faster device or a smaller policy"
        )

    def _late(self, text: str) -> None:
        """One more chunk in a row did not reach the arm in time: DEGRADED, and too many latch."""
        self._late_in_a_row += 1
        count = self._late_in_a_row
        reason = f"{count} chunks in a row were late; {text}" if count > 1 else f"a chunk was late; {text}"
        latches = count >= self._max_late_chunks
        self._safety.warn("late", None if latches else reason)
        if latches:
            self._safety.latch("late", reason)

    def failed(self, error: Exception, now_ns: int) -> None:
        """An inference raised."""
        self._scheduler.retry()
        if isinstance(error, InstructionError):
            log.error("instruction refused: %s", error)
            self._safety.hold("instruction", str(error))
            return
        log.error("inference failed: %s: %s", type(error).__name__, error, exc_info=error)
        if is_device_error(error):
            free_device_memory()
            self.device_lost = True
            self._safety.latch(
                "device",
                f"the policy's device failed ({type(error).__name__}: {error}); clean up and configure again, on a "
                "device with enough memory",
            )
        self._safety.policy_error(f"{type(error).__name__}: {error}", now_ns)

"""What a session watches in every control period: sensors, inference, tracking, supply. Each finding has a name.

Nothing here moves the arm: findings go to ``SafetyState`` (hold, latch, degrade) and to ``Notices``.
"""

from __future__ import annotations

import logging
from typing import Any

from omega_qvla_ros.inference import InferenceWorker
from omega_qvla_ros.motion import Motion
from omega_qvla_ros.notices import EVENT_NS, Notices
from omega_qvla_ros.observation import ObservationBuffer
from omega_qvla_ros.safety_state import SafetyState
from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.stats import TickMonitor

log = logging.getLogger(__name__)

TRACKING_SAMPLE_S = 1.0
"""An older joint sample says nothing about tracking; staleness holds the arm long before."""


class Supervision:
    """The watchers of one session.

    Args:
        safety: Receives holds, latches and degradations.
        notices: Receives what stops nothing.
        buffer: Sensor streams.
        worker: Inference thread.
        motion: Commanded motion.
        ticks: Timing of the control timer.
    """

    def __init__(
        self,
        safety: SafetyState,
        notices: Notices,
        buffer: ObservationBuffer,
        worker: InferenceWorker[Any],
        motion: Motion,
        ticks: TickMonitor,
    ) -> None:
        self._safety = safety
        self._notices = notices
        self._buffer = buffer
        self._worker = worker
        self._motion = motion
        self._ticks = ticks
        self._lacking: tuple[str, ...] = ()
        self.restart()

    def restart(self) -> None:
        """A motion begins anew."""
        self._waiting_since_ns: int | None = None
        self.ready = False
        """A complete set of samples came since the last restart."""

    def waiting_ns(self, now_ns: int) -> int:
        """For how long some stream has been missing, counted from the first control period that saw it."""
        return 0 if self._waiting_since_ns is None else now_ns - self._waiting_since_ns

    def watch_timer(self, now_ns: int) -> None:
        """Note a tick of the control timer; commands carry absolute stamps, so a late one only shortens the window."""
        if self._ticks.tick(now_ns):
            late_s = self._ticks.gap_s - self._ticks.period_s
            text = (
                f"the control timer was {late_s * 1e3:.0f} ms late (period {self._ticks.period_s * 1e3:.0f} ms): the "
                "processor is too busy"
            )
            self._notices.set("timer", text, now_ns + EVENT_NS)

    def watch_sensors(self, now_ns: int, warn_after_s: float) -> None:
        """Hold while a stream is missing or stale; after ``warn_after_s`` say what to check."""
        problem = self._buffer.problem(now_ns)
        skew = self._buffer.clock_skew()
        self._notices.set("clock", skew)
        if problem is None:
            self.ready = True
            self._lacking = ()
            self._safety.release("sensors")
            self._safety.warn("startup", None)
            self._waiting_since_ns = None
            return
        if problem.lacking and problem.lacking != self._lacking:
            log.error("%s", problem.reason)
        self._lacking = problem.lacking
        self._safety.hold("sensors", f"{problem.reason}; {skew}" if skew else problem.reason)
        if self._waiting_since_ns is None:
            self._waiting_since_ns = now_ns
        if now_ns - self._waiting_since_ns > nanoseconds(warn_after_s):
            self._safety.warn(
                "startup",
                f"no usable data from {problem.stream!r} for {warn_after_s:.0f} s: is it published, "
                "is the topic remapped, is its QoS compatible (the subscription is best effort, volatile)?",
            )

    def watch_inference(self, now_ns: int, timeout_s: float) -> None:
        """Give up an inference that does not return; its result is void whenever it comes."""
        if self._worker.running_s <= timeout_s or self._worker.abandoned:
            return
        self._worker.abandon()
        reason = f"inference has not returned for {timeout_s:.1f} s; its result will be dropped"
        log.error("%s", reason)
        self._safety.policy_error(reason, now_ns)
        self._safety.hold("inference", reason)

    def watch_tracking(self, now_ns: int) -> None:
        """Hold an arm that does not follow, and plan anew from where it is."""
        sample = self._buffer.joint_sample()
        if sample is None or self._motion.holding or now_ns - sample[0] > nanoseconds(TRACKING_SAMPLE_S):
            return
        reason = self._motion.watch_tracking(*sample)
        if reason is not None:
            log.error("%s", reason)
            self._safety.fault("tracking", reason, now_ns, self._motion.tracking.losses, "tracking losses")
            self._motion.restart(now_ns)

    def watch_supply(self, now_ns: int, instruction: str, latency_p95_s: float) -> None:
        """Degrade while there is nothing to execute."""
        text = None if instruction else "no instruction yet: set the parameter 'instruction'"
        self._safety.warn("instruction", text)
        plan = self._motion.plan
        starved = plan is not None and not self._motion.holding and now_ns >= plan.end_ns
        text = f"the plan ran out before the next chunk: inference p95 {latency_p95_s:.3f} s" if starved else None
        self._safety.warn("supply", text)

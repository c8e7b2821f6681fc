"""What a policy node says about itself: ``/diagnostics`` at 1 Hz, ``~/status`` on change and at 1 Hz."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSPolicyKind

from omega_qvla_core.runtime.device_errors import used_memory_bytes
from omega_qvla_ros.memory import peak_bytes, resident_bytes
from omega_qvla_ros.nodes import diagnostics, qos
from omega_qvla_ros.nodes.loading import Loaded
from omega_qvla_ros.nodes.outputs import Outputs
from omega_qvla_ros.session import PolicySession
from omega_qvla_ros.trace import ChunkTrace

PERIOD_S = 1.0


class Reporter:
    """The reports of one policy node.

    Args:
        node: Owner of the publishers.
        now: The node's time in ns.
        lifecycle: The present lifecycle state.
        session: The configured session, None while there is none.
        enabled: Whether ``~/enable`` allows motion.
        pressed: Whether an emergency stop is pressed.
    """

    def __init__(
        self,
        node: Node,
        now: Callable[[], int],
        lifecycle: Callable[[], str],
        session: Callable[[], PolicySession | None],
        enabled: Callable[[], bool],
        pressed: Callable[[], bool],
    ) -> None:
        self._node = node
        self._now = now
        self._lifecycle = lifecycle
        self._session = session
        self._enabled = enabled
        self._pressed = pressed
        self.loaded: Loaded | None = None
        self.outputs: Outputs | None = None
        self.trace: ChunkTrace | None = None
        self.configure_error = ""
        self.ticked_s = 0.0
        """Wall time of the last control tick."""
        self.period_s = 0.0
        """Period of the control timer."""
        self._incompatible: Counter[str] = Counter()
        self._last_status: tuple[object, ...] = ()
        self._diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._status = node.create_publisher(DiagnosticStatus, "~/status", qos.STATUS)
        # A steady clock: the report must come even when simulated time stands.
        node.create_timer(PERIOD_S, self.report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def on_incompatible(self, topic: str, policy: QoSPolicyKind) -> None:
        """A publisher or subscriber was found whose quality of service does not fit: nothing arrives."""
        self._incompatible[topic] += 1
        self._node.get_logger().error(
            f"incompatible QoS on {topic!r} ({policy.name.lower()}): nothing is exchanged with that node; change the "
            "reliability or durability of its publisher or subscriber"
        )

    def report(self) -> None:
        """Publish both reports."""
        now_ns = self._now()
        status = self._full_status(now_ns)
        self._diagnostics.publish(diagnostics.array(now_ns, status))
        self._publish_status(status)

    def on_tick(self) -> None:
        """Publish ``~/status`` if it has changed since the last time."""
        session = self._session()
        if session is not None and self._digest(session) != self._last_status:
            self._publish_status(self._full_status(self._now()))

    def _digest(self, session: PolicySession) -> tuple[object, ...]:
        """What counts as a change; reasons hold numbers that change all the time, so the first words must do."""
        reasons = session.safety.reasons
        first = reasons[0][:24] if reasons else ""
        return (session.safety.state, first, session.running, session.scheduler.task, self._lifecycle())

    def _publish_status(self, status: DiagnosticStatus) -> None:
        session = self._session()
        self._last_status = () if session is None else self._digest(session)
        wanted = [pair for pair in status.values if pair.key in diagnostics.STATUS_KEYS]
        self._status.publish(
            DiagnosticStatus(
                level=status.level,
                name=status.name.replace(": policy", ": status"),
                message=status.message,
                hardware_id=status.hardware_id,
                values=wanted,
            )
        )

    def _full_status(self, now_ns: int) -> DiagnosticStatus:
        name = self._node.get_fully_qualified_name().lstrip("/")
        session = self._session()
        extra: dict[str, object] = {
            "lifecycle": self._lifecycle(),
            "enabled": self._enabled(),
            "e_stop": self._pressed(),
            "memory_rss_bytes": resident_bytes(),
            "memory_peak_bytes": peak_bytes(),
            "gpu_memory_bytes": used_memory_bytes(),
            **{f"qos_incompatible.{topic}": count for topic, count in self._incompatible.items()},
        }
        if session is None or self.loaded is None:
            level = DiagnosticStatus.ERROR if self.configure_error else DiagnosticStatus.WARN
            message = f"not configured: {self.configure_error}" if self.configure_error else "not configured"
            return diagnostics.status(f"{name}: policy", "", level, message, extra)
        extra["weights_file"], extra["weights_bytes"] = self.loaded.weights
        extra.update({f"weights_bytes.{kind}": size for kind, size in self.loaded.weight_classes.items()})
        if self.trace is not None:
            extra.update(trace_file=self.trace.path, trace_chunks=self.trace.written, trace_dropped=self.trace.dropped)
            extra["trace_error"] = self.trace.error or ""
        if self.outputs is not None:
            extra.update({f"output.{name}": text for name, text in self.outputs.states().items()})
        silent_s = time.monotonic() - self.ticked_s
        clock = diagnostics.clock_problem(now_ns, silent_s, self.period_s)
        return diagnostics.session_status(name, session, now_ns, extra, clock)

"""``/diagnostics`` of the policy node: what the session knows, as key-value pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.impl.rcutils_logger import RcutilsLogger

from omega_qvla_ros.msgs import header
from omega_qvla_ros.safety_state import State

if TYPE_CHECKING:  # the simulator and the recorder report too, and need no torch
    from omega_qvla_ros.session import PolicySession


LEVELS = {
    State.OK: DiagnosticStatus.OK,
    State.DEGRADED: DiagnosticStatus.WARN,
    State.HOLD: DiagnosticStatus.WARN,
    State.LATCHED: DiagnosticStatus.ERROR,
}


STATUS_KEYS = (
    "lifecycle",
    "state",
    "reasons",
    "warnings",
    "running",
    "enabled",
    "e_stop",
    "dry_run",
    "instruction",
    "task",
    "epoch",
    "deactivate_requested",
    "plan_left_s",
    "inference_p95_ms",
)
"""What ``~/status`` shows of the diagnostics."""


def session_values(session: PolicySession, now_ns: int) -> dict[str, object]:
    """Everything worth knowing about a session. Durations in s or ms as the key says, NaN before the first sample."""
    counters = session.guard.counters
    scheduler, motion = session.scheduler, session.motion
    spec = session.policy.spec
    values: dict[str, object] = {
        "state": session.safety.state.name,
        "reasons": "; ".join(session.safety.reasons),
        "warnings": "; ".join(session.notices.texts),
        "running": session.running,
        "dry_run": session.options.dry_run,
        "task": scheduler.task,
        "epoch": scheduler.epoch,
        "deactivate_requested": session.deactivate_requested,
        "instruction": session.instruction,
        "policy": spec.name,
        "quantization": spec.quantization,
        "denoise_steps": spec.num_steps,
        "execution_horizon": scheduler.execution_horizon_steps,
        "inference_p50_ms": 1e3 * session.latency_s.get(50),
        "inference_p95_ms": 1e3 * session.latency_s.get(95),
        "inference_p99_ms": 1e3 * session.latency_s.get(99),
        "reaction_p50_ms": 1e3 * session.reaction_s.get(50),
        "reaction_p95_ms": 1e3 * session.reaction_s.get(95),
        "control_rate_hz": session.ticks.rate_hz,
        "control_ticks_missed": session.ticks.missed,
        "control_ticks_late": session.ticks.late,
        "control_jitter_p50_ms": 1e3 * session.ticks.jitter_s.get(50),
        "control_jitter_p99_ms": 1e3 * session.ticks.jitter_s.get(99),
        "plan_left_s": motion.queue_s(now_ns),
        "queue_depth_steps": math.ceil(motion.queue_s(now_ns) / session.contract.period_s - 1e-9),
        "chunks_dropped_late": scheduler.dropped["late"],
        "chunks_accepted": scheduler.accepted,
        "chunks_slowed_down": counters.stretched,
        "steps_skipped": scheduler.skipped_steps,
        "trajectories_published": motion.counters.published,
        "trajectories_withdrawn": motion.counters.withdrawn,
        "planning_p50_ms": 1e3 * motion.dispatch.planning_s.get(50),
        "planning_p99_ms": 1e3 * motion.dispatch.planning_s.get(99),
        "hold_planning_p50_ms": 1e3 * motion.dispatch.hold_s.get(50),
        "hold_planning_p99_ms": 1e3 * motion.dispatch.hold_s.get(99),
        "trajectories_invalid": sum(motion.invalid.values()),
        "trajectories_beyond_limits": motion.counters.beyond_limits,
        "holds": motion.counters.holds,
        "plan_ran_out": motion.counters.exhausted,
        "tracking_lost": motion.counters.tracking_lost,
    }
    values.update({f"chunks_dropped_{kind}": count for kind, count in scheduler.dropped.items()})
    values.update({f"chunks_rejected_{kind}": count for kind, count in counters.rejected.items()})
    for kind in ("position", "velocity", "acceleration"):
        clamped = getattr(counters, f"clamped_{kind}")
        values.update({f"clamped_{kind}.{name}": count for name, count in clamped.items()})
    values.update({f"rejected.{kind_and_joint}": count for kind_and_joint, count in counters.rejected_joints.items()})
    values.update({f"age_s.{topic}": age for topic, age in session.buffer.ages_s(now_ns).items()})
    values.update({f"dropped.{kind}": count for kind, count in session.buffer.counters.items()})
    return values


def status(name: str, hardware_id: str, level: bytes, message: str, values: Mapping[str, object]) -> DiagnosticStatus:
    """One diagnostic status; floats are written with six significant digits."""
    return DiagnosticStatus(
        level=level,
        name=name,
        hardware_id=hardware_id,
        message=message,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


def session_status(
    node_name: str, session: PolicySession, now_ns: int, extra: Mapping[str, object], clock: str | None = None
) -> DiagnosticStatus:
    """The status of a configured policy node; ``clock`` is from ``clock_problem``."""
    safety = session.safety
    message = safety.state.name + (f": {safety.reasons[0]}" if safety.reasons else "")
    values = {**extra, **session_values(session, now_ns)}
    level = LEVELS[safety.state]
    notices = session.notices.texts
    if notices:
        level, message = max(level, DiagnosticStatus.WARN), f"{message}; {notices[0]}"
    if clock is not None:
        # Nothing is judged while the timer does not run, so the state is an old one.
        level, message = max(level, DiagnosticStatus.WARN), f"{clock} ({message})"
        values["clock"] = clock
    return status(f"{node_name}: policy", session.contract.name, level, message, values)


def log_state(logger: RcutilsLogger, before: State, session: PolicySession) -> None:
    """Log a change of the safety state; while a session waits for its first samples it is no fault."""
    safety = session.safety
    text = f"{before.name} -> {safety.state.name}: {'; '.join(safety.reasons) or 'moving'}"
    if safety.may_move or session.starting:
        logger.info(text)
    else:
        logger.warning(text)


def clock_problem(now_ns: int, silent_s: float, period_s: float) -> str | None:
    """Whether the control timer runs, which goes by the node's clock.

    Args:
        now_ns: The node's time; 0 while it waits for ``/clock``.
        silent_s: Wall time since the timer last ran.
        period_s: Control period.
    """
    if now_ns == 0:
        return "no /clock is published; set use_sim_time:=false or start the simulator"
    if silent_s > 2.0 * period_s:
        return (
            f"the control timer has not run for {silent_s:.2f} s of wall time (period {period_s:g} s): /clock stands "
            "or is slow; set use_sim_time:=false or look after the simulator"
        )
    return None


def array(now_ns: int, *statuses: DiagnosticStatus) -> DiagnosticArray:
    """A diagnostic array stamped now."""
    return DiagnosticArray(header=header(now_ns), status=list(statuses))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return str(value)

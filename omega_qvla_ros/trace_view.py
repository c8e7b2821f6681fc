"""A trace for people: figures of a run, and a picture of every chunk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omega_qvla_ros.trace import Trace

OUTCOME_COLOURS = {
    "placed": "tab:blue",
    "dropped": "tab:orange",
    "rejected": "tab:red",
    "failed": "black",
    "abandoned": "black",
}
PICTURE_DPI = 110


@dataclass(frozen=True)
class TraceSummary:
    """Figures of a run. Percentiles are NaN without a chunk.

    Attributes:
        outcomes: Outcome -> chunks.
        reasons: Reason -> chunks that were not placed because of it.
        latency_ms: p50, p95 and p99 of the inference's wall time.
        age_ms: p50, p95 and p99 of the observation's age when its chunk was placed.
        skipped_steps: Mean number of steps of a placed chunk that had passed.
        clamped: Values that the guard limited.
        tasks: Instruction -> chunks.
        duration_s: From the first to the last chunk.
    """

    outcomes: dict[str, int]
    reasons: dict[str, int]
    latency_ms: tuple[float, float, float]
    age_ms: tuple[float, float, float]
    skipped_steps: float
    clamped: int
    tasks: dict[str, int]
    duration_s: float


def summarise(trace: Trace) -> TraceSummary:
    """Figures of a trace."""
    records = trace.records
    placed = [record for record in records if record.outcome == "placed"]
    times = [record.time_ns for record in records]
    return TraceSummary(
        outcomes=dict(Counter(record.outcome for record in records)),
        reasons=dict(Counter(record.reason for record in records if record.reason)),
        latency_ms=_percentiles([1e3 * record.latency_s for record in records]),
        age_ms=_percentiles([1e3 * record.age_s for record in placed]),
        skipped_steps=float(np.mean([record.skipped_steps for record in placed])) if placed else float("nan"),
        clamped=sum(record.clamped for record in records),
        tasks=dict(Counter(record.instruction for record in records)),
        duration_s=(max(times) - min(times)) * 1e-9 if times else 0.0,
    )


def rows(summary: TraceSummary) -> list[tuple[str, str]]:
    """The summary as rows of a table."""

    def three(values: tuple[float, float, float]) -> str:
        return " / ".join(f"{value:.1f}" for value in values)

    return [
        ("chunks", ", ".join(f"{name} {count}" for name, count in sorted(summary.outcomes.items())) or "none"),
        *((f"not placed: {reason}", str(count)) for reason, count in sorted(summary.reasons.items())),
        ("duration", f"{summary.duration_s:.1f} s"),
        ("inference p50 / p95 / p99", f"{three(summary.latency_ms)} ms"),
        ("age of the observation p50 / p95 / p99", f"{three(summary.age_ms)} ms"),
        ("steps passed already, mean", f"{summary.skipped_steps:.1f}"),
        ("values limited by the guard", str(summary.clamped)),
        *((f"told: {text}", str(count)) for text, count in summary.tasks.items()),
    ]


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    if not values:
        return float("nan"), float("nan"), float("nan")
    low, middle, high = np.percentile(values, (50, 95, 99))
    return float(low), float(middle), float(high)


def plot(trace: Trace, path: Path) -> None:
    """Draw every chunk over time, one row per action entry and one for latency and age; writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    header, names = trace.header, trace.header.action_names
    figure = Figure(figsize=(12, 1.6 * (len(names) + 1)), layout="constrained")
    axes = figure.subplots(len(names) + 1, 1, sharex=True)
    origin_ns = min((record.observation_ns for record in trace.records), default=0)
    for record in trace.records:
        chunk = record.chunk()
        start_s = (record.observation_ns - origin_ns) * 1e-9 + header.first_action_delay_s
        times_s = start_s + header.period_s * np.arange(len(chunk))
        for axis, values in zip(axes, chunk.T):
            axis.plot(times_s, values, color=OUTCOME_COLOURS[record.outcome], alpha=0.5, linewidth=0.8)
    for axis, name in zip(axes, names):
        axis.set_ylabel(name)
    judged_s = [(record.time_ns - origin_ns) * 1e-9 for record in trace.records]
    axes[-1].plot(judged_s, [1e3 * record.latency_s for record in trace.records], ".", label="inference")
    axes[-1].plot(judged_s, [1e3 * record.age_s for record in trace.records], ".", label="age of the observation")
    axes[-1].set_ylabel("ms")
    axes[-1].set_xlabel(f"s; {header.policy} ({header.quantization}) on {header.robot}")
    if trace.records:
        axes[-1].legend(loc="upper right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})

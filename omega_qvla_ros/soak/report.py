"""The figures of a soak run: written while it goes, judged at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from omega_qvla_core.whole_file import write_whole

WARM_UP_SHARE = 0.2
"""Part of a run that does not count for memory growth: allocators and caches fill up."""
MAX_GROWTH = 0.01
MIN_GROWTH_MINUTES = 10.0
"""In a shorter run one garbage collection more or less is a per cent; growth is reported and not judged."""


@dataclass
class SoakFigures:
    """What a run gave so far; the file is this as JSON. Durations in s, memory in bytes, shares of a limit as 1.0."""

    planned_minutes: float
    seed: int
    policy: str
    minutes: float = 0.0
    finished: bool = False
    faults: dict[str, int] = field(default_factory=dict)
    episodes: int = 0
    successes: int = 0
    trajectories: int = 0
    trajectories_rejected: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    """The controller's reasons, numbers as ``#``."""
    trajectories_not_finite: int = 0
    trajectories_invalid: int = 0
    trajectories_beyond_limits: int = 0
    refused_by_the_watch: dict[str, int] = field(default_factory=dict)
    unguarded: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    controller_jump: dict[str, float] = field(default_factory=dict)
    """Largest step of a joint's reference within a control period, as the controller executed it; rad or m."""
    controller_jump_limit: dict[str, float] = field(default_factory=dict)
    controller_acceleration: dict[str, float] = field(default_factory=dict)
    """Of its reference, from one of its periods to the next; a hold that arrives a period late shows here."""
    largest_acceleration: dict[str, float] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    latches: dict[str, int] = field(default_factory=dict)
    node: dict[str, float] = field(default_factory=dict)
    """Counters and percentiles of the policy node, summed over its restarts where they are counts."""
    memory_samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the beginning, resident bytes of the policy node."""
    memory_growth: float | None = None
    stuck: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """Why the run did not pass; empty if it did."""
        found = [f"process died: {text}" for text in self.died]
        found += [f"did not recover: {text}" for text in self.stuck]
        for name in (
            "trajectories_rejected",
            "trajectories_not_finite",
            "trajectories_invalid",
            "trajectories_beyond_limits",
        ):
            if getattr(self, name):
                found.append(f"{getattr(self, name)} {name.replace('_', ' ')}")
        found += [f"{count} commands refused: {reason}" for reason, count in self.refused_by_the_watch.items()]
        found += [f"{count} unguarded values: {kind}" for kind, count in self.unguarded.items()]
        for name, jump in self.controller_jump.items():
            limit = self.controller_jump_limit[name]
            if jump > limit:
                found.append(f"the controller's reference of {name} made a step of {jump:.4f}, limit {limit:.4f}")
        if self.finished and not self.controller_jump:
            found.append("the controller did not report the steps of its reference")
        if not self.trajectories:
            found.append("nothing was commanded")
        if self.memory_growth is not None and self.minutes >= MIN_GROWTH_MINUTES and self.memory_growth >= MAX_GROWTH:
            found.append(f"memory grew by {self.memory_growth:.2%}, at most {MAX_GROWTH:.0%} is allowed")
        return found

    def write(self, path: Path) -> None:
        """Replace the file in one step, so that an interrupted run leaves the last whole one."""
        text = json.dumps({**asdict(self), "violations": self.violations()}, indent=1) + "\n"
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> SoakFigures:
        """What ``write`` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data.pop("violations")
        data["memory_samples"] = [tuple(sample) for sample in data["memory_samples"]]
        return cls(**data)


def memory_growth(samples: Sequence[tuple[float, int]]) -> float | None:
    """Growth over the time after warm-up, as a share of the memory at its beginning.

    A straight line through the samples after warm-up (least squares): its rise over that time, divided by its value
    at the beginning. None with fewer than ten samples.
    """
    if len(samples) < 10:
        return None
    times, values = (np.array(column, dtype=np.float64) for column in zip(*samples))
    after = times >= times[0] + WARM_UP_SHARE * (times[-1] - times[0])
    times, values = times[after], values[after]
    slope, start = np.polyfit(times - times[0], values, 1)
    return float(slope * (times[-1] - times[0]) / start)


def reason_kind(reason: str) -> str:
    """A reason without its numbers, so that equal causes are counted together."""
    text = re.sub(r"\d+(\.\d+)?", "#", reason.split(";")[0])
    return text if len(text) <= 80 else text[:77] + "..."


def report_table(figures: SoakFigures) -> Table:
    """The figures for people."""
    table = Table(title=f"Soak: {figures.minutes:.1f} of {figures.planned_minutes:g} min, seed {figures.seed}")
    table.add_column("")
    table.add_column("", justify="right")

    def row(name: str, value: object) -> None:
        table.add_row(name, str(value))

    def counts(values: dict[str, int]) -> str:
        return "\n".join(f"{name}: {count}" for name, count in sorted(values.items())) or "none"

    row("policy", figures.policy)
    row("faults injected", sum(figures.faults.values()))
    row("episodes (successes)", f"{figures.episodes} ({figures.successes})")
    row("trajectories published", figures.trajectories)
    row("rejected by the controller", counts(figures.rejections) if figures.rejections else 0)
    row("unguarded values", counts(figures.unguarded))
    for name, share in figures.peaks.items():
        row(f"largest {name.replace('_', ' ')}, share of its limit", f"{share:.3f}")
    row("largest joint acceleration, published", _largest(figures.largest_acceleration))
    row("largest joint acceleration, the controller's reference", _largest(figures.controller_acceleration))
    row("largest joint jump in a control period, the controller's reference", _largest(figures.controller_jump))
    row("holds", counts(figures.holds))
    row("latches", counts(figures.latches))
    for name, value in figures.node.items():
        row(name.replace("_", " "), f"{value:g}")
    growth = "not known" if figures.memory_growth is None else f"{figures.memory_growth:+.2%}"
    row("memory growth after warm-up", growth)
    if figures.memory_samples:
        row("memory at the end", f"{figures.memory_samples[-1][1] / 1e6:.1f} MB")
    row("violations", "\n".join(figures.violations()) or "none")
    return table


def _largest(values: dict[str, float]) -> str:
    name = max(values, key=lambda key: values[key], default="")
    return f"{values[name]:.3f} ({name})" if name else "none"

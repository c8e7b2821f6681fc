"""A replay as tables (markdown and JSON) and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_ros.bags.replay import (
    AGAINST_COMMANDS,
    AGAINST_POLICY,
    AGAINST_TRACE,
    Difference,
    Replayed,
    differences,
)
from omega_qvla_ros.contract import RobotContract

TITLES = {
    AGAINST_TRACE: "the chunks of the trace (same observations, same noise)",
    AGAINST_COMMANDS: "the recorded commands (blended, guarded and later than the plan)",
    AGAINST_POLICY: "{other} (same observations, same noise)",
}
PICTURE_DPI = 110
MAX_DRAWN = 400
"""Chunks in the picture; more would be one grey bar."""


def policy_title(spec: PolicySpec) -> str:
    """Name of a policy in tables and pictures."""
    return f"{spec.name} ({spec.quantization})"


@dataclass(frozen=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        bag: Path of the bag.
        contract: The robot.
        policy: Name and quantization of what was replayed.
        other: The same of the other policy, empty without one.
        found: The inferences.
        period_s: Time between two steps of a chunk.
        first_action_delay_s: Time from the observation to step 0.
        traced: Inferences in the trace, None without one. A trace may be longer than the bag.
    """

    bag: str
    contract: RobotContract
    policy: str
    other: str
    found: Sequence[Replayed]
    period_s: float
    first_action_delay_s: float
    traced: int | None = None

    def differences(self) -> dict[str, Difference]:
        """Everything that could be compared."""
        return differences(self.found, self.contract.chunk.execution_horizon_steps)

    def to_json(self) -> dict[str, object]:
        """All figures; differences in rad or m as the joint's unit says."""
        return {
            "bag": self.bag,
            "robot": self.contract.name,
            "policy": self.policy,
            "other_policy": self.other or None,
            "inferences": len(self.found),
            "traced_inferences": self.traced,
            "executed_steps": self.contract.chunk.execution_horizon_steps,
            "differences": {
                name: {
                    "compared_steps": difference.count,
                    "joints": {
                        joint.name: {
                            "unit": joint.unit,
                            "mean": float(difference.mean[k]),
                            "rms": float(difference.rms[k]),
                            "largest": float(difference.largest[k]),
                        }
                        for k, joint in enumerate(self.contract.joints)
                    },
                }
                for name, difference in self.differences().items()
            },
        }

    def to_markdown(self) -> str:
        """One table per comparison."""
        of_trace = "" if self.traced is None else f" of the {self.traced} in the trace"
        lines = [f"# {self.policy} replayed on {self.bag}", "", f"{len(self.found)} inferences{of_trace}.", ""]
        made = self.differences()
        if not made:
            lines += ["Nothing to compare with: no commands in the bag, no trace, no other policy.", ""]
        for name, difference in made.items():
            lines += [
                f"## Against {TITLES[name].format(other=self.other)}",
                "",
                f"Absolute difference over {difference.count} steps.",
                "",
                "| joint | unit | mean | rms | largest |",
                "|---|---|---|---|---|",
                *(
                    f"| {joint.name} | {joint.unit} | {difference.mean[k]:.5f} | {difference.rms[k]:.5f} | "
                    f"{difference.largest[k]:.5f} |"
                    for k, joint in enumerate(self.contract.joints)
                ),
                "",
            ]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write ``replay.md``, ``replay.json`` and ``replay.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "replay.md").write_text(self.to_markdown(), encoding="utf-8")
        (folder / "replay.json").write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        self._plot(folder / "replay.png")

    def _plot(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        joints = self.contract.joints
        figure = Figure(figsize=(12, 1.8 * len(joints)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(joints), 1, sharex=True))
        origin_ns = self.found[0].observation_ns
        for number, one in enumerate(self.found[:MAX_DRAWN]):
            start_s = (one.observation_ns - origin_ns) * 1e-9 + self.first_action_delay_s
            times_s = start_s + self.period_s * np.arange(len(one.targets))
            lines = (
                (one.commanded, "recorded commands", "black", 2.0),
                (one.other, self.other, "tab:orange", 0.9),
                (one.targets, self.policy, "tab:blue", 0.9),
            )
            for values, label, colour, width in lines:
                if values is None:
                    continue
                for axis, row in zip(axes, values.T):
                    axis.plot(times_s, row, color=colour, linewidth=width, label=label if number == 0 else None)
        for axis, joint in zip(axes, joints):
            axis.set_ylabel(f"{joint.name} [{joint.unit}]")
        axes[-1].set_xlabel("s")
        axes[0].legend(loc="upper right", fontsize="small")
        figure.set_dpi(PICTURE_DPI)
        FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})

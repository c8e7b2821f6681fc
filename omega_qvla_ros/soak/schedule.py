"""Which fault comes when: drawn from a seed before the run, so that the same seed gives the same faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault.

    Attributes:
        name: Used in reports.
        weight: How often it is drawn, relative to the others.
        min_s: Shortest duration.
        max_s: Longest duration; both are 0 where the fault is an instant.
    """

    name: str
    weight: float
    min_s: float = 0.0
    max_s: float = 0.0


KINDS = (
    FaultKind("camera_drop", 3, 0.1, 1.5),
    FaultKind("camera_freeze", 2, 0.1, 1.5),
    FaultKind("camera_corrupt", 2, 0.1, 1.0),
    FaultKind("camera_reorder", 2, 0.2, 1.0),
    FaultKind("camera_future", 1, 0.1, 1.0),
    FaultKind("camera_black", 1, 0.2, 1.5),
    FaultKind("image_burst", 4, 1.0, 5.0),
    FaultKind("joints_drop", 2, 0.05, 0.8),
    FaultKind("joints_nan", 2, 0.05, 0.8),
    FaultKind("joints_split", 2, 0.5, 3.0),
    FaultKind("instruction", 3),
    FaultKind("stop_start", 2, 0.5, 2.0),
    FaultKind("disable", 1, 0.5, 2.0),
    FaultKind("e_stop", 2, 0.2, 1.5),
    FaultKind("restart", 1),
    FaultKind("lifecycle", 1, 0.3, 1.0),
    FaultKind("clock_pause", 1, 0.2, 1.5),
    FaultKind("node_starved", 1, 0.1, 0.5),
)
"""Slow and raising inferences are not here: the policy itself is slow at random (``nodes.soak_policy_node``)."""

MEAN_GAP_S = 3.0
"""Mean time between the end of a fault and the next one: enough to be moving again, little enough to see many."""


@dataclass(frozen=True)
class Fault:
    """One planned fault: ``start_s`` after the beginning, ``stream`` is the camera for camera faults."""

    start_s: float
    duration_s: float
    kind: str
    stream: str = ""


def draw_faults(
    duration_s: float, seed: int, cameras: Sequence[str], kinds: Sequence[FaultKind] = KINDS
) -> list[Fault]:
    """Faults for a run, one after the other.

    Args:
        duration_s: Length of the run; no fault begins later.
        seed: Same seed, same faults.
        cameras: Names that camera faults choose from.
        kinds: What is drawn from.
    """
    generator = np.random.default_rng(seed)
    weights = np.array([kind.weight for kind in kinds])
    faults, now_s = [], 0.0
    while True:
        now_s += float(generator.exponential(MEAN_GAP_S))
        if now_s >= duration_s:
            return faults
        kind = kinds[int(generator.choice(len(kinds), p=weights / weights.sum()))]
        length_s = float(generator.uniform(kind.min_s, kind.max_s))
        stream = str(generator.choice(list(cameras))) if kind.name.startswith("camera") else ""
        faults.append(Fault(now_s, length_s, kind.name, stream))
        now_s += length_s

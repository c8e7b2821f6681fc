"""What was sent, and whether a new motion still reaches the controller before the time from which it differs.

Planning takes milliseconds, more on a busy machine, and the clock goes on meanwhile. A new motion therefore begins so
long after the clock was read as planning is expected to take (measured here), plus the transport of the contract. Where
that was not enough, the message would ask for a step from the motion that the controller knows: it must not leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.stats import Percentiles
from omega_qvla_ros.trajectory import Plan

PLANNING_PERCENT = {False: 95, True: 50}
"""Of what planning took, for chunks and for holds. One stall must not delay the holds that come after it, and a hold
that is late all the same is planned anew, which is fast."""
RECENT = 3
"""Chunks are allowed the median of so many at least. The percentile of 100 notices a load that lasts with its sixth
chunk only, and five late ones in a row latch; the median of three notices the second, and one stall is none."""
CHUNK_LEAD_SHARE = 0.5
"""Share of the transport's time that a chunk must have left. All of it would withdraw the 5% that take longer than
``PLANNING_PERCENT``; with none of it, any transport at all would make a step. With half, a transport within the
contract's time is late by half of that at most."""
MAX_PLANNING_NS = nanoseconds(0.1)
"""A machine that needs more than two control periods to plan is of no use; its chunks are withdrawn, and that shows."""


@dataclass(frozen=True)
class Commanded:
    """What a controller was told: the plan, its targets, its task, and whether it is a hold."""

    plan: Plan | None = None
    targets: tuple[np.ndarray, np.ndarray] | None = None
    task: int = 0
    holding: bool = False


class Dispatch:
    """Book-keeping of the messages of one motion. Times are the node's, in ns."""

    def __init__(self) -> None:
        self.planning_s = Percentiles(size=100)
        """From reading the clock until a message with a new chunk left; 100 are 20 s at 5 chunks/s."""
        self.hold_s = Percentiles(size=100)
        """The same of holds, which are planned faster."""
        self._took = {False: self.planning_s, True: self.hold_s}
        self.reset()

    def allowance_ns(self, *, holding: bool) -> int:
        """What the next plan, a hold or not, is expected to take until its message leaves."""
        expected_s = self._took[holding].get(PLANNING_PERCENT[holding])
        recent_s = self._took[holding].values()[-RECENT:]
        if not holding and len(recent_s) == RECENT:
            expected_s = max(expected_s, float(np.median(recent_s)))
        return 0 if math.isnan(expected_s) else min(nanoseconds(expected_s), MAX_PLANNING_NS)

    def reset(self) -> None:
        """The controller knows nothing of the plan, or nothing that matters any more."""
        self._sent = Commanded()
        self._parts_ns: int | None = None
        self._before: tuple[int, Commanded] | None = None

    def part_at(self, time_ns: int) -> None:
        """The plan was changed from this time on."""
        self._parts_ns = time_ns if self._parts_ns is None else min(self._parts_ns, time_ns)

    def message(self, commanded: Commanded) -> None:
        """A message with this was made."""
        self._before = None if self._parts_ns is None else (self._parts_ns, self._sent)
        self._sent, self._parts_ns = commanded, None

    def overdue(self, now_ns: int) -> Commanded | None:
        """What was sent last, if the plan has parted from it by now without a message; the change is void then."""
        if self._parts_ns is None or now_ns <= self._parts_ns:
            return None
        self._parts_ns = None
        return self._sent

    def left(self, now_ns: int, age_ns: int, lead_ns: int) -> Commanded | None:
        """The message made last is about to leave.

        Args:
            now_ns: The time for which it was made.
            age_ns: How long ago that was.
            lead_ns: What a message needs on its way. A hold is to have all of it; a chunk ``CHUNK_LEAD_SHARE`` of it,
                because planning it anew would take as long again.

        Returns:
            None if it may leave; else what had been sent before it, which is then what was sent last.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        needed_ns = int(self._lead_share() * lead_ns)
        self._took[self._sent.holding].add(age_ns / 1e9)
        if now_ns + age_ns + needed_ns <= before[0]:
            return None
        self._sent = before[1]
        return self._sent

    def _lead_share(self) -> float:
        """Share of the transport's time that the message made last must have left."""
        if self._sent.holding:
            return 1.0
        # Before the first chunk nobody knows what planning takes: only one whose motion has parted is late.
        return CHUNK_LEAD_SHARE if self.planning_s.values() else 0.0

"""Chunks: when to ask for the next one, and what of it is executed at which time.

Step k of a chunk belongs to the time ``observation + first_action_delay + k * period``, however long the inference
took: steps whose time has passed are skipped, the others replace the committed motion over a short blend. A chunk
that was asked for before a reset, or for another instruction, is never executed, and none is executed twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.splines import nanoseconds, seconds

MIN_GAP_PERIODS = 0.25
"""A step nearer than this to the switch is skipped: a knot that close would turn position noise into speed."""


@dataclass(frozen=True)
class Ticket:
    """Identity of one inference: what it saw, and under which epoch and task it was asked for."""

    sequence: int
    epoch: int
    task: int
    observation_ns: int


@dataclass(frozen=True)
class Placement:
    """The steps of a chunk that lie ahead.

    Attributes:
        times_ns: int64 ``[N]``.
        targets: float64 ``[N, joints]``, blended.
        skipped: Steps before them that had passed.
        seam: float64 ``[joints]``, how far the chunk's first step lies from the committed motion, before blending.
    """

    times_ns: np.ndarray
    targets: np.ndarray
    skipped: int
    seam: np.ndarray


class ChunkDropped(Exception):
    """A chunk came too late or belongs to another epoch or task. Normal in operation; counted by ``kind``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ChunkScheduler:
    """Book-keeping of one policy's chunks.

    Args:
        execution_horizon_steps: Steps between the observations of two inferences; 1 plans anew at every period.
        blend_time_s: Time from the committed motion to the new chunk.
        period_s: Step length of the policy.
        min_remaining_s: A chunk with less than this left is late: the arm would begin to brake before the next one can
            be there.
    """

    def __init__(
        self, execution_horizon_steps: int, blend_time_s: float, period_s: float, min_remaining_s: float = 0.1
    ) -> None:
        self.execution_horizon_steps = execution_horizon_steps
        self.blend_time_s = blend_time_s
        self._period_ns = nanoseconds(period_s)
        self._min_remaining_s = min_remaining_s
        self._epoch = 0
        self._task = 0
        self._sequence = 0
        self._newest_seen = 0
        self._admitted: Ticket | None = None
        self._last_observation_ns: int | None = None
        self._next_observation_ns: int | None = None
        self.dropped: Counter[str] = Counter()
        self.accepted = 0
        self.skipped_steps = 0

    @property
    def epoch(self) -> int:
        """Counts resets, holds and other breaks of the motion."""
        return self._epoch

    @property
    def task(self) -> int:
        """Counts changes of the instruction."""
        return self._task

    def new_epoch(self) -> None:
        """The motion was broken off: chunks under way are void, the next observation is used at once."""
        self._epoch += 1
        self._next_observation_ns = None

    def new_task(self) -> None:
        """The instruction changed: chunks under way are void, the next observation is used at once."""
        self._task += 1
        self._next_observation_ns = None

    def forget_time(self) -> None:
        """The clock jumped back: no remembered stamp means anything any more."""
        self.new_epoch()
        self._last_observation_ns = None

    def is_due(self, observation_ns: int) -> bool:
        """Whether an observation with this stamp is the one to plan on."""
        if self._last_observation_ns is not None and observation_ns <= self._last_observation_ns:
            return False
        # A quarter period of slack, because cameras do not tick exactly at the policy's rate.
        return self._next_observation_ns is None or (observation_ns >= self._next_observation_ns - self._period_ns // 4)

    def begin(self, observation_ns: int) -> Ticket:
        """An inference starts on this observation."""
        self._sequence += 1
        self._last_observation_ns = observation_ns
        self._next_observation_ns = observation_ns + self.execution_horizon_steps * self._period_ns
        return Ticket(self._sequence, self._epoch, self._task, observation_ns)

    def retry(self) -> None:
        """The inference failed: the next observation is used at once."""
        self._next_observation_ns = None

    def admit(self, ticket: Ticket) -> None:
        """A chunk has come: is it still wanted, and is it the first time? To be asked before its numbers are looked at.

        Raises:
            ChunkDropped: kind ``epoch``, ``task`` or ``order``.
        """
        if ticket.epoch != self._epoch:
            self._drop("epoch", f"asked for in epoch {ticket.epoch}, now it is {self._epoch}")
        if ticket.task != self._task:
            self._drop("task", f"asked for task {ticket.task}, now it is {self._task}")
        if not self._newest_seen < ticket.sequence <= self._sequence:
            self._drop(
                "order",
                f"chunk {ticket.sequence} came after chunk {self._newest_seen}; the last one that was asked for is "
                f"{self._sequence}",
            )
        self._newest_seen, self._admitted = ticket.sequence, ticket

    def place(
        self,
        ticket: Ticket,
        chunk: ActionChunk,
        now_ns: int,
        committed: Callable[[int], np.ndarray],
        switch_ns: int | None = None,
    ) -> Placement:
        """Decide what of a finished chunk is executed; once per chunk. Admits it, where that was not done.

        Args:
            ticket: From ``begin``.
            chunk: Actions in contract order.
            now_ns: Time at which the blend begins.
            committed: Time in ns -> commanded position ``[joints]`` if nothing new came.
            switch_ns: Time of the switch from the committed motion, None: ``now_ns``.

        Returns:
            At least one step ahead of the switch.

        Raises:
            ChunkDropped: kind ``epoch``, ``task``, ``order`` or ``late``.
        """
        if self._admitted is not ticket:
            self.admit(ticket)
        self._admitted = None
        first_ns = ticket.observation_ns + nanoseconds(chunk.first_action_delay_s)
        period_ns = nanoseconds(chunk.period_s)
        times_ns = first_ns + np.arange(len(chunk.actions), dtype=np.int64) * period_ns
        switch_ns = now_ns if switch_ns is None else switch_ns
        ahead = times_ns >= switch_ns + int(MIN_GAP_PERIODS * period_ns)
        skipped = int(len(ahead) - ahead.sum())
        left_s = float(seconds(int(times_ns[-1]) - switch_ns))
        if not ahead.any() or left_s < min(self._min_remaining_s, chunk.period_s * len(ahead) / 2.0):
            self._drop(
                "late", f"its last step is {left_s:.2f} s away; at least {self._min_remaining_s:g} s must be left"
            )
        times_ns, targets = times_ns[ahead], chunk.actions[ahead]
        seam = np.abs(targets[0] - committed(int(times_ns[0])))
        weight = self._blend_weight(times_ns - now_ns)
        for k in np.flatnonzero(weight < 1.0):
            targets[k] = (1.0 - weight[k]) * committed(int(times_ns[k])) + weight[k] * targets[k]
        return Placement(times_ns=times_ns, targets=targets, skipped=skipped, seam=seam)

    def confirm(self, ticket: Ticket, placement: Placement) -> None:
        """The guard passed the placement and it is now the commanded motion."""
        self.accepted += 1
        self.skipped_steps += placement.skipped

    def withdraw(self) -> None:
        """A chunk that was accepted would have reached the arm too late: the next observation is used at once."""
        self.dropped["withdrawn"] += 1
        self.retry()

    def _blend_weight(self, after_ns: np.ndarray) -> np.ndarray:
        """0 at the switch, 1 from ``blend_time_s`` on, with zero slope at both ends (3 u^2 - 2 u^3)."""
        blend_ns = nanoseconds(self.blend_time_s)
        if blend_ns <= 0:
            return np.ones(len(after_ns))
        u = np.clip(after_ns / blend_ns, 0.0, 1.0)
        return u * u * (3.0 - 2.0 * u)

    def _drop(self, kind: str, message: str) -> None:
        self.dropped[kind] += 1
        raise ChunkDropped(kind, message)

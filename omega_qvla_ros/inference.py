"""The one thread in which the policy runs, so that a slow, hanging or raising policy never delays the control timer.

``submit`` and ``poll`` are called from the node's executor thread, ``infer`` runs on the worker thread, and
``on_done`` (called on the worker thread) must only wake the executor.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.scheduler import Ticket

Job = TypeVar("Job")


@dataclass(frozen=True)
class InferenceResult(Generic[Job]):
    """Outcome of one job: a chunk or an error, never both. ``duration_s`` is wall time on the worker."""

    ticket: Ticket
    job: Job
    chunk: ActionChunk | None
    error: Exception | None
    duration_s: float
    abandoned: bool


class InferenceWorker(Generic[Job]):
    """Runs one job at a time.

    Args:
        infer: Job -> chunk; may raise anything.
        on_done: Called after every job on the worker thread.
        monotonic: Steady clock in seconds; a hang is measured in wall time even when simulated time stands.
    """

    def __init__(
        self,
        infer: Callable[[Job], ActionChunk],
        on_done: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._infer = infer
        self._on_done = on_done
        self._monotonic = monotonic
        self._jobs: queue.Queue[tuple[Ticket, Job] | None] = queue.Queue(maxsize=1)
        self._results: queue.SimpleQueue[InferenceResult[Job]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self._abandoned = False
        # A daemon, because a policy that hangs for good must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """A job is running, or has finished and was not polled yet."""
        with self._lock:
            return self._started_s is not None or not self._results.empty()

    @property
    def running_s(self) -> float:
        """Wall time for which the present job has been running, 0 when idle."""
        with self._lock:
            return 0.0 if self._started_s is None else self._monotonic() - self._started_s

    @property
    def abandoned(self) -> bool:
        """The present job was given up but has not returned yet."""
        with self._lock:
            return self._started_s is not None and self._abandoned

    def submit(self, ticket: Ticket, job: Job) -> bool:
        """Start a job; False if one is running."""
        with self._lock:
            if self._started_s is not None or not self._results.empty():
                return False
            self._started_s = self._monotonic()
            self._abandoned = False
        self._jobs.put((ticket, job))
        return True

    def abandon(self) -> None:
        """Give up the present job: its result will be marked, whenever it comes."""
        with self._lock:
            self._abandoned = self._started_s is not None

    def poll(self) -> InferenceResult[Job] | None:
        """The finished job's result, once; None if there is none."""
        try:
            return self._results.get_nowait()
        except queue.Empty:
            return None

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread. A job that hangs is left behind on its daemon thread."""
        try:
            self._jobs.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            item = self._jobs.get()
            if item is None:
                return
            ticket, job = item
            chunk: ActionChunk | None = None
            error: Exception | None = None
            try:
                chunk = self._infer(job)
            except Exception as caught:  # noqa: BLE001 - foreign code: whatever it raises must end in a hold
                error = caught
            with self._lock:
                started_s = self._started_s if self._started_s is not None else self._monotonic()
                duration_s = self._monotonic() - started_s
                self._results.put(InferenceResult(ticket, job, chunk, error, duration_s, self._abandoned))
                self._started_s = None
            self._on_done()

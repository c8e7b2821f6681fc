"""The worker thread: one job at a time, errors and hangs contained."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.inference import InferenceResult, InferenceWorker
from omega_qvla_ros.scheduler import Ticket

CHUNK = ActionChunk(np.zeros((2, 2)), 0.05, 0.05)
DEADLINE_S = 30.0


class Harness:
    """A worker whose policy waits for the test's permission."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.go = threading.Event()
        self.started = threading.Event()
        self.done = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.worker: InferenceWorker[str] = InferenceWorker(self.infer, self.done.release, lambda: self.now_s)

    def infer(self, job: str) -> ActionChunk:
        self.threads.add(threading.get_ident())
        self.started.set()
        assert self.go.wait(DEADLINE_S)
        if job == "raise":
            raise ValueError("broken")
        return CHUNK

    def result(self) -> InferenceResult:
        assert self.done.acquire(timeout=DEADLINE_S)
        result = self.worker.poll()
        assert result is not None
        return result


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.go.set()
    made.worker.close()


def ticket(sequence: int = 1) -> Ticket:
    return Ticket(sequence, 0, 0, 0)


def test_result_carries_its_ticket_and_its_wall_time(harness: Harness) -> None:
    assert harness.worker.submit(ticket(7), "work")
    assert harness.started.wait(DEADLINE_S)
    harness.now_s = 0.3
    assert harness.worker.running_s == pytest.approx(0.3)
    harness.go.set()
    result = harness.result()
    assert result.ticket.sequence == 7 and result.chunk is CHUNK and result.error is None and not result.abandoned
    assert result.duration_s == pytest.approx(0.3)
    assert not harness.worker.busy and harness.worker.poll() is None


def test_second_job_waits_until_the_first_result_was_taken(harness: Harness) -> None:
    harness.go.set()
    assert harness.worker.submit(ticket(1), "work")
    assert not harness.worker.submit(ticket(2), "work")
    harness.result()
    assert harness.worker.submit(ticket(3), "work")
    assert harness.result().ticket.sequence == 3
    assert len(harness.threads) == 1


def test_error_is_a_result_and_the_thread_lives_on(harness: Harness) -> None:
    harness.go.set()
    harness.worker.submit(ticket(), "raise")
    result = harness.result()
    assert isinstance(result.error, ValueError) and result.chunk is None
    assert harness.worker.submit(ticket(), "work")
    assert harness.result().chunk is CHUNK


def test_job_that_was_given_up_is_marked_when_it_returns(harness: Harness) -> None:
    harness.worker.submit(ticket(), "work")
    assert harness.started.wait(DEADLINE_S)
    harness.worker.abandon()
    assert harness.worker.abandoned and harness.worker.busy
    harness.go.set()
    assert harness.result().abandoned
    assert not harness.worker.abandoned
    harness.worker.submit(ticket(), "work")
    assert not harness.result().abandoned


def test_giving_up_nothing_changes_nothing(harness: Harness) -> None:
    harness.worker.abandon()
    harness.go.set()
    harness.worker.submit(ticket(), "work")
    assert not harness.result().abandoned

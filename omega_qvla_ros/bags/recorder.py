"""Recording without ever waiting: callbacks put messages into a bounded queue, one thread writes them.

When the disk is nearly full, or a write fails, recording ends: what was written is kept, the state says why, and the
callbacks go on as if nothing had happened.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import Enum
from pathlib import Path

from omega_qvla_core.errors import RecordingError
from omega_qvla_ros.bags.writer import BagWriter, RecordedTopic

log = logging.getLogger(__name__)

CHECKPOINT_S = 1.0
"""A killed recorder loses at most this much, and free space is looked at this often."""
CLOSE_TIMEOUT_S = 20.0
"""Longest wait for the queue to be written at the end."""
MAX_QUEUED_MESSAGES = 100_000
"""Small messages cost more than their bytes."""


class RecorderState(Enum):
    """Where a recording stands."""

    RECORDING = "recording"
    STOPPED = "stopped"
    DEGRADED = "degraded"


class BagRecorder:
    """One recording. ``put`` may be called from any thread.

    Args:
        folder: Folder of the bag; must not exist.
        topics: What is recorded.
        storage: ``mcap`` or ``sqlite3``.
        max_queued_bytes: Messages that wait for the disk; beyond this they are dropped and counted.
        min_free_bytes: Recording ends when the disk has less left.
        free_bytes: Folder -> free bytes of its disk.

    Raises:
        RecordingError: The bag cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        topics: Sequence[RecordedTopic],
        storage: str = "mcap",
        *,
        max_queued_bytes: int = 256 * 1024 * 1024,
        min_free_bytes: int = 0,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self.folder = folder
        self.topics = tuple(topics)
        self.state = RecorderState.RECORDING
        self.reason = ""
        self.dropped: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.written_bytes = 0
        self._max_queued_bytes = max_queued_bytes
        self._min_free_bytes = min_free_bytes
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._queue: queue.Queue[tuple[int, int, bytes] | None] = queue.Queue(MAX_QUEUED_MESSAGES)
        # Made on the thread that writes: sqlite3 wants one thread for everything.
        made: Future[BagWriter] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(made, lambda: BagWriter(folder, topics, storage)), name="bag writer", daemon=True
        )
        self._thread.start()
        made.result()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the disk."""
        with self._lock:
            return self._queued_bytes

    def put(self, topic: int, log_ns: int, data: bytes) -> bool:
        """Hand over one message without waiting.

        Args:
            topic: Its index in ``topics``.
            log_ns: When it was received.
            data: Serialized message (CDR).

        Returns:
            False if it was dropped: the queue is full, or nothing is recorded any more.
        """
        if self.state is not RecorderState.RECORDING:
            return self._drop(topic)
        with self._lock:
            if self._queued_bytes + len(data) > self._max_queued_bytes:
                return self._drop(topic)
            self._queued_bytes += len(data)
        try:
            self._queue.put_nowait((topic, log_ns, data))
        except queue.Full:
            self._taken(data)
            return self._drop(topic)
        return True

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write what waits, then the index. Returns when the bag is complete, or given up."""
        if self.state is RecorderState.RECORDING:
            self.state = RecorderState.STOPPED
        self._wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._degrade(f"the disk did not take what was queued within {timeout_s:.0f} s")

    def _wake(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return  # the thread is busy with the queue and looks at the state after every message

    def _drop(self, topic: int) -> bool:
        self.dropped[self.topics[topic].name] += 1
        return False

    def _taken(self, data: bytes) -> None:
        with self._lock:
            self._queued_bytes -= len(data)

    # The writer's thread.

    def _run(self, made: Future[BagWriter], make: Callable[[], BagWriter]) -> None:
        try:
            writer = make()
        except RecordingError as error:
            made.set_exception(error)
            return
        made.set_result(writer)
        try:
            self._write_until_the_end(writer)
            writer.close()
        except RecordingError as error:
            self._degrade(str(error))
            writer.abandon()
        self._discard()

    def _write_until_the_end(self, writer: BagWriter) -> None:
        checkpoint_s = time.monotonic() + CHECKPOINT_S
        while True:
            if time.monotonic() >= checkpoint_s:
                writer.checkpoint()
                checkpoint_s = time.monotonic() + CHECKPOINT_S
                if self._nearly_full():
                    return
            try:
                item = self._queue.get(timeout=max(checkpoint_s - time.monotonic(), 0.0))
            except queue.Empty:
                if self.state is RecorderState.STOPPED:
                    return
                continue
            if item is None:
                return
            topic, log_ns, data = item
            self._taken(data)
            writer.write(topic, log_ns, data)
            self.written[self.topics[topic].name] += 1
            self.written_bytes += len(data)

    def _nearly_full(self) -> bool:
        try:
            free = self._free_bytes(self.folder)
        except OSError as error:
            raise RecordingError(f"the bag {self.folder} cannot be written: {error}") from error
        if free >= self._min_free_bytes:
            return False
        self._degrade(
            f"{free / 1e6:.0f} MB are left on the disk of {self.folder}, min_free_mb asks for "
            f"{self._min_free_bytes / 1e6:.0f}; recording ended, the bag is complete up to here"
        )
        return True

    def _degrade(self, reason: str) -> None:
        self.reason = reason
        self.state = RecorderState.DEGRADED
        log.error("recording ended: %s", reason)

    def _discard(self) -> None:
        """Messages that came while recording ended."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                self._taken(item[2])
                self._drop(item[0])

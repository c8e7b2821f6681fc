"""One sensor stream: how old its newest sample is, and whether its clock is ours."""

from __future__ import annotations

from collections import deque

from omega_qvla_ros.splines import seconds

SKEW_SAMPLES = 5
"""Samples over which the offset of a stream's clock is taken."""


class Stream:
    """Stale until ``resume_after`` fresh samples came, once it has been stale.

    Args:
        topic: For messages.
        timeout_ns: A newest sample older than this is stale.
        resume_after: Fresh samples that it must give after it was stale.
    """

    def __init__(self, topic: str, timeout_ns: int, resume_after: int) -> None:
        self.topic = topic
        self.timeout_ns = timeout_ns
        self._resume_after = resume_after
        self._missing = 1
        self.newest_ns: int | None = None
        self.refused: str | None = None
        """Why the newest message was not taken, None if it was."""
        self._offsets_ns: deque[int] = deque(maxlen=SKEW_SAMPLES)
        self._offered_ns: int | None = None

    def offered(self, stamp_ns: int, now_ns: int) -> None:
        """Note a stamp whether it is taken or not; a repeated one says nothing about the clock."""
        if stamp_ns and stamp_ns != self._offered_ns:
            self._offsets_ns.append(now_ns - stamp_ns)
            self._offered_ns = stamp_ns

    @property
    def offset_s(self) -> float | None:
        """Median of the node's clock minus the stamp over the last samples, None before ``SKEW_SAMPLES``."""
        if len(self._offsets_ns) < SKEW_SAMPLES:
            return None
        return float(seconds(sorted(self._offsets_ns)[SKEW_SAMPLES // 2]))

    def received(self, stamp_ns: int, now_ns: int) -> None:
        """A sample was taken."""
        self.update(now_ns)
        self.refused = None
        self.newest_ns = stamp_ns
        if now_ns - stamp_ns <= self.timeout_ns:
            self._missing = max(self._missing - 1, 0)

    def update(self, now_ns: int) -> None:
        """Notice staleness. Called at every control tick, so that a short gap between two samples is not missed."""
        if self.newest_ns is not None and now_ns - self.newest_ns > self.timeout_ns:
            self._missing = self._resume_after

    def problem(self, now_ns: int) -> str | None:
        """Why the stream cannot be used now, None if it can."""
        refused = f"; the last message was refused: {self.refused}" if self.refused else ""
        if self.newest_ns is None:
            return (
                f"nothing usable on {self.topic!r} yet{refused}"
                if refused
                else f"nothing received on {self.topic!r} yet"
            )
        age_s = seconds(now_ns - self.newest_ns)
        if now_ns - self.newest_ns > self.timeout_ns:
            return f"{self.topic!r} is stale: {age_s:.3f} s old, limit {seconds(self.timeout_ns):.3f} s{refused}"
        if self._missing:
            return f"{self.topic!r} came back; waiting for {self._missing} more samples"
        return None

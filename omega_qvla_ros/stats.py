"""Running figures for diagnostics: percentiles of durations and the rate that a timer really holds."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np


class Percentiles:
    """Percentiles of the last samples.

    Args:
        size: Samples kept; 600 are two minutes at 5 chunks/s.
    """

    def __init__(self, size: int = 600) -> None:
        self._samples: deque[float] = deque(maxlen=size)
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Add one sample."""
        with self._lock:
            self._samples.append(value)

    def clear(self) -> None:
        """Forget all samples."""
        with self._lock:
            self._samples.clear()

    def values(self) -> list[float]:
        """The samples kept, oldest first."""
        with self._lock:
            return list(self._samples)

    def get(self, percent: float) -> float:
        """The percentile, NaN without samples."""
        values = self.values()
        return float(np.percentile(values, percent)) if values else float("nan")


class TickMonitor:
    """Rate, jitter and missed ticks of a periodic callback.

    Args:
        period_s: Nominal period.
        size: Ticks over which the rate is computed.
    """

    def __init__(self, period_s: float, size: int = 200) -> None:
        self.period_s = period_s
        self._period_ns = period_s * 1e9
        self._ticks: deque[int] = deque(maxlen=size)
        self.missed = 0
        self.late = 0
        """Ticks that came more than two periods after the one before."""
        self.gap_s = float("nan")
        """Time between the last two ticks."""
        self.jitter_s = Percentiles(size=3000)
        """Deviation of each gap from the period; 3000 are two and a half minutes at 20 Hz."""

    def tick(self, now_ns: int) -> bool:
        """Note a tick; True if it came more than two periods after the one before (a starved timer)."""
        late = False
        if self._ticks:
            gap = now_ns - self._ticks[-1]
            if gap < 0:
                self._ticks.clear()
            else:
                self.gap_s = gap / 1e9
                self.jitter_s.add(abs(gap - self._period_ns) / 1e9)
            late = gap > 2.0 * self._period_ns
            self.late += late
            # Half a period of grace: a tick that is only late is not a missed one.
            self.missed += max(0, round(gap / self._period_ns) - 1) if late else 0
        self._ticks.append(now_ns)
        return late

    def set_period(self, period_s: float) -> None:
        """The timer has another period from now on."""
        self.period_s = period_s
        self._period_ns = period_s * 1e9
        self._ticks.clear()
        self.jitter_s.clear()

    def restart(self) -> None:
        """The timer was stopped on purpose; the next gap is not counted."""
        self._ticks.clear()

    @property
    def rate_hz(self) -> float:
        """Mean rate over the ticks kept, NaN before the second one."""
        if len(self._ticks) < 2 or self._ticks[-1] == self._ticks[0]:
            return float("nan")
        return (len(self._ticks) - 1) * 1e9 / (self._ticks[-1] - self._ticks[0])

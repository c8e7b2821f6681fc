"""What an operator should know although nothing has to stop: odd pictures, an inert policy, a late timer.

Notices raise the level of the diagnostics to WARN and nothing else. The safety state does not know them.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable

import numpy as np

from omega_qvla_ros.splines import nanoseconds, seconds

log = logging.getLogger(__name__)

BLACK_LEVEL = 8
"""Brightest value of an image that counts as black: a sensor's noise with the lens cap on."""
FROZEN_NS = nanoseconds(1.0)
"""The same bytes under new stamps for so long are worth a notice; a standing simulation is the harmless case."""
INERT_NS = nanoseconds(5.0)
INERT_TOLERANCE = 1e-4
"""Difference below which two actions are the same, in the checkpoint's unit; a sampled policy never repeats itself."""
EVENT_NS = nanoseconds(10.0)
"""How long a notice about something momentary stays."""


class Notices:
    """Texts by key; logged when they come. Callable from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: dict[str, tuple[str, int | None]] = {}

    def set(self, key: str, text: str | None, until_ns: int | None = None) -> None:
        """Set a notice, or clear it with None. With ``until_ns`` it goes by itself."""
        with self._lock:
            known = key in self._texts
            if text is None:
                self._texts.pop(key, None)
                return
            self._texts[key] = (text, until_ns)
        if not known:
            log.warning("%s", text)

    def update(self, now_ns: int) -> None:
        """Drop the notices whose time is over."""
        with self._lock:
            for key in [key for key, (_, until_ns) in self._texts.items() if until_ns and now_ns >= until_ns]:
                del self._texts[key]

    @property
    def texts(self) -> list[str]:
        """All present notices."""
        with self._lock:
            return [text for text, _ in self._texts.values()]


class ImageWatch:
    """Looks at the images that the policy gets. Runs on the inference thread.

    Args:
        topics: Camera key -> topic, for the texts.
        notices: Where it writes.
    """

    def __init__(self, topics: dict[str, str], notices: Notices) -> None:
        self._topics = topics
        self._notices = notices
        self._last: dict[str, tuple[int, int]] = {}

    def look(self, key: str, rgb: np.ndarray, stamp_ns: int) -> None:
        """Judge one image.

        Args:
            key: Camera key.
            rgb: uint8 ``[H, W, 3]``.
            stamp_ns: Its stamp.
        """
        topic = self._topics.get(key, key)
        black = int(rgb.max(initial=0)) <= BLACK_LEVEL
        self._notices.set(
            f"black.{key}",
            f"{topic!r} is black; is the lens covered, is there light, is it exposed?" if black else None,
        )
        checksum = zlib.crc32(np.ascontiguousarray(rgb))
        before = self._last.get(key)
        if before is None or before[0] != checksum or stamp_ns < before[1]:
            self._last[key] = (checksum, stamp_ns)
            self._notices.set(f"frozen.{key}", None)
        elif stamp_ns - before[1] >= FROZEN_NS:
            span_s = float(seconds(stamp_ns - before[1]))
            text = f"{topic!r} repeats the same picture under new stamps for {span_s:.1f} s; is the driver stuck?"
            self._notices.set(f"frozen.{key}", text)


class InertWatch:
    """A policy that asks for the same pose for ever is finished, or has the wrong statistics."""

    def __init__(self) -> None:
        self._pose: np.ndarray | None = None
        self._since_ns = 0

    def look(self, actions: np.ndarray, now_ns: int) -> str | None:
        """Judge one chunk.

        Args:
            actions: ``[steps, entries]`` as the policy gave them.
            now_ns: Node time.

        Returns:
            A notice, or None.
        """
        flat = bool((np.ptp(actions, axis=0) <= INERT_TOLERANCE).all())
        same = self._pose is not None and bool((np.abs(actions[0] - self._pose) <= INERT_TOLERANCE).all())
        if not (flat and same) or now_ns < self._since_ns:
            self._pose, self._since_ns = actions[0].copy(), now_ns
            return None
        if now_ns - self._since_ns < INERT_NS:
            return None
        return (
            f"the policy has asked for the same pose for {float(seconds(now_ns - self._since_ns)):.0f} s: it is "
            "finished, or its normalization statistics are wrong (omega-qvla inspect)"
        )


def once_per(period_ns: int) -> Callable[[str, int], bool]:
    """A throttle by key: True at most once per ``period_ns`` and key."""
    last: dict[str, int] = {}

    def due(key: str, now_ns: int) -> bool:
        if key in last and 0 <= now_ns - last[key] < period_ns:
            return False
        last[key] = now_ns
        return True

    return due

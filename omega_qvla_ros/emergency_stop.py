"""The emergency stop as the node sees it: which switches are pressed, and since when none is."""

from __future__ import annotations

import time
from collections.abc import Callable

from omega_qvla_core.errors import OmegaQVLAError


class Refused(OmegaQVLAError):
    """The robot is not in a state in which this may be done; the message says why and what to do."""


class EmergencyStop:
    """Any number of switches, by topic. Wall time, because a person's hand does not go by simulated time.

    Args:
        reset_delay_s: A latch may be reset so long after the last switch was released. Origin: as OpenRAL.
        monotonic: Steady clock in seconds.
    """

    def __init__(self, reset_delay_s: float = 0.5, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.reset_delay_s = reset_delay_s
        self._monotonic = monotonic
        self._pressed: set[str] = set()
        self._released_s: float | None = None

    @property
    def pressed(self) -> bool:
        """A switch is pressed now."""
        return bool(self._pressed)

    def set(self, topic: str, pressed: bool) -> bool:
        """Note a message of a switch. Returns True if it asks for a stop."""
        if pressed:
            self._pressed.add(topic)
        elif topic in self._pressed:
            self._pressed.discard(topic)
            self._released_s = self._monotonic()
        return pressed

    def refusal(self) -> str | None:
        """Why the arm may not be released now, None if it may."""
        if self._pressed:
            return f"the emergency stop {', '.join(sorted(self._pressed))} is pressed; release it first"
        if self._released_s is not None and self._monotonic() - self._released_s < self.reset_delay_s:
            return f"the emergency stop was released less than {self.reset_delay_s:g} s ago; try again"
        return None

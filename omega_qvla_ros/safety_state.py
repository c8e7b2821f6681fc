"""What is wrong right now: the arm moves only while nothing is that forbids it.

Time is an argument, so that tests inject it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from omega_qvla_ros.splines import nanoseconds


class State(Enum):
    """OK and DEGRADED move; HOLD decelerates and resumes by itself; LATCHED needs ``~/reset_fault``."""

    OK = 0
    DEGRADED = 1
    HOLD = 2
    LATCHED = 3


class SafetyState:
    """What is wrong right now, by name, and what follows from it.

    Args:
        max_consecutive_errors: So many policy errors without a success in between latch.
        retry_delay_s: Hold after a policy error before the next attempt.
    """

    def __init__(self, max_consecutive_errors: int = 3, retry_delay_s: float = 0.5) -> None:
        self.configure(max_consecutive_errors, retry_delay_s)
        self._latched: dict[str, str] = {}
        self._holds: dict[str, str] = {}
        self._warnings: dict[str, str] = {}
        self._retry_until_ns: dict[str, int] = {}
        self.consecutive_errors = 0

    def configure(self, max_consecutive_errors: int, retry_delay_s: float) -> None:
        """Take other numbers; what is held or latched stays."""
        self._max_errors = max_consecutive_errors
        self._retry_ns = nanoseconds(retry_delay_s)

    @property
    def state(self) -> State:
        """The worst of everything that is set."""
        if self._latched:
            return State.LATCHED
        if self._holds:
            return State.HOLD
        return State.DEGRADED if self._warnings else State.OK

    @property
    def may_move(self) -> bool:
        """True in OK and DEGRADED."""
        return not self._latched and not self._holds

    @property
    def reasons(self) -> Sequence[str]:
        """Every reason, worst first."""
        return [*self._latched.values(), *self._holds.values(), *self._warnings.values()]

    def latch(self, key: str, reason: str) -> None:
        """Stop until ``reset``."""
        self._latched.setdefault(key, reason)

    def hold(self, key: str, reason: str) -> None:
        """Stop until ``release(key)``."""
        self._holds[key] = reason

    def held(self, key: str) -> str | None:
        """The reason of the hold ``key``, None if it is not set."""
        return self._holds.get(key)

    def release(self, key: str) -> None:
        """The cause ``key`` is gone."""
        self._holds.pop(key, None)

    def warn(self, key: str, reason: str | None) -> None:
        """Set a reason for DEGRADED, or clear it with None."""
        if reason is None:
            self._warnings.pop(key, None)
        else:
            self._warnings[key] = reason

    def policy_error(self, reason: str, now_ns: int) -> None:
        """An inference failed or its chunk was refused: hold, retry later; latch after too many in a row."""
        self.consecutive_errors += 1
        self.fault("policy", reason, now_ns, self.consecutive_errors, "policy errors")

    def fault(self, key: str, reason: str, now_ns: int, in_a_row: int, what: str) -> None:
        """Hold for the retry delay; latch if this was one too many in a row.

        Args:
            key: Name of the hold, and of the latch.
            reason: For people.
            now_ns: Node time.
            in_a_row: How many such faults there were without a success in between, this one included.
            what: Name of such faults, in the plural.
        """
        if in_a_row >= self._max_errors:
            self.latch(key, f"{in_a_row} {what} in a row, the last one: {reason}")
        self.hold(key, reason)
        self._retry_until_ns[key] = now_ns + self._retry_ns

    def policy_success(self) -> None:
        """A chunk was accepted."""
        self.consecutive_errors = 0

    def update(self, now_ns: int) -> None:
        """End the holds of ``fault`` whose time is over."""
        for key in [key for key, until_ns in self._retry_until_ns.items() if now_ns >= until_ns]:
            del self._retry_until_ns[key]
            self.release(key)

    def reset(self) -> Sequence[str]:
        """Clear latched faults and the error count; holds stay until their cause is gone. Returns what was cleared."""
        cleared = list(self._latched.values())
        self._latched.clear()
        self.consecutive_errors = 0
        for key in self._retry_until_ns:
            self.release(key)
        self._retry_until_ns.clear()
        return cleared

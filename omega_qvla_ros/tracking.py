"""Does the arm follow its command? Too far away, or standing still in spite of it, is a loss.

Two cases, because a policy that sees a blocked arm plans from where the arm is: its command then stays a little ahead
of the arm for ever and never gets as far away as ``max_tracking_error``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omega_qvla_ros.contract import JointLimits
from omega_qvla_ros.splines import NS_PER_S, nanoseconds

TRACKING_TICKS = 4
"""The arm must be away from its command for so many control periods: one late joint state is no loss."""
STALL_ERROR_SHARE = 0.2
"""Share of ``max_tracking_error`` from which a standing joint counts as away (0.08 of 0.4 rad: more than friction)."""
STALL_MOTION_SHARE = 0.05
"""Share of ``max_tracking_error`` within which a joint counts as standing."""


class TrackingMonitor:
    """Compares commanded with measured positions of one robot.

    Joints whose ``max_tracking_error`` is infinite are not watched.

    Args:
        joint_names: Names in contract order.
        limits: ``max_tracking_error`` in rad or m.
        stall_time_s: A joint that stands away from its command for so long is blocked.
    """

    def __init__(self, joint_names: Sequence[str], limits: JointLimits, stall_time_s: float) -> None:
        self._names = tuple(joint_names)
        self._limit = limits.max_tracking_error
        self._stall_ns = nanoseconds(stall_time_s)
        self._lost_at: np.ndarray | None = None
        self.losses = 0
        """Losses since the arm last moved away from where it was lost."""
        self.restart()

    def restart(self) -> None:
        """Another motion begins; the losses in a row are kept."""
        self._away_ticks = 0
        self._stands_at = np.full(len(self._names), np.nan)
        self._stands_since_ns = np.zeros(len(self._names), dtype=np.int64)

    def reset(self) -> None:
        """The operator says that the cause is gone."""
        self.losses = 0
        self._lost_at = None
        self.restart()

    def check(self, stamp_ns: int, commanded: np.ndarray, measured: np.ndarray) -> str | None:
        """Judge one sample.

        Args:
            stamp_ns: Time of the measurement.
            commanded: ``[joints]`` command for that time.
            measured: ``[joints]``.

        Returns:
            None, or the reason why the arm counts as lost now; it names joint, error and limit.
        """
        if self._lost_at is not None and (np.abs(measured - self._lost_at) > self._limit).any():
            self.losses, self._lost_at = 0, None
        error = np.abs(commanded - measured)
        reason = self._away(error) or self._stalled(stamp_ns, error, measured)
        if reason is not None:
            self.losses += 1
            self._lost_at = measured.copy()
            self.restart()
        return reason

    def _away(self, error: np.ndarray) -> str | None:
        worst = int(np.argmax(error / self._limit))
        self._away_ticks = self._away_ticks + 1 if error[worst] > self._limit[worst] else 0
        if self._away_ticks < TRACKING_TICKS:
            return None
        return (
            f"joint {self._names[worst]!r} is {error[worst]:.3f} away from its command (limit "
            f"{self._limit[worst]:.3f}); is the controller active, is the arm blocked?"
        )

    def _stalled(self, stamp_ns: int, error: np.ndarray, measured: np.ndarray) -> str | None:
        away = error > STALL_ERROR_SHARE * self._limit
        with np.errstate(invalid="ignore"):
            stands = away & (np.abs(measured - self._stands_at) <= STALL_MOTION_SHARE * self._limit)
        begins = away & ~stands
        self._stands_at = np.where(begins, measured, np.where(away, self._stands_at, np.nan))
        self._stands_since_ns = np.where(begins, stamp_ns, self._stands_since_ns)
        blocked = np.flatnonzero(stands & (stamp_ns - self._stands_since_ns >= self._stall_ns))
        if not len(blocked):
            return None
        joint = int(blocked[np.argmax((error / self._limit)[blocked])])
        return (
            f"joint {self._names[joint]!r} stands {error[joint]:.3f} away from its command for "
            f"{self._stall_ns / NS_PER_S:g} s (limit {STALL_ERROR_SHARE * self._limit[joint]:.3f}); is the controller "
            "active, is the arm blocked?"
        )

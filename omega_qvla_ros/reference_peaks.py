"""What a controller made of the messages it got: the largest steps of its own commands.

Measured where they are executed. Whoever only hears the same messages cannot tell whether a message came late to the
controller or to the listener.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from omega_qvla_ros.splines import NS_PER_S


class ReferencePeaks:
    """Largest steps of a reference ``[joints]``.

    Args:
        joints: Number of joints.
        span_ns: ``jump`` is taken over this time, the policy node's control period.
    """

    def __init__(self, joints: int, span_ns: int) -> None:
        self._span_ns = span_ns
        self._history: deque[tuple[int, np.ndarray, np.ndarray]] = deque()
        self.jump = np.zeros(joints)
        """Largest change of position within the span, rad or m."""
        self.acceleration = np.zeros(joints)
        """Largest change of velocity from one sample to the next over the time between them, rad/s^2 or m/s^2."""

    def restart(self) -> None:
        """The reference was put elsewhere, which is no motion: a reset, an activation."""
        self._history.clear()

    def sample(self, now_ns: int, position: np.ndarray, velocity: np.ndarray) -> None:
        """One period of the controller.

        Args:
            now_ns: Its clock; must increase until ``restart``.
            position: ``[joints]``.
            velocity: ``[joints]``.
        """
        if self._history:
            before_ns, _, before = self._history[-1]
            acceleration = np.abs(velocity - before) * (NS_PER_S / (now_ns - before_ns))
            self.acceleration = np.maximum(self.acceleration, acceleration)
        self._history.append((now_ns, position.copy(), velocity.copy()))
        while now_ns - self._history[0][0] > self._span_ns:
            self._history.popleft()
        for _, earlier, _ in self._history:
            self.jump = np.maximum(self.jump, np.abs(position - earlier))

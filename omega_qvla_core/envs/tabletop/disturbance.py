"""Disturbs the expert's commands while demonstrations are recorded."""

from __future__ import annotations

import numpy as np

from omega_qvla_core.envs.tabletop.expert import CLOSED_M, OPEN_M, Expert, yaw_of_tool
from omega_qvla_core.envs.tabletop.privileged import PrivilegedState

# Ornstein-Uhlenbeck noise on the six joints: stationary standard deviation, and how fast it forgets.
_JOINT_STD_RAD = 0.015
_JOINT_FORGET = 0.25

# A burst leads the tool away: on average one per episode, towards a random offset.
_BURST_PROBABILITY = 0.025
_MAX_BURSTS = 2
_BURST_STEPS = (4, 10)
_BURST_OFFSET_STD_M = 0.03
_BURST_FLIP_PROBABILITY = 0.25
# A burst does not lead the tool into the table.
_BURST_MIN_HEIGHT_M = 0.016

# Separates this stream of random numbers from those of start poses and wordings.
_STREAM = 2


class Disturbance:
    """The disturbance of one episode: joint noise always, and now and then a burst.

    Args:
        seed: The episode's seed.
        expert: Turns a burst's tool offset into joint targets.
    """

    def __init__(self, seed: int, expert: Expert) -> None:
        self._rng = np.random.default_rng((seed, _STREAM))
        self._expert = expert
        self._noise = self._rng.normal(0.0, _JOINT_STD_RAD, size=6)
        self._bursts = 0
        self._remaining = 0
        self._target = np.zeros(3)
        self._flip = False

    def apply(self, state: PrivilegedState, action: np.ndarray, finished: bool) -> tuple[np.ndarray, bool]:
        """Disturbs one command.

        Args:
            state: Poses now.
            action: float64 ``[7]``, the clean command.
            finished: The task is done: no more bursts, they would undo it.

        Returns:
            The disturbed command float64 ``[7]`` and whether it belongs to a burst.
        """
        innovation = np.sqrt(1.0 - (1.0 - _JOINT_FORGET) ** 2) * _JOINT_STD_RAD
        self._noise = (1.0 - _JOINT_FORGET) * self._noise + self._rng.normal(0.0, innovation, size=6)
        start = self._rng.random() < _BURST_PROBABILITY
        if start and not finished and self._remaining == 0 and self._bursts < _MAX_BURSTS:
            self._begin_burst(state)
        command = action.copy()
        burst = self._remaining > 0 and not finished
        if burst:
            self._remaining -= 1
            opening = action[6]
            if self._flip:
                opening = OPEN_M if opening < (OPEN_M + CLOSED_M) / 2 else CLOSED_M
            command = self._expert.towards(state, self._target, yaw_of_tool(state), opening)
        command[:6] += self._noise
        return command, burst

    def _begin_burst(self, state: PrivilegedState) -> None:
        self._bursts += 1
        self._remaining = int(self._rng.integers(_BURST_STEPS[0], _BURST_STEPS[1] + 1))
        self._target = state.tool_position + self._rng.normal(0.0, _BURST_OFFSET_STD_M, size=3)
        self._target[2] = max(self._target[2], _BURST_MIN_HEIGHT_M)
        self._flip = bool(self._rng.random() < _BURST_FLIP_PROBABILITY)

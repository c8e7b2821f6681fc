"""What a recorded run commanded, as a position at any time."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omega_qvla_ros.bags.reader import BagMessage
from omega_qvla_ros.splines import NS_PER_S
from omega_qvla_ros.trajectory import Plan


class CommandTrack:
    """The rolling windows of one topic. At each time the newest window that had begun by then was in force.

    Args:
        joint_names: Order of the positions.
    """

    def __init__(self, joint_names: Sequence[str]) -> None:
        self._names = list(joint_names)
        self._starts_ns: list[int] = []
        self._plans: list[Plan] = []

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, recorded: BagMessage) -> None:
        """Take a ``trajectory_msgs/JointTrajectory``. Ones without a stamp or for other joints are left out."""
        message = recorded.message
        stamp_ns = int(message.header.stamp.sec) * NS_PER_S + int(message.header.stamp.nanosec)
        names = list(message.joint_names)
        ours = {self._names.index(name): k for k, name in enumerate(names) if name in self._names}
        if not stamp_ns or not len(message.points) or not ours:
            return
        if self._starts_ns and stamp_ns < self._starts_ns[-1]:
            return
        times_ns = [stamp_ns + _duration_ns(point.time_from_start) for point in message.points]
        self._starts_ns.append(stamp_ns)
        self._plans.append(
            Plan(
                np.array(times_ns, dtype=np.int64),
                self._rows([point.positions for point in message.points], ours),
                self._rows([point.velocities for point in message.points], ours),
            )
        )

    def _rows(self, values: Sequence[Sequence[float]], ours: Mapping[int, int]) -> np.ndarray:
        """``[points, joints]``, NaN for joints that the message does not have; velocities that are left out are 0."""
        rows = np.full((len(values), len(self._names)), np.nan)
        for row, given in zip(rows, values):
            row[list(ours)] = np.asarray(given)[list(ours.values())] if len(given) else 0.0
        return rows

    def position(self, time_ns: int) -> np.ndarray | None:
        """Commanded positions ``[joints]``, None where nothing was commanded yet or the last window had ended."""
        index = bisect.bisect_right(self._starts_ns, time_ns) - 1
        if index < 0 or time_ns > self._plans[index].end_ns:
            return None
        return self._plans[index].sample(time_ns)[0]


def _duration_ns(duration: Any) -> int:
    return int(duration.sec) * NS_PER_S + int(duration.nanosec)


def merged(tracks: Sequence[CommandTrack], time_ns: int, joints: int) -> np.ndarray:
    """Commanded positions ``[joints]`` of a robot whose joints are commanded on several topics; NaN where none."""
    found = np.full(joints, np.nan)
    for track in tracks:
        position = track.position(time_ns)
        if position is not None:
            found = np.where(np.isnan(found), position, found)
    return found

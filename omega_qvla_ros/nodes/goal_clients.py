"""One action server as an output sees it: is it there, send a goal, what became of it. Nothing here waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.task import Future


class Outcome(Enum):
    """How a goal ended."""

    REJECTED = "rejected"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    CANCELED = "canceled"


@dataclass(frozen=True)
class GoalResult:
    """The end of a goal. ``result`` is the action's result message, None where the goal was refused."""

    outcome: Outcome
    result: Any = None


OnResult = Callable[[GoalResult], None]


class GoalClient(Protocol):
    """What an output needs of an action client."""

    name: str

    def ready(self) -> bool:
        """Whether a server is there."""

    def unanswered_s(self) -> float:
        """For how long the oldest goal has waited for the server's yes or no, 0 without one."""

    def send(self, goal: Any, on_result: OnResult) -> None:
        """Send a goal; ``on_result`` is called on the executor's thread, if the server ever answers."""

    def destroy(self) -> None:
        """Free the client."""


_OUTCOMES = {
    GoalStatus.STATUS_SUCCEEDED: Outcome.SUCCEEDED,
    GoalStatus.STATUS_ABORTED: Outcome.ABORTED,
    GoalStatus.STATUS_CANCELED: Outcome.CANCELED,
}


class RclpyGoalClient:
    """A ``GoalClient`` over rclpy, for any action type.

    Args:
        node: Its owner.
        action_type: Such as ``control_msgs.action.FollowJointTrajectory``.
        name: Relative action name.
        monotonic: Steady clock in seconds.
    """

    def __init__(
        self, node: Node, action_type: type, name: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._client = ActionClient(node, action_type, name)
        self._monotonic = monotonic
        self._asked_s: dict[int, float] = {}
        self._count = 0

    def ready(self) -> bool:
        """See ``GoalClient``."""
        ready = bool(self._client.server_is_ready())
        if not ready:
            self._asked_s.clear()  # goals to a server that has gone are lost
        return ready

    def unanswered_s(self) -> float:
        """See ``GoalClient``."""
        return self._monotonic() - min(self._asked_s.values()) if self._asked_s else 0.0

    def send(self, goal: Any, on_result: OnResult) -> None:
        """See ``GoalClient``."""
        self._count += 1
        number = self._count
        self._asked_s[number] = self._monotonic()
        future = self._client.send_goal_async(goal)
        future.add_done_callback(lambda done: self._answered(number, done, on_result))

    def _answered(self, number: int, future: Future, on_result: OnResult) -> None:
        # A goal that was answered proves the server alive: older unanswered ones are lost, not waited for.
        for older in [key for key in self._asked_s if key <= number]:
            del self._asked_s[older]
        handle = future.result()
        if handle is None or not handle.accepted:
            on_result(GoalResult(Outcome.REJECTED))
            return
        handle.get_result_async().add_done_callback(lambda done: self._ended(done, on_result))

    @staticmethod
    def _ended(future: Future, on_result: OnResult) -> None:
        answer = future.result()
        if answer is not None and answer.status in _OUTCOMES:
            on_result(GoalResult(_OUTCOMES[answer.status], answer.result))

    def destroy(self) -> None:
        """See ``GoalClient``."""
        self._client.destroy()

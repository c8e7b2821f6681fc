"""The scripted policy node with outputs to action servers: ``python -m action_policy --ros-args ...``.

Where ``control_msgs`` is missing, goals go to the stand-in server of ``goal_server`` over two plain topics. The output
classes, the node and everything behind them are the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from goal_server import ANSWER_TOPIC, GOAL_TOPIC, TOPIC_QOS
from rclpy.node import Node
from scripted_policy import load
from std_msgs.msg import String

from omega_qvla_ros import msgs
from omega_qvla_ros.nodes import action_outputs, outputs, policy_node
from omega_qvla_ros.nodes.goal_clients import GoalResult, OnResult, Outcome


class StandInClient:
    """A ``GoalClient`` whose server is ``goal_server.StandInServer``."""

    def __init__(self, node: Node, action_type: type, name: str) -> None:
        self.name = name
        self._node = node
        self._publisher = node.create_publisher(String, name + GOAL_TOPIC, TOPIC_QOS)
        self._subscription = node.create_subscription(String, name + ANSWER_TOPIC, self._on_answer, TOPIC_QOS)
        self._waiting: dict[int, tuple[float, OnResult]] = {}
        self._accepted: dict[int, OnResult] = {}
        self._count = 0

    def ready(self) -> bool:
        ready = self._publisher.get_subscription_count() > 0
        if not ready:
            self._waiting.clear()
        return ready

    def unanswered_s(self) -> float:
        return time.monotonic() - min(at_s for at_s, _ in self._waiting.values()) if self._waiting else 0.0

    def send(self, goal: Any, on_result: OnResult) -> None:
        self._count += 1
        self._waiting[self._count] = (time.monotonic(), on_result)
        self._publisher.publish(String(data=json.dumps({"id": self._count, **goal})))

    def _on_answer(self, message: String) -> None:
        answer = json.loads(message.data)
        number = answer["id"]
        if "accepted" in answer:
            for older in [key for key in self._waiting if key <= number]:
                _, on_result = self._waiting.pop(older)
                self._accepted[older] = on_result
            if not answer["accepted"]:
                self._accepted.pop(number)(GoalResult(Outcome.REJECTED))
            return
        on_result = self._accepted.pop(number, None)
        if on_result is not None:
            on_result(GoalResult(Outcome(answer["outcome"]), SimpleNamespace(**answer["result"])))

    def destroy(self) -> None:
        self._node.destroy_publisher(self._publisher)
        self._node.destroy_subscription(self._subscription)


def stand_in_types() -> SimpleNamespace:
    """What the outputs need of ``control_msgs.action``: types with ``Goal``, here as plain dictionaries."""

    def trajectory_goal(trajectory: Any) -> dict[str, Any]:
        plain = msgs.trajectory_from_msg(trajectory)
        points = [
            {
                "positions": list(p.positions),
                "velocities": list(p.velocities),
                "time_from_start_ns": p.time_from_start_ns,
            }
            for p in plain.points
        ]
        return {"stamp_ns": plain.stamp_ns, "joint_names": list(plain.joint_names), "points": points}

    return SimpleNamespace(
        FollowJointTrajectory=SimpleNamespace(Goal=lambda trajectory: trajectory_goal(trajectory)),
        GripperCommand=SimpleNamespace(),
    )


def gripper_goal(_: Any, max_effort: float | None) -> Callable[[float], dict[str, float]]:
    """Position -> goal of the stand-in."""
    return lambda position: {"position": position}


if __name__ == "__main__":
    if importlib.util.find_spec("control_msgs") is None:
        outputs.RclpyGoalClient = StandInClient
        action_outputs.action_types = stand_in_types
        action_outputs.gripper_command_goal = gripper_goal
    policy_node.main(policy_loader=load)

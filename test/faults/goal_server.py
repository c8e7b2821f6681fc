"""An action server of the tests' own: the real one where ``control_msgs`` is installed, else a stand-in over topics.

Both have a thread of their own that can be paused (``stalled``), and end a goal as ``behaviour`` says.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from omega_qvla_ros import msgs
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

GOAL_TOPIC, ANSWER_TOPIC = "/stand_in_goal", "/stand_in_answer"
TOPIC_QOS = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
HAS_CONTROL_MSGS = importlib.util.find_spec("control_msgs") is not None
TOLERANCE_VIOLATED = -4
"""FollowJointTrajectory's PATH_TOLERANCE_VIOLATED."""
Behaviour = Literal["accept", "abort"]


class GoalServer:
    """One action server.

    Args:
        domain_id: ``ROS_DOMAIN_ID`` of the graph.
        name: Action name.
        kind: ``FollowJointTrajectory`` or ``GripperCommand``.
        on_goal: Called with each accepted goal: a ``JointTrajectory`` or a position.
    """

    def __init__(
        self,
        domain_id: int,
        name: str,
        kind: Literal["FollowJointTrajectory", "GripperCommand"],
        on_goal: Callable[[Any], None] = lambda goal: None,
    ) -> None:
        self.behaviour: Behaviour = "accept"
        self.stalled = False
        self.goals: list[tuple[float, Any]] = []
        """Steady time and goal."""
        self._on_goal = on_goal
        self._context = Context()
        rclpy.init(context=self._context, args=[], domain_id=domain_id)
        self._node = Node(f"server_{name.replace('/', '_')}", context=self._context)
        self._end = self._serve_real(name, kind) if HAS_CONTROL_MSGS else self._serve_stand_in(name)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._spin, name=name, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._closing.is_set():
            try:
                if self.stalled:
                    time.sleep(0.02)
                else:
                    self._executor.spin_once(timeout_sec=0.02)
            except ExternalShutdownException:
                return

    def close(self) -> None:
        self._closing.set()
        self._thread.join(5.0)
        self._end()
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def _take(self, goal: Any) -> None:
        self.goals.append((time.monotonic(), goal))
        self._on_goal(goal)

    # The stand-in.

    def _serve_stand_in(self, name: str) -> Callable[[], None]:
        answers = self._node.create_publisher(String, name + ANSWER_TOPIC, TOPIC_QOS)

        def on_goal(message: String) -> None:
            data = json.loads(message.data)
            answers.publish(String(data=json.dumps({"id": data["id"], "accepted": True})))
            if self.behaviour == "abort":
                end = {"id": data["id"], "outcome": "aborted", "result": self._failure()}
                answers.publish(String(data=json.dumps(end)))
                return
            self._take(data["position"] if "position" in data else _trajectory(data))

        self._node.create_subscription(String, name + GOAL_TOPIC, on_goal, TOPIC_QOS)
        return lambda: None

    @staticmethod
    def _failure() -> dict[str, Any]:
        return {"error_code": TOLERANCE_VIOLATED, "error_string": "joint_2 is too far away", "stalled": True}

    # The real one.

    def _serve_real(self, name: str, kind: str) -> Callable[[], None]:
        from control_msgs import action
        from rclpy.action import ActionServer, CancelResponse

        action_type = getattr(action, kind)

        def execute(handle: Any) -> Any:
            """Ends at once: what became of the goal is known, and nobody may wait in here."""
            result = action_type.Result()
            if self.behaviour == "abort":
                for field, value in self._failure().items():
                    if hasattr(result, field):
                        setattr(result, field, value)
                handle.abort()
                return result
            goal = handle.request
            self._take(goal.command.position if hasattr(goal, "command") else msgs.trajectory_from_msg(goal.trajectory))
            handle.succeed()
            return result

        server = ActionServer(self._node, action_type, name, execute, cancel_callback=lambda _: CancelResponse.ACCEPT)
        return server.destroy


def _trajectory(data: dict[str, Any]) -> JointTrajectory:
    points: Sequence[dict[str, Any]] = data["points"]
    return JointTrajectory(
        tuple(data["joint_names"]),
        data["stamp_ns"],
        tuple(
            TrajectoryPoint(
                positions=np.array(point["positions"]),
                time_from_start_ns=point["time_from_start_ns"],
                velocities=np.array(point["velocities"]),
            )
            for point in points
        ),
    )

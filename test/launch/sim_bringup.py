"""launch_testing description: sim.launch.py with the policy in $SIM_TEST_CHECKPOINT, until the arm has moved.

Run by test_sim_launch.py in a process of its own, because launch writes into the environment of its process.
"""

from __future__ import annotations

import os
import time
import unittest
from collections.abc import Callable
from pathlib import Path

import launch_testing
import launch_testing.actions
import launch_testing.asserts
import rclpy
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription, SetLaunchConfiguration
from lifecycle_msgs.msg import TransitionEvent
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory

SIM = Path(__file__).resolve().parents[2] / "launch" / "sim.launch.py"
NAMESPACE = "cell"
MOVED_RAD = 0.02
"""More than the arm sinks under its own weight; the random policy drifts by several times this in a second."""
PATIENCE_S = 90.0
"""For loading torch twice on a busy machine; the test ends as soon as it has seen what it waits for."""


def generate_test_description() -> LaunchDescription:
    arguments = {
        "checkpoint": os.environ["SIM_TEST_CHECKPOINT"],
        "task": "touch:red",
        "namespace": NAMESPACE,
    }
    return LaunchDescription(
        [
            # How the nodes end is tested, not how fast a busy machine ends them; launch gives them 5 s.
            SetLaunchConfiguration("sigterm_timeout", "60"),
            IncludeLaunchDescription(str(SIM), launch_arguments=arguments.items()),
            launch_testing.actions.ReadyToTest(),
        ]
    )


class Watcher(Node):
    """Notes what goes over the topics of the launched nodes."""

    def __init__(self) -> None:
        super().__init__("watcher", namespace=NAMESPACE)
        self.trajectory: JointTrajectory | None = None
        self.first: dict[str, float] = {}
        self.moved_rad = 0.0
        self.states: list[str] = []
        self.create_subscription(JointTrajectory, "joint_trajectory", self._on_trajectory, 10)
        self.create_subscription(JointState, "joint_states", self._on_joints, 10)
        self.create_subscription(TransitionEvent, "policy_node/transition_event", self._on_transition, 10)

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self.trajectory = message

    def _on_joints(self, message: JointState) -> None:
        now = dict(zip(message.name, message.position))
        self.first = self.first or now
        arm = [name for name in now if name.startswith("joint_")]
        self.moved_rad = max(self.moved_rad, *(abs(now[name] - self.first[name]) for name in arm))

    def _on_transition(self, message: TransitionEvent) -> None:
        self.states.append(message.goal_state.label)


class TestArmMoves(unittest.TestCase):
    def setUp(self) -> None:
        rclpy.init()
        self.watcher = Watcher()
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.watcher)

    def tearDown(self) -> None:
        self.executor.shutdown()
        self.watcher.destroy_node()
        rclpy.shutdown()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            self.assertLess(time.monotonic(), deadline, f"{what}: not seen within {PATIENCE_S} s")
            self.executor.spin_once(timeout_sec=0.1)

    def test_the_policy_is_activated_and_moves_the_arm(self, proc_output) -> None:
        self.wait_for(lambda: self.watcher.trajectory is not None, "a trajectory on joint_trajectory")
        self.wait_for(lambda: self.watcher.moved_rad > MOVED_RAD, "a joint that moves")
        proc_output.assertWaitFor("configured in", timeout=PATIENCE_S)
        # The transitions before discovery are missed, so nothing is asked of them but that none went wrong.
        self.assertNotIn("errorprocessing", self.watcher.states)
        self.assertEqual(len(self.watcher.trajectory.points[-1].velocities), len(self.watcher.trajectory.joint_names))
        self.assertTrue(all(velocity == 0.0 for velocity in self.watcher.trajectory.points[-1].velocities))


@launch_testing.post_shutdown_test()
class TestAfterShutdown(unittest.TestCase):
    def test_both_nodes_end_cleanly(self, proc_info) -> None:
        launch_testing.asserts.assertExitCodes(proc_info)

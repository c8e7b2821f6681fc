"""Outputs against real action servers of control_msgs, which comes with ROS and is no wheel: skipped without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from graph_fixtures import Graph
from rclpy.action import ActionServer
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import MultiThreadedExecutor
from rclpy.node import Node
from sensor_publisher import publish_sensors

from omega_qvla_core.envs.tabletop import JOINT_NAMES
from omega_qvla_ros import jtc, msgs
from omega_qvla_ros.resources import config_file

control = pytest.importorskip("control_msgs.action", reason="control_msgs is not installed; it comes with ROS only")

ABORT = -4
"""PATH_TOLERANCE_VIOLATED."""


class Servers:
    """Action servers of an arm and a gripper on a thread of their own."""

    def __init__(self, graph: Graph) -> None:
        self.node = Node("servers", context=graph.context)
        self.executor = MultiThreadedExecutor(2, context=graph.context)
        self.executor.add_node(self.node)
        self.goals: list[tuple[str, Any]] = []
        self.abort = threading.Event()
        self.release = threading.Event()
        self._thread = threading.Thread(target=self.executor.spin, daemon=True)
        self._thread.start()

    def serve(self, kind: type, name: str, run: Callable[[Any], Any]) -> None:
        def execute(handle: Any) -> Any:
            self.goals.append((name, handle.request))
            return run(handle)

        ActionServer(self.node, kind, name, execute, callback_group=ReentrantCallbackGroup())

    def follow(self, handle: Any) -> Any:
        if self.abort.is_set():
            handle.abort()
            return control.FollowJointTrajectory.Result(error_code=ABORT, error_string="joint_1 is 0.4 away")
        handle.succeed()
        return control.FollowJointTrajectory.Result()

    def stall(self, handle: Any) -> Any:
        self.release.wait(60.0)
        handle.succeed()
        return control.ParallelGripperCommand.Result()

    def close(self) -> None:
        self.release.set()
        self.executor.shutdown()
        self._thread.join(5.0)
        self.node.destroy_node()


@pytest.fixture
def servers(graph: Graph):
    made = Servers(graph)
    yield made
    made.close()


def contract_with(tmp_path: Path, gripper: str) -> str:
    """The tabletop arm with an action for its arm and another one for its gripper."""
    data = yaml.safe_load(config_file("robots/tabletop.yaml").read_text())
    data["outputs"] = [
        {"type": "follow_joint_trajectory", "name": "arm_controller/follow_joint_trajectory"},
        {"type": gripper, "name": "gripper_controller/gripper_cmd", "joints": ["gripper"], "max_effort": 5.0},
    ]
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def start(graph: Graph, checkpoint: str, contract: str) -> None:
    publish_sensors(graph)
    graph.start_policy(checkpoint=checkpoint, contract=contract, use_sim_time=False, auto_activate=True)


def test_fault_41_aborted_goal_holds_with_its_code_and_the_third_latches(
    graph: Graph, checkpoint: str, servers: Servers, tmp_path: Path
) -> None:
    servers.serve(control.FollowJointTrajectory, "arm_controller/follow_joint_trajectory", servers.follow)
    start(graph, checkpoint, contract_with(tmp_path, "gripper_command"))
    graph.wait(lambda: len(servers.goals) > 3, "goals")
    goal = msgs.trajectory_from_msg(servers.goals[-1][1].trajectory)
    assert goal.joint_names == JOINT_NAMES[:6]
    assert jtc.validate(goal, goal.stamp_ns, JOINT_NAMES[:6]) is None
    graph.wait(lambda: graph.policy().get("state") == "DEGRADED", "a degraded state without the gripper")
    assert "the gripper does not move" in graph.policy()["reasons"]
    servers.abort.set()
    graph.wait_policy("LATCHED", "error code -4 (PATH_TOLERANCE_VIOLATED): joint_1 is 0.4 away")
    assert "3 goals given up by the controller in a row" in graph.policy()["reasons"]
    servers.abort.clear()
    assert graph.trigger("policy_node/reset_fault").success
    count = len(servers.goals)
    graph.wait(lambda: len(servers.goals) > count, "goals after the reset")


@pytest.mark.parametrize("kind", ["gripper_command", "parallel_gripper_command"])
def test_fault_49_gripper_that_never_ends_its_goal_does_not_block_the_arm(
    graph: Graph, checkpoint: str, servers: Servers, tmp_path: Path, kind: str
) -> None:
    servers.serve(control.FollowJointTrajectory, "arm_controller/follow_joint_trajectory", servers.follow)
    action = control.GripperCommand if kind == "gripper_command" else control.ParallelGripperCommand
    servers.serve(action, "gripper_controller/gripper_cmd", servers.stall)
    start(graph, checkpoint, contract_with(tmp_path, kind))
    graph.wait(lambda: any("gripper" in name for name, _ in servers.goals), "a goal of the gripper")
    command = next(request for name, request in servers.goals if "gripper" in name).command
    if kind == "gripper_command":
        position, effort = command.position, command.max_effort
    else:
        assert list(command.name) == ["gripper"]
        position, effort = command.position[0], command.effort[0]
    assert 0.0 <= position <= 0.04 and effort == 5.0
    count = len(servers.goals)
    until_s = time.monotonic() + 2.0
    graph.wait(lambda: time.monotonic() > until_s, "two seconds with a stalled gripper")
    assert len([name for name, _ in servers.goals[count:] if "arm" in name]) >= 2


def test_arm_without_its_action_server_does_not_start(graph: Graph, checkpoint: str, tmp_path: Path) -> None:
    start(graph, checkpoint, contract_with(tmp_path, "gripper_command"))
    graph.wait_policy("HOLD", "no action server 'arm_controller/follow_joint_trajectory'")
    refusal = graph.trigger("policy_node/start")
    assert not refusal.success and "no action server" in refusal.message or "running already" in refusal.message

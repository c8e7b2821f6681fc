"""A ROS graph of real processes for the tests, and a probe in the test's own process that watches and commands it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_ros import msgs
from omega_qvla_ros.process_environment import free_domain_id, ros_environment
from omega_qvla_ros.processes import NodeProcess
from omega_qvla_ros.trajectory import JointTrajectory

DEADLINE_S = 90.0
"""For anything that must happen at all; a loaded machine with two cores is slow to import torch."""
BRIDGE = "omega_qvla_ros.nodes.mujoco_bridge_node"
POLICY = "omega_qvla_ros.nodes.policy_node"
_salts = itertools.count(1)


class Graph:
    """Processes of one domain, and a probe node.

    Args:
        folder: For log files.
        start_process: How a node is started; ``ForkedNode`` does it in a fraction of the time.
    """

    def __init__(self, folder: Path, start_process: type[NodeProcess] = NodeProcess) -> None:
        self.folder = folder
        self.start_process = start_process
        self.domain_id = free_domain_id(next(_salts))
        self.environment = ros_environment(self.domain_id, threads=1)
        self.processes: list[NodeProcess] = []
        self.context = Context()
        rclpy.init(context=self.context, args=[], domain_id=self.domain_id)
        self.node = Node("probe", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.joints: dict[str, float] = {}
        self.velocities: dict[str, float] = {}
        self.clock_ns: list[int] = []
        self.commands: list[tuple[float, JointTrajectory]] = []
        self.results: list[dict[str, Any]] = []
        self.diagnostics: dict[str, tuple[str, dict[str, str]]] = {}
        reliable = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        self.node.create_subscription(JointState, "joint_states", self._on_joints, qos_profile_sensor_data)
        self.node.create_subscription(Clock, "/clock", self._on_clock, qos_profile_sensor_data)
        self.command_subscription = self.node.create_subscription(
            JointTrajectoryMsg, "joint_trajectory", self._on_command, reliable
        )
        self.node.create_subscription(String, "episode_result", self._on_result, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_joints(self, message: JointState) -> None:
        self.joints = msgs.joint_positions_by_name(message)
        self.velocities = msgs.joint_velocities_by_name(message)

    def _on_clock(self, message: Clock) -> None:
        self.clock_ns.append(msgs.stamp_to_ns(message.clock))

    def _on_command(self, message: JointTrajectoryMsg) -> None:
        self.commands.append((time.monotonic(), msgs.trajectory_from_msg(message)))

    def _on_result(self, message: String) -> None:
        self.results.append(json.loads(message.data))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            self.diagnostics[status.name.split(":")[0]] = (status.message, values)

    # Processes.

    def start(
        self, module: str, parameters: dict[str, object], remappings: dict[str, str] | None = None
    ) -> NodeProcess:
        log = self.folder / f"{len(self.processes)}_{module.rsplit('.', 1)[-1]}.log"
        self.processes.append(self.start_process(module, self.environment, log, parameters, remappings))
        return self.processes[-1]

    def start_bridge(self, **parameters: object) -> NodeProcess:
        return self.start(BRIDGE, parameters)

    def start_policy(self, remappings: dict[str, str] | None = None, **parameters: object) -> NodeProcess:
        values = {"use_sim_time": True, "inference_threads": 1, "instruction": "touch the red cube", **parameters}
        return self.start(POLICY, values, remappings)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.stop()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)

    def logs(self) -> str:
        return "\n".join(f"--- {p.log.name}\n{p.log_text()}" for p in self.processes)

    # Waiting.

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Spin until ``condition``; fails with every process' log."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"waited {timeout_s:.0f} s for: {what}\n{self.diagnostics}\n{self.logs()}")
            self.executor.spin_once(timeout_sec=0.05)

    def spin(self, seconds: float) -> None:
        """Spin for a span of wall time."""
        until_s = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= until_s, "time", seconds + DEADLINE_S)

    def spin_sim(self, duration_s: float) -> None:
        """Spin for a span of simulated time."""
        self.wait(lambda: self.clock_ns, "/clock")
        until_ns = self.clock_ns[-1] + int(duration_s * 1e9)
        self.wait(lambda: self.clock_ns[-1] >= until_ns, f"{duration_s} s of simulated time")

    def wait_policy(self, state: str, what: str = "") -> None:
        """Wait for a safety state in the policy node's diagnostics."""
        self.wait(
            lambda: self.policy().get("state") == state and what in self.policy().get("reasons", ""),
            f"policy state {state} {what}",
        )

    def policy(self) -> dict[str, str]:
        return self.diagnostics.get("policy_node", ("", {}))[1]

    def bridge(self) -> dict[str, str]:
        return self.diagnostics.get("mujoco_bridge_node", ("", {}))[1]

    def fresh_bridge(self) -> dict[str, str]:
        """The bridge's report from after this call."""
        self.diagnostics.pop("mujoco_bridge_node", None)
        self.wait(self.bridge, "a report of the bridge")
        return self.bridge()

    # Asking.

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        self.wait(client.service_is_ready, f"service {name}")
        future = client.call_async(request)
        self.wait(future.done, f"answer of {name}")
        self.node.destroy_client(client)
        return future.result()

    def trigger(self, name: str) -> Trigger.Response:
        return self.call(Trigger, name, Trigger.Request())

    def set_parameter(self, node: str, name: str, value: object) -> Any:
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def transition(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call(ChangeState, "policy_node/change_state", request).success)

    def lifecycle(self) -> str:
        return self.call(GetState, "policy_node/get_state", GetState.Request()).current_state.label

    def arm(self) -> np.ndarray:
        """Positions of the six arm joints."""
        return np.array([self.joints[f"joint_{k}"] for k in range(1, 7)])

    def arm_speed(self) -> float:
        return max(abs(self.velocities[f"joint_{k}"]) for k in range(1, 7))

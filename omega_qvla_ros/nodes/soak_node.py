"""Between a simulated robot and the policy node: relays the sensors with faults, operates the node, watches commands.

The bridge publishes as always; the policy node listens to ``soak/<topic>``, which this node fills. Everything runs on
one thread, in ``spin_for`` and while a service is waited for.
"""

from __future__ import annotations

import array
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_core.errors import OmegaQVLAError
from omega_qvla_ros import msgs
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.nodes import qos
from omega_qvla_ros.soak.report import reason_kind
from omega_qvla_ros.soak.watch import CommandWatch
from omega_qvla_ros.splines import nanoseconds

RELAYED = "soak/"
"""Prefix of the topics that the policy node listens to instead of the robot's own."""
SERVICE_TIMEOUT_S = 30.0
BURST_HZ = 60.0
FUTURE_S = 1.0
POLICY, BRIDGE = "policy_node", "mujoco_bridge_node"
COMMANDS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
STATUS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
STOPPED = ("HOLD", "LATCHED")


class SoakError(OmegaQVLAError):
    """A node of the soak does not answer."""


@dataclass
class Relay:
    """What is done to a stream at the moment; the fault's name, or nothing."""

    fault: str = ""
    held_back: Any = None
    sent_ns: int = 0
    newest: Any = None
    faults: Counter[str] = field(default_factory=Counter)


class SoakNode(Node):
    """See the module's text.

    Args:
        contract: The robot; its cameras and joints are relayed, its limits are watched.
        failure: Says what became of the nodes' processes, None while they run.
        kwargs: For ``rclpy.node.Node``.
    """

    def __init__(self, contract: RobotContract, failure: Callable[[], str | None], **kwargs: Any) -> None:
        super().__init__("soak_node", **kwargs)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self)
        self._failure = failure
        self.watch = CommandWatch(contract)
        self.time_ns = 0
        self.status: dict[str, str] = {}
        self.report: dict[str, str] = {}
        """The policy node's part of ``/diagnostics``: every counter."""
        self.bridge: dict[str, str] = {}
        self.results: list[dict[str, Any]] = []
        self.holds: Counter[str] = Counter()
        self.latches: Counter[str] = Counter()
        self.moving_s = time.monotonic()
        """Steady time at which the arm was last allowed to move."""
        self._state = ""
        self._measured_ns = 0
        self._joints_timeout_ns = nanoseconds(contract.sensors.joint_states_timeout_s)
        self.streams = {camera.key: Relay() for camera in contract.cameras}
        self.joints = Relay()
        self.burst = False
        self._relay(contract)
        self.create_subscription(Clock, "/clock", self._on_clock, qos.CLOCK)
        self.create_subscription(JointTrajectoryMsg, contract.outputs[0].name, self._on_command, COMMANDS)
        self.create_subscription(DiagnosticStatus, f"{POLICY}/status", self._on_status, STATUS)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.create_subscription(String, "episode_result", self._on_result, qos.RESULT)
        self._e_stop = self.create_publisher(Bool, f"{POLICY}/e_stop", STATUS)
        self._service_clients: dict[str, Any] = {}

    def _relay(self, contract: RobotContract) -> None:
        for camera in contract.cameras:
            relay = self.streams[camera.key]
            publisher = self.create_publisher(Image, RELAYED + camera.topic, qos_profile_sensor_data)
            self.create_subscription(
                Image, camera.topic, lambda m, r=relay, p=publisher: self._on_image(r, p, m), qos.IMAGE
            )
            self.create_timer(1.0 / BURST_HZ, lambda r=relay, p=publisher: self._burst(r, p))
        topic = contract.sensors.joint_states_topic
        self._joint_publisher = self.create_publisher(JointState, RELAYED + topic, qos_profile_sensor_data)
        self.create_subscription(JointState, topic, self._on_joints, qos.JOINT_STATE)

    # Sensors.

    def _on_image(self, relay: Relay, publisher: Any, message: Image) -> None:
        relay.newest = message
        if relay.fault == "camera_drop":
            return
        if relay.fault == "camera_reorder":
            relay.held_back, message = message, relay.held_back
            if message is None:
                return
            publisher.publish(relay.held_back)
        elif relay.fault == "camera_freeze":
            relay.held_back = relay.held_back or message
            message = relay.held_back
        elif relay.fault == "camera_corrupt":
            message = _spoiled(message)
        elif relay.fault == "camera_future":
            message.header.stamp = msgs.ns_to_stamp(self.time_ns + int(FUTURE_S * 1e9))
        elif relay.fault == "camera_black":
            message.data = array.array("B", bytes(len(message.data)))
        relay.sent_ns = msgs.stamp_to_ns(message.header.stamp)
        publisher.publish(message)

    def _burst(self, relay: Relay, publisher: Any) -> None:
        if not self.burst or relay.newest is None or relay.fault or self.time_ns <= relay.sent_ns:
            return
        relay.newest.header.stamp = msgs.ns_to_stamp(self.time_ns)
        relay.sent_ns = self.time_ns
        publisher.publish(relay.newest)

    def _on_joints(self, message: JointState) -> None:
        self._measured_ns = msgs.stamp_to_ns(message.header.stamp)
        if self.joints.fault == "joints_drop":
            return
        if self.joints.fault == "joints_nan":
            message.position[0] = float("nan")
        if self.joints.fault == "joints_split":
            middle = len(message.name) // 2
            for part in (slice(middle, None), slice(None, middle)):
                half = JointState(header=message.header, name=message.name[part], position=message.position[part])
                self._joint_publisher.publish(half)
            return
        self._joint_publisher.publish(message)

    # What is watched.

    def _on_clock(self, message: Clock) -> None:
        self.time_ns = msgs.stamp_to_ns(message.clock)

    def _on_command(self, message: JointTrajectoryMsg) -> None:
        trajectory = msgs.trajectory_from_msg(message)
        # Whether it came too late is the bridge's to judge, whose clock it is; this node may be late itself.
        now_ns = min(self.time_ns, trajectory.end_ns) if trajectory.stamp_ns and trajectory.points else self.time_ns
        self.watch.trajectory(trajectory, now_ns)

    def _on_status(self, message: DiagnosticStatus) -> None:
        self.status = {pair.key: pair.value for pair in message.values}
        state = self.status.get("state", "")
        if state not in STOPPED:
            self.moving_s = time.monotonic()
        if state in STOPPED and state != self._state:
            counter = self.holds if state == "HOLD" else self.latches
            counter[reason_kind(self.status.get("reasons", ""))] += 1
        self._state = state

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {pair.key: pair.value for pair in status.values}
            if status.name.startswith(BRIDGE):
                self.bridge = values
            elif status.name.startswith(POLICY):
                self.report = values

    def _on_result(self, message: String) -> None:
        self.results.append(json.loads(message.data))

    # What an operator does.

    def spin_for(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let everything go on for a while of wall time, or until a condition holds (then True).

        Raises:
            SoakError: A process has ended.
        """
        deadline_s = time.monotonic() + seconds
        while not until():
            failure = self._failure()
            if failure is not None:
                raise SoakError(failure)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0:
                return False
            self._executor.spin_once(timeout_sec=min(left_s, 0.1))
        return True

    def call(self, kind: type, name: str, request: Any) -> Any:
        """Call a service and wait.

        Raises:
            SoakError: It does not answer.
        """
        if name not in self._service_clients:
            self._service_clients[name] = self.create_client(kind, name)
        client = self._service_clients[name]
        if self.spin_for(SERVICE_TIMEOUT_S, client.service_is_ready):
            future = client.call_async(request)
            if self.spin_for(SERVICE_TIMEOUT_S, future.done):
                return future.result()
        raise SoakError(f"service {name!r} does not answer")

    def trigger(self, name: str) -> bool:
        """Call a trigger of the policy node."""
        return bool(self.call(Trigger, f"{POLICY}/{name}", Trigger.Request()).success)

    def enable(self, enabled: bool) -> bool:
        """``~/enable`` of the policy node."""
        return bool(self.call(SetBool, f"{POLICY}/enable", SetBool.Request(data=enabled)).success)

    def transition(self, label: str) -> bool:
        """A lifecycle transition of the policy node."""
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call(ChangeState, f"{POLICY}/change_state", request).success)

    def set_parameters(self, node: str, **values: object) -> None:
        """Set parameters; a refusal is an error of the soak."""
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        for result in self.call(SetParameters, f"{node}/set_parameters", request).results:
            if not result.successful:
                raise SoakError(result.reason)

    def press(self, pressed: bool) -> None:
        """The emergency stop."""
        self._e_stop.publish(Bool(data=pressed))

    def reset_robot(self, seed: int, task: str) -> str:
        """Begin an episode; returns its instruction."""
        self.set_parameters(BRIDGE, seed=seed, task=task)
        response = self.call(Trigger, f"{BRIDGE}/reset", Trigger.Request())
        if not response.success:
            raise SoakError(response.message)
        episode = json.loads(response.message)
        reset_ns = int(episode["time_ns"])
        # On a busy machine this node is behind: joint states of the old pose, relayed later, would make the next motion
        # begin there. What the policy node has of them is stale after the timeout.
        if not self.spin_for(SERVICE_TIMEOUT_S, lambda: self._measured_ns > reset_ns + self._joints_timeout_ns):
            raise SoakError("no joint states come after a reset")
        return str(episode["instruction"])


@contextmanager
def running_soak_node(contract: RobotContract, failure: Callable[[], str | None]) -> Iterator[SoakNode]:
    """A soak node in a context of its own; the process must be in the graph's environment."""
    context = Context()
    rclpy.init(context=context, args=[])
    node = SoakNode(contract, failure, context=context)
    try:
        yield node
    finally:
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def _spoiled(message: Image) -> Image:
    """Half of the data is missing."""
    return Image(
        header=message.header,
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        step=message.step,
        data=message.data[: len(message.data) // 2],
    )

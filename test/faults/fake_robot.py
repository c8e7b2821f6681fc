"""A robot in the test's own process: joint states, two cameras and a controller, each of which can be spoiled.

It has a ROS context and a thread of its own, so that it goes on while the test waits for something.
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_core.envs.tabletop import JOINT_NAMES
from omega_qvla_ros import msgs
from omega_qvla_ros.jtc import TrajectoryExecutor
from omega_qvla_ros.trajectory import JointTrajectory

CAMERA_HZ, JOINT_HZ = 20.0, 50.0
SIZE_PX = 64
SIMULATION_START_NS = 1_000_000_000_000
START = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02)
STATUS = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@dataclass
class CameraFaults:
    """What is wrong with a camera; the defaults are a good one."""

    silent: bool = False
    same_stamp: bool = False
    same_bytes: bool = False
    stamp_offset_s: float = 0.0


@dataclass
class JointFaults:
    """What is wrong with the joint states."""

    silent: bool = False
    missing: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Received:
    """A command with the time of its arrival, steady and ROS time, and what the controller said about it."""

    at_s: float
    at_ns: int
    trajectory: JointTrajectory
    refused: str | None


@dataclass(frozen=True)
class Reported:
    """A status message of the policy node with the time of its arrival."""

    at_s: float
    message: str
    values: dict[str, str] = field(repr=False)

    @property
    def state(self) -> str:
        return self.values.get("state", "")

    @property
    def reasons(self) -> str:
        return self.values.get("reasons", "")


class FakeRobot:
    """The tabletop arm without physics: it is where its controller wants it to be.

    Args:
        domain_id: ``ROS_DOMAIN_ID`` of the graph.
        namespace: Of every topic.
        policy: Name of the policy node, relative to the namespace.
        joints: Joints of the controller; the others stand.
        simulated: Publish ``/clock`` and stamp with it; ``paused`` stops it and the sensors, as a simulator does.
    """

    def __init__(
        self,
        domain_id: int,
        namespace: str = "",
        policy: str = "policy_node",
        joints: Sequence[str] = JOINT_NAMES,
        simulated: bool = False,
    ) -> None:
        self._time_ns = SIMULATION_START_NS if simulated else None
        self.paused = False
        self.inactive = False
        """The controller hears commands and ignores them."""
        self.context = Context()
        rclpy.init(context=self.context, args=[], domain_id=domain_id)
        self.node = Node("fake_robot", context=self.context, namespace=namespace or None)
        self.front, self.wrist, self.joints = CameraFaults(), CameraFaults(), JointFaults()
        self.commands: list[Received] = []
        self.statuses: list[Reported] = []
        self.reports: list[Reported] = []
        """The policy node's part of ``/diagnostics``, once per second, with every counter."""
        self.last_sent: dict[str, float] = {}
        """Stream -> steady time of its last message."""
        self._executor = TrajectoryExecutor(joints)
        self._driven = [JOINT_NAMES.index(name) for name in joints]
        self._position, self._velocity = np.array(START), np.zeros(len(START))
        self._executor.hold(self._position[self._driven])
        self._accepting = threading.Lock()
        self._frames = 0
        self._stamps: dict[str, int] = {}
        cameras = {key: self._publisher(Image, f"{key}/image_raw") for key in ("front", "wrist")}
        states = self._publisher(JointState, "joint_states")
        self._command_subscription = None
        self.connect_controller()
        self.node.create_subscription(DiagnosticStatus, f"{policy}/status", self._on_status, STATUS)
        self._reporter = f"{namespace}/{policy}".lstrip("/")
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.node.create_timer(1.0 / CAMERA_HZ, lambda: self._send_images(cameras))
        self.node.create_timer(1.0 / JOINT_HZ, lambda: self._send_joints(states))
        if simulated:
            clock = self.node.create_publisher(Clock, "/clock", 10)
            self.node.create_timer(1.0 / JOINT_HZ, lambda: self._advance(clock))
        self._spinner = SingleThreadedExecutor(context=self.context)
        self._spinner.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, name="robot", daemon=True)
        self._thread.start()

    def _publisher(self, kind: type, topic: str) -> Publisher:
        return self.node.create_publisher(kind, topic, qos_profile_sensor_data)

    def _spin(self) -> None:
        try:
            self._spinner.spin()
        except ExternalShutdownException:
            pass

    def close(self) -> None:
        self._spinner.shutdown()
        self._thread.join(5.0)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self.context)

    # Faults.

    def mend(self) -> None:
        """A good robot again."""
        self.inactive = False
        self.front, self.wrist, self.joints = CameraFaults(), CameraFaults(), JointFaults()
        self.connect_controller()

    def connect_controller(self) -> None:
        """The controller listens to the command topic."""
        if self._command_subscription is None:
            reliable = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
            self._command_subscription = self.node.create_subscription(
                JointTrajectoryMsg, "joint_trajectory", self._on_command, reliable
            )

    def disconnect_controller(self) -> None:
        """The controller is gone; the arm stands where it is."""
        subscription, self._command_subscription = self._command_subscription, None
        if subscription is not None:
            self.node.destroy_subscription(subscription)
        self._executor.hold(self._position[self._driven])

    # What it is and was.

    @property
    def now_ns(self) -> int:
        return self.node.get_clock().now().nanoseconds if self._time_ns is None else self._time_ns

    def jump(self, seconds: float) -> None:
        """Set the simulated clock forward or back."""
        assert self._time_ns is not None
        self._time_ns += int(seconds * 1e9)

    @property
    def arm(self) -> np.ndarray:
        """Position of the six arm joints."""
        return self._position[:6].copy()

    @property
    def speed(self) -> float:
        """Highest speed of an arm joint now, rad/s."""
        return float(np.abs(self._velocity[:6]).max())

    @property
    def refused(self) -> list[str]:
        """Why the controller refused commands; must stay empty.

        A message that a busy machine delivers after its end is left out: its sender could not have known.
        """
        return [c.refused for c in self.commands if c.refused is not None and "in the past" not in c.refused]

    @property
    def state(self) -> str:
        return self.statuses[-1].state if self.statuses else ""

    @property
    def reasons(self) -> str:
        return self.statuses[-1].reasons if self.statuses else ""

    def first(self, condition: Callable[[Reported], bool], since_s: float) -> Reported | None:
        """First status after a steady time that fulfils a condition."""
        return next((status for status in self.statuses if status.at_s >= since_s and condition(status)), None)

    # Callbacks, on the robot's thread.

    def _advance(self, clock: Publisher) -> None:
        assert self._time_ns is not None
        if not self.paused:
            self._time_ns += int(1e9 / JOINT_HZ)
            clock.publish(Clock(clock=msgs.ns_to_stamp(self._time_ns)))

    def _send_images(self, cameras: dict[str, Publisher]) -> None:
        self._frames += 1
        for key, publisher in cameras.items():
            faults: CameraFaults = getattr(self, key)
            if faults.silent or self.paused:
                continue
            if not faults.same_stamp or key not in self._stamps:
                self._stamps[key] = self.now_ns + int(faults.stamp_offset_s * 1e9)
            picture = 1 if faults.same_bytes else self._frames
            data = array.array("B", bytes([50 + picture % 199]) * (SIZE_PX * SIZE_PX * 3))
            stamp = msgs.ns_to_stamp(self._stamps[key])
            message = Image(height=SIZE_PX, width=SIZE_PX, encoding="rgb8", step=3 * SIZE_PX, data=data)
            message.header.stamp = stamp
            publisher.publish(message)
            if not faults.same_stamp:
                self.last_sent[key] = time.monotonic()

    def _send_joints(self, publisher: Publisher) -> None:
        now_ns = self.now_ns
        with self._accepting:
            moved = self._executor.sample(now_ns, self._position[self._driven], self._velocity[self._driven])
        position, velocity = self._position.copy(), self._velocity.copy()
        position[self._driven], velocity[self._driven] = moved
        self._position, self._velocity = position, velocity
        faults = self.joints
        if faults.silent or self.paused:
            return
        names = [name for name in JOINT_NAMES if name not in faults.missing]
        values = dict(zip(JOINT_NAMES, self._position))
        values.update(dict.fromkeys(faults.not_finite, float("nan")))
        message = msgs.joint_state(names, np.array([values[name] for name in names]), np.empty(0), now_ns)
        publisher.publish(message)
        if not faults.not_finite:
            self.last_sent["joints"] = time.monotonic()

    def _on_command(self, message: JointTrajectoryMsg) -> None:
        self.accept(msgs.trajectory_from_msg(message))

    def accept(self, trajectory: JointTrajectory) -> None:
        """Give the controller a trajectory, as a message or from an action's goal; callable from any thread."""
        now_ns, refused = self.now_ns, None
        with self._accepting:
            if not self.inactive:
                refused = self._executor.accept(trajectory, now_ns)
        self.commands.append(Received(time.monotonic(), now_ns, trajectory, refused))

    def _on_status(self, message: DiagnosticStatus) -> None:
        values = {pair.key: pair.value for pair in message.values}
        self.statuses.append(Reported(time.monotonic(), message.message, values))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.partition(":")[0] == self._reporter:
                values = {pair.key: pair.value for pair in status.values}
                self.reports.append(Reported(time.monotonic(), status.message, values))

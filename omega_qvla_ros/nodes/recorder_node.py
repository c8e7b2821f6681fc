"""``recorder_node``: records a robot's cameras, joints, commands, instruction and status into a bag.

Subscribes the contract's topics and those of the policy node, serialized; publishes ``/diagnostics``; serves
``~/start`` and ``~/stop`` (std_srvs/Trigger). Its own process: whatever happens to the disk, the arm does not notice.

Threads: callbacks hand messages over and wait for nothing; one thread of the recorder writes (``bags/recorder.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from omega_qvla_core.errors import ConfigError, RecordingError
from omega_qvla_ros.bags.recorder import BagRecorder, RecorderState
from omega_qvla_ros.bags.topics import recorded_topics
from omega_qvla_ros.bags.writer import RecordedTopic
from omega_qvla_ros.contract import load_contract
from omega_qvla_ros.nodes import diagnostics, parameters, process
from omega_qvla_ros.resources import resolve_contract

MESSAGES = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/JointState": JointState,
    "trajectory_msgs/msg/JointTrajectory": JointTrajectory,
    "std_msgs/msg/String": String,
    "std_msgs/msg/Float64MultiArray": Float64MultiArray,
    "diagnostic_msgs/msg/DiagnosticStatus": DiagnosticStatus,
    "diagnostic_msgs/msg/DiagnosticArray": DiagnosticArray,
}
DIAGNOSTICS_PERIOD_S = 1.0
DEPTH = 50
"""Messages that wait in the middleware while the executor is busy: half a second of joint states at 100 Hz."""
SPIN_S = 0.2
"""Longest time after which a signal is noticed."""
MEGABYTE = 1_000_000


class RecorderNode(Node):
    """See the module's text; parameters with their comments: ``config/recorder_node.yaml``."""

    def __init__(self, node_name: str = "recorder_node", **kwargs: object) -> None:
        super().__init__(node_name, **kwargs)
        for message in parameters.declare(self, parameters.RECORDER_NODE):
            raise ConfigError(message)
        self._contract = load_contract(resolve_contract(str(self._value("contract"))))
        self._recorder: BagRecorder | None = None
        self._clock_stands = 0
        self._topics = [
            replace(topic, name=self.resolve_topic_name(topic.name))
            for topic in recorded_topics(self._contract, str(self._value("policy_node")))
        ]
        for index, topic in enumerate(self._topics):
            self.create_subscription(
                MESSAGES[topic.msgtype], topic.name, self._taker(index), subscription_qos(topic), raw=True
            )
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock: the report must come even when simulated time stands.
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_service(Trigger, "~/start", lambda _, response: self._answer(response, self.start))
        self.create_service(Trigger, "~/stop", lambda _, response: self._answer(response, self.stop))
        if self._value("record_on_start"):
            self.get_logger().info(self.start())

    def _value(self, name: str) -> parameters.Value:
        return parameters.value(self, name)

    def _taker(self, index: int) -> Callable[[bytes], None]:
        def take(data: bytes) -> None:
            now_ns = self.get_clock().now().nanoseconds
            if now_ns == 0:  # simulated time has not begun
                self._clock_stands += 1
            elif self._recorder is not None:
                self._recorder.put(index, now_ns, data)

        return take

    def start(self) -> str:
        """Begin a new bag; says where.

        Raises:
            RecordingError: One is being recorded, or the bag cannot be made.
        """
        if self._recorder is not None and self._recorder.state is RecorderState.RECORDING:
            raise RecordingError(f"recording into {self._recorder.folder} already; ~/stop ends it")
        folder = self._new_folder()
        self._recorder = BagRecorder(
            folder,
            self._topics,
            str(self._value("storage")),
            max_queued_bytes=int(self._value("max_queued_mb")) * MEGABYTE,
            min_free_bytes=int(self._value("min_free_mb")) * MEGABYTE,
        )
        return f"recording {len(self._topics)} topics into {folder}"

    def stop(self) -> str:
        """End the bag; says what is in it.

        Raises:
            RecordingError: Nothing is being recorded.
        """
        if self._recorder is None or self._recorder.state is not RecorderState.RECORDING:
            raise RecordingError("nothing is being recorded; ~/start begins a new bag")
        self._recorder.close()
        return f"{sum(self._recorder.written.values())} messages are in {self._recorder.folder}"

    def close(self) -> None:
        """End the bag if there is one."""
        if self._recorder is not None:
            self._recorder.close()

    def _new_folder(self) -> Path:
        name = str(self._value("bag")) or f"{self._contract.name}_{datetime.now().astimezone():%Y%m%d_%H%M%S}"
        base = Path(name).expanduser()
        folder, number = base, 1
        while folder.exists():
            folder = base.with_name(f"{base.name}_{number}")
            number += 1
        return folder

    def _answer(self, response: Trigger.Response, action: Callable[[], str]) -> Trigger.Response:
        try:
            response.success, response.message = True, action()
        except RecordingError as error:
            response.success, response.message = False, str(error)
        return response

    def _report(self) -> None:
        recorder = self._recorder
        state = RecorderState.STOPPED if recorder is None else recorder.state
        values: dict[str, object] = {"state": state.value}
        message, level = state.value, DiagnosticStatus.OK
        if recorder is not None:
            dropped = sum(recorder.dropped.values())
            values |= {
                "bag": recorder.folder,
                "reason": recorder.reason,
                "messages_written": sum(recorder.written.values()),
                "bytes_written": recorder.written_bytes,
                "queued_bytes": recorder.queued_bytes,
                "messages_dropped": dropped,
                **{f"written.{topic}": count for topic, count in recorder.written.items()},
                **{f"dropped.{topic}": count for topic, count in recorder.dropped.items()},
            }
            if state is RecorderState.DEGRADED:
                message, level = f"DEGRADED: {recorder.reason}", DiagnosticStatus.WARN
            elif dropped:
                message, level = f"{dropped} messages dropped: the disk is too slow", DiagnosticStatus.WARN
        if self._clock_stands:
            values["before_the_clock"] = self._clock_stands
        name = self.get_fully_qualified_name().lstrip("/")
        status = diagnostics.status(f"{name}: recording", self._contract.name, level, message, values)
        self._diagnostics.publish(diagnostics.array(self.get_clock().now().nanoseconds, status))


def subscription_qos(topic: RecordedTopic) -> QoSProfile:
    """What hears every publisher of a topic: best effort for sensors, and late joiners get what is kept for them."""
    return QoSProfile(
        reliability=ReliabilityPolicy.RELIABLE if topic.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if topic.transient_local else DurabilityPolicy.VOLATILE,
        history=HistoryPolicy.KEEP_LAST,
        depth=DEPTH,
    )


def main(args: list[str] | None = None) -> None:
    """Record until SIGINT or SIGTERM, then close the bag and exit with 0."""
    node, stopping = process.start(args, "recorder_node", RecorderNode)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stopping and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        node.close()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()

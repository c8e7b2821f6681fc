"""Messages and bags of the toy robot for the tests: real ROS messages, serialized by ROS, written by the recorder."""

from __future__ import annotations

import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.serialization import serialize_message
from robot_fixtures import PERIOD_NS, T0, toy_contract
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from omega_qvla_ros import image_decoding, msgs
from omega_qvla_ros.bags.topics import recorded_topics
from omega_qvla_ros.bags.writer import BagWriter, RecordedTopic
from omega_qvla_ros.contract import RobotContract

SIZE_PX = 64
TOLD = "touch the red cube"


def padded_image(stamp_ns: int, encoding: str, pad: int, seed: int, size_px: int = SIZE_PX) -> Image:
    """A random image in some encoding, with ``pad`` bytes behind every row."""
    row = size_px * image_decoding.CHANNELS[encoding]
    data = np.random.default_rng(seed).integers(0, 256, (size_px, row + pad), dtype=np.uint8)
    return Image(
        header=msgs.header(stamp_ns, "camera"),
        height=size_px,
        width=size_px,
        encoding=encoding,
        step=row + pad,
        data=array.array("B", data.tobytes()),
    )


def joints(stamp_ns: int, shoulder: float, finger: float = 0.02) -> JointState:
    """The toy robot's joints, in the other order and with one that is not the contract's."""
    names, positions = ["finger", "wheel", "shoulder"], np.array([finger, 9.0, shoulder])
    return msgs.joint_state(names, positions, np.zeros(3), stamp_ns)


def told(instruction: str) -> DiagnosticStatus:
    """What the policy node says on ~/status."""
    return DiagnosticStatus(name="policy_node: status", values=[KeyValue(key="instruction", value=instruction)])


def episode(periods: int, instruction: str = TOLD) -> list[tuple[str, int, Any]]:
    """Topic, receive time and message of some periods of the toy robot, in the order in which they arrive."""
    encodings = ("rgb8", "bgr8", "mono8", "rgba8", "bgra8")
    found: list[tuple[str, int, Any]] = [("/policy_node/status", T0, told(instruction))]
    for k in range(periods):
        stamp_ns = T0 + k * PERIOD_NS
        found += [
            ("/joint_states", stamp_ns + 1_000_000, joints(stamp_ns, 0.01 * k)),
            ("/front/image_raw", stamp_ns + 5_000_000, padded_image(stamp_ns, encodings[k % 5], k % 3, 2 * k)),
            ("/wrist/image_raw", stamp_ns + 9_000_000, padded_image(stamp_ns, encodings[(k + 2) % 5], 0, 2 * k + 1)),
        ]
    return found


def toy_topics(contract: RobotContract | None = None) -> list[RecordedTopic]:
    """What the recorder records of the toy robot, in the root namespace."""
    found = recorded_topics(contract or toy_contract())
    return [RecordedTopic("/" + t.name.lstrip("/"), t.msgtype, t.reliable, t.transient_local) for t in found]


def write_bag(
    folder: Path,
    messages: Sequence[tuple[str, int, Any]],
    storage: str = "mcap",
    prefix: str = "",
    log_offset_ns: int = 0,
    contract: RobotContract | None = None,
) -> Path:
    """Write messages as a bag; ``prefix`` is a namespace, ``log_offset_ns`` moves the receive times."""
    topics = toy_topics(contract)
    index = {topic.name: number for number, topic in enumerate(topics)}
    names = [RecordedTopic(prefix + topic.name, topic.msgtype, topic.reliable) for topic in topics]
    writer = BagWriter(folder, names, storage)
    for topic, log_ns, message in messages:
        writer.write(index[topic], log_ns + log_offset_ns, serialize_message(message))
    writer.close()
    return folder


def string(text: str) -> String:
    """A string message."""
    return String(data=text)

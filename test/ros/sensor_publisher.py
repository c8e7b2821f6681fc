"""Cameras and joint states from the probe of a test graph."""

from __future__ import annotations

from collections.abc import Callable

from builtin_interfaces.msg import Time
from graph_fixtures import Graph
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

from omega_qvla_core.envs.tabletop import JOINT_NAMES


def publish_sensors(
    graph: Graph,
    change: Callable[[JointState, Image], None] = lambda state, image: None,
    now: Callable[[], Time] | None = None,
) -> None:
    """Both cameras and all joints at 20 Hz from the probe; ``change`` may spoil each pair of messages."""
    node = graph.node
    cameras = [node.create_publisher(Image, f"{key}/image_raw", qos_profile_sensor_data) for key in ("front", "wrist")]
    joints = node.create_publisher(JointState, "joint_states", qos_profile_sensor_data)

    def tick() -> None:
        state = JointState(name=list(JOINT_NAMES), position=[0.02] * 7)
        image = Image(height=128, width=128, encoding="rgb8", step=384, data=bytes(128 * 384))
        state.header.stamp = image.header.stamp = now() if now else node.get_clock().now().to_msg()
        change(state, image)
        joints.publish(state)
        for camera in cameras:
            camera.publish(image)

    node.create_timer(0.05, tick)

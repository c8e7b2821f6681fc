"""The subscriptions of a configured policy node: cameras, raw or compressed, and joint states.

Callbacks check a header and store a message; decoding is the work of other threads. A driver that offers something else
can be met with the usual parameters ``qos_overrides.<topic>.subscription.<history|depth|reliability>``.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image, JointState

from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.intake import Intake
from omega_qvla_ros.nodes import qos


class SensorInputs:
    """Subscriptions of one robot's sensors.

    Args:
        node: Their owner.
        contract: Topics and transports.
        intake: Where messages go.
        now: The node's time in ns; 0 while simulated time has not begun.
        on_image: Called after an image came in.
        on_incompatible: Told of publishers whose quality of service does not fit.
    """

    def __init__(
        self,
        node: Node,
        contract: RobotContract,
        intake: Intake,
        now: Callable[[], int],
        on_image: Callable[[int], None],
        on_incompatible: qos.OnIncompatible,
    ) -> None:
        self._node = node
        self._intake = intake
        self._now = now
        self._on_image = on_image
        self._subscriptions = []
        for camera in contract.cameras:
            kind = CompressedImage if camera.transport == "compressed" else Image
            self._subscriptions.append(
                node.create_subscription(
                    kind,
                    camera.topic,
                    lambda message, key=camera.key: self._image(key, message),
                    qos.own(qos.IMAGE),
                    event_callbacks=qos.subscription_events(camera.topic, on_incompatible),
                    qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                )
            )
        for topic in contract.sensors.joint_topics:
            self._subscriptions.append(
                node.create_subscription(
                    JointState,
                    topic,
                    lambda message, topic=topic: self._joint_states(topic, message),
                    qos.own(qos.JOINT_STATE),
                    event_callbacks=qos.subscription_events(topic, on_incompatible),
                    qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                )
            )

    def _image(self, key: str, message: Image | CompressedImage) -> None:
        now_ns = self._now()
        if now_ns:
            self._intake.on_image(key, message, now_ns)
            self._on_image(now_ns)

    def _joint_states(self, topic: str, message: JointState) -> None:
        now_ns = self._now()
        if now_ns:
            self._intake.on_joint_states(message, now_ns, topic)

    def destroy(self) -> None:
        """Free the subscriptions and end the decoding thread."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._intake.close()

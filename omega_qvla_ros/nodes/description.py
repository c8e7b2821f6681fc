"""``robot_description``: the URDF on its latched topic, for limits and for pictures."""

from __future__ import annotations

from rclpy.node import Node
from rclpy.wait_for_message import wait_for_message
from std_msgs.msg import String

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract import RobotContract, limits_from_urdf, with_urdf_limits
from omega_qvla_ros.nodes import qos
from omega_qvla_ros.nodes.parameters import value


def with_description(node: Node, contract: RobotContract) -> tuple[RobotContract, str | None]:
    """A contract completed and checked by the robot's URDF, where it asks for one.

    Waits in ``configure``, with a wait set of its own: the executor is busy with the transition.

    Args:
        node: Asks for the topic.
        contract: As read from its file.

    Returns:
        The contract with limits that are nowhere looser than the URDF's, and the URDF's text if there is one.

    Raises:
        ConfigError: A required URDF does not come, or contract and URDF contradict each other.
    """
    wanted = contract.robot_description
    if wanted.use == "ignore" and not value(node, "debug_trajectory"):
        return contract, None
    text = _receive(node, wanted.topic, wanted.timeout_s)
    if wanted.use == "ignore":
        return contract, text
    if text is None:
        if wanted.use == "required":
            raise ConfigError(
                f"no URDF on {wanted.topic!r} within {wanted.timeout_s:g} s, and contract {contract.name!r} requires "
                "one; start robot_state_publisher, remap the topic, or set robot_description.use to ignore"
            )
        contract.joint_limits()  # raises where a limit was left to the URDF
        node.get_logger().warning(
            f"no URDF on {wanted.topic!r} within {wanted.timeout_s:g} s: the contract's limits alone hold"
        )
        return contract, None
    return with_urdf_limits(contract, limits_from_urdf(text, contract.joint_names)), text


def _receive(node: Node, topic: str, timeout_s: float) -> str | None:
    came, message = wait_for_message(String, node, topic, qos_profile=qos.LATCHED, time_to_wait=timeout_s)
    return str(message.data) if came and message is not None else None

"""Which topics a recording of one robot has: those of its contract, and those of its policy node."""

from __future__ import annotations

from omega_qvla_ros.bags.writer import RecordedTopic
from omega_qvla_ros.contract import RobotContract

DIAGNOSTICS = "/diagnostics"
IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
"""By the transport of the contract's camera."""
JOINT_STATE_TYPE = "sensor_msgs/msg/JointState"
COMMAND_TYPE = "trajectory_msgs/msg/JointTrajectory"
STRING_TYPE = "std_msgs/msg/String"
STATUS_TYPES = ("diagnostic_msgs/msg/DiagnosticStatus", "diagnostic_msgs/msg/DiagnosticArray")
_OUTPUT_TYPES = {"joint_trajectory": COMMAND_TYPE, "float64_multi_array": "std_msgs/msg/Float64MultiArray"}
"""Outputs that are topics. Goals of actions are no topic: the windows in ~/dry_run and the trace tell what was sent."""


def recorded_topics(contract: RobotContract, policy_node: str = "policy_node") -> tuple[RecordedTopic, ...]:
    """Topics to record, as relative names; the node resolves namespace and remappings.

    Args:
        contract: The robot.
        policy_node: Name of the policy node, relative to the namespace.
    """
    outputs = {output.name: _OUTPUT_TYPES[output.type] for output in contract.outputs if output.type in _OUTPUT_TYPES}
    return (
        *(RecordedTopic(camera.topic, IMAGE_TYPES[camera.transport]) for camera in contract.cameras),
        *(RecordedTopic(topic, JOINT_STATE_TYPE) for topic in contract.sensors.joint_topics),
        *(RecordedTopic(name, msgtype, reliable=True) for name, msgtype in outputs.items()),
        RecordedTopic(f"{policy_node}/dry_run/joint_trajectory", COMMAND_TYPE, reliable=True),
        RecordedTopic(f"{policy_node}/instruction", STRING_TYPE, reliable=True),
        RecordedTopic(f"{policy_node}/status", STATUS_TYPES[0], reliable=True, transient_local=True),
        RecordedTopic(DIAGNOSTICS, STATUS_TYPES[1], reliable=True),
        RecordedTopic("robot_description", STRING_TYPE, reliable=True, transient_local=True),
    )

"""Which topics a recording of one robot has: those of its contract, and those of its policy node."""

from __future__ import annotations

from omega_qvla_ros.bags.writer import RecordedTopic
from omega_qvla_ros.contract import RobotContract

DIAGNOSTICS = "/diagnostics"


def recorded_topics(contract: RobotContract, policy_node: str = "policy_node") -> tuple[RecordedTopic, ...]:
    """Topics to record, as relative names; the node resolves namespace and remappings.

    Args:
        contract: The robot.
        policy_node: Name of the policy node, relative to the namespace.
    """
    command = "trajectory_msgs/msg/JointTrajectory"
    text = "std_msgs/msg/String"
    return (
        *(RecordedTopic(camera.topic, "sensor_msgs/msg/Image") for camera in contract.cameras),
        RecordedTopic(contract.sensors.joint_states_topic, "sensor_msgs/msg/JointState"),
        RecordedTopic(contract.command.topic, command, reliable=True),
        RecordedTopic(f"{policy_node}/dry_run/{contract.command.topic}", command, reliable=True),
        RecordedTopic(f"{policy_node}/instruction", text, reliable=True),
        RecordedTopic(
            f"{policy_node}/status", "diagnostic_msgs/msg/DiagnosticStatus", reliable=True, transient_local=True
        ),
        RecordedTopic(DIAGNOSTICS, "diagnostic_msgs/msg/DiagnosticArray", reliable=True),
        RecordedTopic("robot_description", text, reliable=True, transient_local=True),
    )

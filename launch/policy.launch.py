"""The policy node alone, for an arm that has its own driver and controllers.

    ros2 launch omega_qvla_ros policy.launch.py contract:=arm.yaml checkpoint:=dir command_topic:=jtc/joint_trajectory
    ros2 lifecycle set /policy_node activate

The node is configured (policy loaded, checked against the contract, warmed up) and stays inactive until somebody
activates it; activate:=true does so at once. The other launch files include this one. NOT RUN on a real arm: no arm was
there.

No Fast DDS profile is set here. The simulation's would hear nothing outside this computer; config/fastdds_udp.xml (not
run) is for raw camera images that do not arrive, and has to be set where the camera driver runs as well.
"""

from __future__ import annotations

from launch import LaunchDescription
from launch.substitutions import LaunchConfiguration

from omega_qvla_ros.bringup.arguments import BOOLEAN, POLICY, Argument
from omega_qvla_ros.bringup.policy import policy_node, with_lifecycle

ARGUMENTS = (
    *POLICY,
    Argument(
        "command_topic",
        "joint_trajectory",
        "Where the topic joint_trajectory goes, if the contract's output has that name: <controller>/joint_trajectory.",
    ),
    Argument("joint_states_topic", "joint_states", "Where the contract's topic joint_states comes from."),
    Argument("use_sim_time", "false", "Take the time from /clock.", BOOLEAN),
)


def generate_launch_description() -> LaunchDescription:
    policy = policy_node(
        [
            ("joint_trajectory", LaunchConfiguration("command_topic")),
            ("joint_states", LaunchConfiguration("joint_states_topic")),
        ]
    )
    return LaunchDescription([*(argument.declare() for argument in ARGUMENTS), *with_lifecycle(policy)])

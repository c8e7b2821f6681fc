"""The policy node alone, for an arm that has its own driver and joint_trajectory_controller.

    ros2 launch omega_qvla_ros policy.launch.py contract:=arm.yaml checkpoint:=dir command_topic:=jtc/joint_trajectory
    ros2 lifecycle set /policy_node activate

The node is configured (policy loaded, checked against the contract, warmed up) and stays inactive until somebody
activates it; activate:=true does so at once. sim.launch.py includes this file. NOT RUN on a real arm: no arm was there.

No Fast DDS profile is set here. The simulation's would hear nothing outside this computer; config/fastdds_udp.xml (not
run) is for raw camera images that do not arrive, and has to be set where the camera driver runs as well.
"""

from __future__ import annotations

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    RegisterEventHandler,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

SHARE = FindPackageShare("omega_qvla_ros")

ARGUMENTS = [
    DeclareLaunchArgument(
        "checkpoint",
        default_value="tabletop_w4a4",
        description="Checkpoint folder, quantized pack folder, or the name of a shipped policy.",
    ),
    DeclareLaunchArgument(
        "contract",
        default_value="tabletop",
        description="Robot contract: a YAML file (joints, limits, cameras, topics), or the name of a shipped robot.",
    ),
    DeclareLaunchArgument(
        "instruction",
        default_value="",
        description="What the arm is told, in words. Empty: the contract's default; without one the arm waits.",
    ),
    DeclareLaunchArgument(
        "device", default_value="cpu", description="Where the policy computes: cpu, cuda or cuda:<n>."
    ),
    DeclareLaunchArgument(
        "inference_threads",
        default_value="0",
        description="CPU threads of one inference; 0 leaves it to torch, 1 is best beside other work on few cores.",
    ),
    DeclareLaunchArgument(
        "params_file",
        default_value=PathJoinSubstitution([SHARE, "config", "policy_node.yaml"]),
        description="Parameters of the node that have no argument here (YAML).",
    ),
    DeclareLaunchArgument(
        "command_topic",
        default_value="joint_trajectory",
        description="Where the contract's topic joint_trajectory goes: <controller>/joint_trajectory of ros2_control.",
    ),
    DeclareLaunchArgument(
        "joint_states_topic",
        default_value="joint_states",
        description="Where the contract's topic joint_states comes from.",
    ),
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
    DeclareLaunchArgument(
        "use_sim_time", default_value="false", choices=["true", "false"], description="Take the time from /clock."
    ),
    DeclareLaunchArgument(
        "activate",
        default_value="false",
        choices=["true", "false"],
        description="Move as soon as the node is configured, instead of waiting for somebody to activate it.",
    ),
    DeclareLaunchArgument(
        "log_level",
        default_value="info",
        choices=["debug", "info", "warn", "error"],
        description="Log level of the node.",
    ),
]


def change_state(node: LifecycleNode, transition: int, condition: IfCondition | None = None) -> EmitEvent:
    """Asks the node for a lifecycle transition."""
    event = ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)
    return EmitEvent(event=event, condition=condition)


def generate_launch_description() -> LaunchDescription:
    policy = LifecycleNode(
        package="omega_qvla_ros",
        executable="policy_node",
        name="policy_node",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            LaunchConfiguration("params_file"),
            {
                name: ParameterValue(LaunchConfiguration(name), value_type=str)
                for name in ("checkpoint", "contract", "instruction", "device")
            },
            {
                "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
                "inference_threads": ParameterValue(LaunchConfiguration("inference_threads"), value_type=int),
            },
        ],
        remappings=[
            ("joint_trajectory", LaunchConfiguration("command_topic")),
            ("joint_states", LaunchConfiguration("joint_states_topic")),
        ],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        # Not once more while the launch is ending anyway: launch_ros reports that as an error.
        on_exit=lambda event, context: None if context.is_shutdown else [Shutdown(reason="the policy node ended")],
    )
    configured = OnStateTransition(
        target_lifecycle_node=policy,
        start_state="configuring",
        goal_state="inactive",
        entities=[
            change_state(policy, Transition.TRANSITION_ACTIVATE, IfCondition(LaunchConfiguration("activate"))),
        ],
    )
    refused = OnStateTransition(
        target_lifecycle_node=policy,
        start_state="configuring",
        goal_state="unconfigured",
        entities=[
            LogInfo(msg="policy_node refused its configuration; the reason and the remedy are in its log above."),
            Shutdown(reason="policy_node refused its configuration"),
        ],
    )
    return LaunchDescription(
        [
            *ARGUMENTS,
            # Before the node starts, so that no transition is missed.
            RegisterEventHandler(configured),
            RegisterEventHandler(refused),
            policy,
            change_state(policy, Transition.TRANSITION_CONFIGURE),
        ]
    )

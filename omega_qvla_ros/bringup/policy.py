"""The policy node with its lifecycle, as ``policy.launch.py`` starts it and the other launch files include it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch import Action, LaunchDescriptionEntity, SomeSubstitutionsType
from launch.actions import EmitEvent, IncludeLaunchDescription, LogInfo, RegisterEventHandler, Shutdown
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

from omega_qvla_ros.bringup.arguments import SHARE

TEXT_PARAMETERS = ("checkpoint", "contract", "instruction", "device")


def policy_node(remappings: Sequence[tuple[str, SomeSubstitutionsType]]) -> LifecycleNode:
    """The node, with its parameters from the launch arguments of the same names."""
    texts = {name: ParameterValue(LaunchConfiguration(name), value_type=str) for name in TEXT_PARAMETERS}
    return LifecycleNode(
        package="omega_qvla_ros",
        executable="policy_node",
        name="policy_node",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            LaunchConfiguration("params_file"),
            texts,
            {
                "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
                "inference_threads": ParameterValue(LaunchConfiguration("inference_threads"), value_type=int),
            },
        ],
        remappings=list(remappings),
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        # Not once more while the launch is ending anyway: launch_ros reports that as an error.
        on_exit=lambda event, context: None if context.is_shutdown else [Shutdown(reason="the policy node ended")],
    )


def with_lifecycle(policy: LifecycleNode) -> list[LaunchDescriptionEntity]:
    """The node, configured at once, activated if the argument says so; a refused configuration ends the launch."""
    activate = IfCondition(LaunchConfiguration("activate"))
    configured = OnStateTransition(
        target_lifecycle_node=policy,
        start_state="configuring",
        goal_state="inactive",
        entities=[_change_state(policy, Transition.TRANSITION_ACTIVATE, activate)],
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
    return [
        # Before the node starts, so that no transition is missed.
        RegisterEventHandler(configured),
        RegisterEventHandler(refused),
        policy,
        _change_state(policy, Transition.TRANSITION_CONFIGURE),
    ]


def include_policy(arguments: Mapping[str, SomeSubstitutionsType], passed_on: Sequence[str]) -> Action:
    """policy.launch.py with these arguments, and those of ``passed_on`` as the including file has them."""
    source = PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, "launch", "policy.launch.py"]))
    everything = {**arguments, **{name: LaunchConfiguration(name) for name in passed_on}}
    return IncludeLaunchDescription(source, launch_arguments=everything.items())


def _change_state(node: LifecycleNode, transition: int, condition: IfCondition | None = None) -> EmitEvent:
    event = ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)
    return EmitEvent(event=event, condition=condition)

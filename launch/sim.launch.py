"""The simulated tabletop arm and the policy that drives it: two nodes on one computer.

    ros2 launch omega_qvla_ros sim.launch.py task:=lift:green
    ros2 launch omega_qvla_ros sim.launch.py episodes:=9
    ros2 launch omega_qvla_ros sim.launch.py task:=place:blue instruction:="put the blue cube on the plate" viewer:=true

The task is what the simulator judges, the instruction is what the arm is told. Another shell that wants to see the
topics needs the same Fast DDS profile, in FASTDDS_DEFAULT_PROFILES_FILE: <share>/omega_qvla_ros/config/fastdds_shm.xml
"""

from __future__ import annotations

import os
from collections.abc import Callable

from launch import Action, LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from omega_qvla_ros.bringup.arguments import (
    ACTIVATE,
    BOOLEAN,
    CHECKPOINT,
    DEVICE,
    INFERENCE_THREADS,
    INSTRUCTION,
    LOG_LEVEL,
    NAMESPACE,
    SHARE,
    Argument,
)
from omega_qvla_ros.bringup.policy import include_policy

TASKS = tuple(f"{kind}:{colour}" for kind in ("touch", "lift", "place") for colour in ("red", "green", "blue"))
SHIPPED = {"true": "tabletop_w4a4", "false": "tabletop"}

# Fast DDS before 3.0 reads the old name only; later releases warn about it.
OLD_FAST_DDS = ("humble", "iron", "jazzy")
PROFILE_VARIABLE = "FAST{}_DEFAULT_PROFILES_FILE".format(
    "RTPS" if os.environ.get("ROS_DISTRO") in OLD_FAST_DDS else "DDS"
)

ARGUMENTS = (
    CHECKPOINT.but(
        default="",
        description="Checkpoint or quantized pack folder, or a shipped policy's name. Empty: as 'quantized' says.",
    ),
    Argument(
        "quantized",
        "true",
        "Without a checkpoint: the shipped 4-bit policy (true) or the unquantized one (false).",
        tuple(SHIPPED),
    ),
    Argument("task", "place:blue", "What the simulator judges, and places cubes for.", TASKS),
    INSTRUCTION.but(description="What the arm is told, in words. Empty: the usual wording of the task."),
    Argument("seed", "", "Seed of the start poses. Empty: the bridge's default."),
    Argument(
        "episodes",
        "0",
        "Run so many judged episodes of all tasks, colours and wordings, log the results and end. "
        "0: the task and instruction given here.",
    ),
    Argument("viewer", "false", "Open MuJoCo's viewer window (needs a display) instead of running headless.", BOOLEAN),
    Argument("real_time_factor", "1.0", "Simulated seconds per second, where the machine can follow."),
    DEVICE,
    INFERENCE_THREADS.but(
        default="1",
        description="CPU threads of one inference. The simulator needs the other cores; 0 leaves it to torch.",
    ),
    NAMESPACE,
    ACTIVATE.but(default="true"),
    LOG_LEVEL.but(description="Log level of the nodes."),
)


def seed_parameter(context: LaunchContext, name: str) -> list[dict[str, ParameterValue]]:
    """The argument ``seed`` under a node's own name for it, nothing where it was not given."""
    seed = LaunchConfiguration("seed")
    return [{name: ParameterValue(seed, value_type=int)}] if seed.perform(context) else []


def end_with(reason: str) -> Callable[[ProcessExited, LaunchContext], list[Action] | None]:
    """Ends the launch when a node ends. Not once more while it is ending: launch_ros reports that as an error."""
    return lambda _, context: None if context.is_shutdown else [Shutdown(reason=reason)]


def start_bridge(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The simulator with its cameras, joint states, clock and trajectory controller."""
    viewer = LaunchConfiguration("viewer").perform(context) == "true"
    parameters = [
        PathJoinSubstitution([SHARE, "config", "mujoco_bridge_node.yaml"]),
        {
            "task": ParameterValue(LaunchConfiguration("task"), value_type=str),
            "real_time_factor": ParameterValue(LaunchConfiguration("real_time_factor"), value_type=float),
            "viewer": viewer,
        },
    ]
    parameters += seed_parameter(context, "seed")
    bridge = Node(
        package="omega_qvla_ros",
        executable="mujoco_bridge_node",
        name="mujoco_bridge_node",
        namespace=LaunchConfiguration("namespace"),
        parameters=parameters,
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        # A window needs GLFW. Without one EGL draws the camera images, or what this shell has chosen (osmesa).
        additional_env={"MUJOCO_GL": "glfw" if viewer else os.environ.get("MUJOCO_GL", "egl")},
        output="screen",
        on_exit=end_with("the simulator ended"),
    )
    return [bridge]


def start_policy(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """policy.launch.py with the shipped policy and the task's wording where nothing else was said."""
    # Here and not above: MuJoCo comes with it, and --show-args needs none of it.
    from omega_qvla_core.envs.tabletop import Task

    chosen = {
        name: LaunchConfiguration(name).perform(context) for name in ("checkpoint", "quantized", "instruction", "task")
    }
    arguments = {
        "checkpoint": chosen["checkpoint"] or SHIPPED[chosen["quantized"]],
        "contract": "tabletop",
        "instruction": chosen["instruction"] or Task.parse(chosen["task"]).instruction,
        "use_sim_time": "true",
    }
    return [include_policy(arguments, ("device", "inference_threads", "namespace", "activate", "log_level"))]


def start_episodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The node that asks for one episode after the other: stop, reset, tell, start, wait for the result."""
    if LaunchConfiguration("episodes").perform(context) == "0":
        return []
    runner = Node(
        package="omega_qvla_ros",
        executable="episode_runner_node",
        name="episode_runner_node",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            PathJoinSubstitution([SHARE, "config", "episode_runner_node.yaml"]),
            {"episodes": ParameterValue(LaunchConfiguration("episodes"), value_type=int)},
            *seed_parameter(context, "first_seed"),
        ],
        output="screen",
        on_exit=end_with("all episodes are done"),
    )
    return [runner]


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            *(argument.declare() for argument in ARGUMENTS),
            # Shared memory only, so that best-effort camera images arrive: simulation, never a real arm.
            SetEnvironmentVariable(PROFILE_VARIABLE, PathJoinSubstitution([SHARE, "config", "fastdds_shm.xml"])),
            OpaqueFunction(function=start_bridge),
            OpaqueFunction(function=start_policy),
            OpaqueFunction(function=start_episodes),
        ]
    )

"""An arm in Gazebo: the world with its cameras, the arm under gz_ros2_control, the bridge, and the policy.

NOT RUN: Gazebo was not there.
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import AppendEnvironmentVariable, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import Command, FindExecutable, LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from omega_qvla_ros.bringup.arguments import (
    ACTIVATE,
    BOOLEAN,
    CHECKPOINT,
    CONTRACT,
    DEVICE,
    INFERENCE_THREADS,
    INSTRUCTION,
    LOG_LEVEL,
    PARAMS_FILE,
    SHARE,
    Argument,
)
from omega_qvla_ros.bringup.policy import include_policy
from omega_qvla_ros.bringup.real import POLICY_ARGUMENTS, spawner
from omega_qvla_ros.bringup.robots import ROBOTS, Simulation

SIM_TIME = {"use_sim_time": True}


def simulated_robot(name: str) -> LaunchDescription:
    """Everything for a shipped arm in Gazebo.

    Args:
        name: Of ``ROBOTS``.
    """
    simulation = ROBOTS[name].simulation
    controllers = f"controllers/{name}_sim.yaml"
    return LaunchDescription(
        [
            *(argument.declare() for argument in arguments(simulation)),
            # Meshes are package:// addresses; Gazebo looks for the packages below these folders.
            *(
                AppendEnvironmentVariable(
                    "GZ_SIM_RESOURCE_PATH", PathJoinSubstitution([FindPackageShare(package), ".."])
                )
                for package in simulation.descriptions
            ),
            OpaqueFunction(function=_world),
            _state_publisher(simulation, controllers),
            Node(
                package="ros_gz_sim",
                executable="create",
                arguments=["-topic", "robot_description", "-name", name],
                parameters=[SIM_TIME],
                output="screen",
            ),
            Node(
                package="ros_gz_bridge",
                executable="parameter_bridge",
                parameters=[{"config_file": PathJoinSubstitution([SHARE, "config", "gz", "bridge.yaml"])}, SIM_TIME],
                output="screen",
            ),
            *spawner(simulation.controllers, controllers, ""),
            include_policy({"use_sim_time": "true"}, (*POLICY_ARGUMENTS, LOG_LEVEL.name)),
        ]
    )


def arguments(simulation: Simulation) -> list[Argument]:
    """Launch arguments of a simulated arm."""
    return [
        Argument("headless", "true", "Without Gazebo's window; cameras are drawn off screen.", BOOLEAN),
        Argument(
            "world",
            PathJoinSubstitution([SHARE, "config", "gz", "table.sdf"]),
            "World file (SDF) with a camera on the Gazebo topic front/image.",
        ),
        CHECKPOINT.but(default=None, description="Checkpoint or pack folder of a policy trained for this robot."),
        CONTRACT.but(default=simulation.contract),
        INSTRUCTION,
        DEVICE,
        INFERENCE_THREADS,
        PARAMS_FILE,
        ACTIVATE.but(default="true"),
        LOG_LEVEL,
    ]


def _world(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    headless = LaunchConfiguration("headless").perform(context) == "true"
    options = "-r -s --headless-rendering " if headless else "-r "
    file = PathJoinSubstitution([FindPackageShare("ros_gz_sim"), "launch", "gz_sim.launch.py"])
    arguments = {"gz_args": [options, LaunchConfiguration("world")], "on_exit_shutdown": "true"}
    return [IncludeLaunchDescription(PythonLaunchDescriptionSource(file), launch_arguments=arguments.items())]


def _state_publisher(simulation: Simulation, controllers: str) -> Node:
    """robot_state_publisher, which serves the expanded xacro as robot_description."""
    command: list = [FindExecutable(name="xacro"), " ", PathJoinSubstitution([SHARE, "config/urdf", simulation.xacro])]
    for name, value in simulation.arguments.items():
        is_file = value == "@controllers"
        command += [f" {name}:=", PathJoinSubstitution([SHARE, "config", controllers]) if is_file else value]
    return Node(
        package="robot_state_publisher",
        executable="robot_state_publisher",
        parameters=[{"robot_description": ParameterValue(Command(command), value_type=str)}, SIM_TIME],
        output="screen",
    )

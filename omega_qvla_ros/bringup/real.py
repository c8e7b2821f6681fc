"""A real arm: the vendor's driver with ros2_control, our controllers, cameras, and the policy."""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
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
    NAMESPACE,
    PARAMS_FILE,
    SHARE,
    Argument,
)
from omega_qvla_ros.bringup.policy import include_policy
from omega_qvla_ros.bringup.robots import CAMERA_DRIVERS, CAMERAS, ROBOTS, Robot

POLICY_ARGUMENTS = ("checkpoint", "contract", "instruction", "device", "inference_threads", "params_file", "activate")


def real_robot(name: str) -> LaunchDescription:
    """Everything for a shipped arm.

    Args:
        name: Of ``ROBOTS``.
    """
    robot = ROBOTS[name]
    return LaunchDescription(
        [
            *(argument.declare() for argument in arguments(robot)),
            OpaqueFunction(function=_driver, args=[robot]),
            *spawner(robot.spawned, f"controllers/{robot.name}.yaml", _namespace(robot)),
            OpaqueFunction(function=_cameras, args=[robot]),
            include_policy(
                {"namespace": _namespace(robot), "use_sim_time": "false"}, (*POLICY_ARGUMENTS, LOG_LEVEL.name)
            ),
        ]
    )


def arguments(robot: Robot) -> list[Argument]:
    """Launch arguments of a real arm."""
    devices = [
        Argument(
            f"{key}_device",
            "",
            f"Device of the camera {key!r}: a video device for v4l2, a serial number for realsense.",
        )
        for key in CAMERAS
    ]
    given = [Argument(given.name, given.default, given.description) for given in robot.driver.given]
    return [
        *given,
        Argument("mock_hardware", "false", "Commands come back as states, from the vendor's mock hardware.", BOOLEAN),
        CHECKPOINT.but(default=None, description="Checkpoint or pack folder of a policy trained for this robot."),
        CONTRACT.but(default=robot.name),
        INSTRUCTION,
        DEVICE,
        INFERENCE_THREADS,
        PARAMS_FILE,
        ACTIVATE,
        *([NAMESPACE] if robot.driver.namespace else []),
        Argument(
            "cameras",
            "none",
            "Driver to start for both cameras; none: they are published by somebody else.",
            ("none", *CAMERA_DRIVERS),
        ),
        *devices,
        LOG_LEVEL,
    ]


def spawner(controllers: tuple[str, ...], parameters: str, namespace: LaunchConfiguration | str) -> list[Node]:
    """Loads and activates controllers with a file of ``config/``; nothing for no controllers."""
    if not controllers:
        return []
    file = PathJoinSubstitution([SHARE, "config", parameters])
    node = Node(
        package="controller_manager",
        executable="spawner",
        namespace=namespace,
        arguments=[*controllers, "--param-file", file, "--controller-manager-timeout", "60"],
        output="screen",
    )
    return [node]


def _namespace(robot: Robot) -> LaunchConfiguration | str:
    return LaunchConfiguration("namespace") if robot.driver.namespace else ""


def _driver(context: LaunchContext, robot: Robot) -> list[LaunchDescriptionEntity]:
    driver = robot.driver
    argument, mocked, real = driver.mock
    values: dict[str, object] = {
        key: PathJoinSubstitution([SHARE, value[1:]]) if value.startswith("@") else value
        for key, value in driver.fixed.items()
    }
    values |= {given.vendor: LaunchConfiguration(given.name) for given in driver.given}
    values[argument] = mocked if LaunchConfiguration("mock_hardware").perform(context) == "true" else real
    if driver.namespace:
        values[driver.namespace] = LaunchConfiguration("namespace")
    file = PathJoinSubstitution([FindPackageShare(driver.package), "launch", driver.launch_file])
    return [IncludeLaunchDescription(PythonLaunchDescriptionSource(file), launch_arguments=values.items())]


def _cameras(context: LaunchContext, robot: Robot) -> list[LaunchDescriptionEntity]:
    choice = LaunchConfiguration("cameras").perform(context)
    if choice == "none":
        return []
    camera = CAMERA_DRIVERS[choice]
    nodes = []
    for key in CAMERAS:
        device = LaunchConfiguration(f"{key}_device")
        if not device.perform(context):
            raise RuntimeError(f"cameras:={choice} needs {key}_device:=..., the device of the camera {key!r}")
        parameters = {
            **camera.parameters,
            camera.device: ParameterValue(device, value_type=str),
            "camera_frame_id": f"{key}_camera_optical_frame",
        }
        node = Node(
            package=camera.package,
            executable=camera.executable,
            name="camera",
            namespace=PathJoinSubstitution([_namespace(robot), key]),
            parameters=[parameters],
            remappings=[(camera.image, "image_raw")],
            output="screen",
        )
        nodes.append(node)
    return nodes

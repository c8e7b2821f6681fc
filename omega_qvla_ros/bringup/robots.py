"""What the bring-ups of the shipped arms differ in, as data. Which controllers exist, with which options, is in
``config/controllers``; joints and limits are in ``config/robots``.

NOT RUN with any of these drivers: neither an arm nor a vendor's package was there. Package, file, argument and
controller names were read in the vendors' public repositories: franka_ros2, Universal_Robots_ROS2_Driver and xarm_ros2
in their branch jazzy, ros2_robotiq_gripper and so101-ros-physical-ai in their main branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DriverArgument:
    """A launch argument of ours that goes to the vendor's launch file under its own name.

    Attributes:
        name: Ours.
        vendor: The vendor's.
        default: None: it must be given.
        description: For ``--show-args``.
    """

    name: str
    vendor: str
    default: str | None
    description: str


@dataclass(frozen=True)
class Driver:
    """The vendor's launch file: hardware, controller_manager and robot_state_publisher.

    Attributes:
        package: Its package.
        launch_file: File in ``launch`` of that package.
        fixed: Arguments with their values. ``@config/x`` stands for a file of this package.
        given: Arguments that the user gives.
        mock: Argument for mock hardware, and its values for true and false.
        namespace: Name of its argument for a namespace, None where it has none.
        republished: It starts a joint_state_publisher, so what is on ``joint_states`` is stamped when it is sent, not
            when it was measured.
    """

    package: str
    launch_file: str
    fixed: Mapping[str, str]
    given: tuple[DriverArgument, ...]
    mock: tuple[str, str, str]
    namespace: str | None = None
    republished: bool = False


@dataclass(frozen=True)
class Simulation:
    """The arm in Gazebo.

    Attributes:
        contract: Shipped contract whose outputs the simulated controllers serve.
        xacro: File of ``config/urdf``.
        arguments: Arguments of the xacro. ``@controllers`` stands for the file of controllers.
        controllers: To be spawned, in ``config/controllers/<contract>.yaml`` or that of the real arm.
        descriptions: Packages whose meshes Gazebo has to find.
    """

    contract: str
    xacro: str
    arguments: Mapping[str, str]
    controllers: tuple[str, ...]
    descriptions: tuple[str, ...]


@dataclass(frozen=True)
class Robot:
    """One shipped arm.

    Attributes:
        name: Of its contract and of its file of controllers.
        title: For people.
        driver: The vendor's launch file.
        spawned: Controllers that the vendor's launch file does not start.
        simulation: The same arm in Gazebo.
    """

    name: str
    title: str
    driver: Driver
    spawned: tuple[str, ...]
    simulation: Simulation


@dataclass(frozen=True)
class CameraDriver:
    """A driver for one camera.

    Attributes:
        package: Its package.
        executable: Its executable.
        device: Its parameter for the device of the argument ``<key>_device``.
        parameters: Others.
        image: Topic of its images, as the node calls it.
    """

    package: str
    executable: str
    device: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    image: str = "image_raw"


CAMERAS = ("front", "wrist")
"""Keys of the shipped contracts' cameras, which are also the namespaces of their topics."""

CAMERA_DRIVERS = {
    "v4l2": CameraDriver("v4l2_camera", "v4l2_camera_node", "video_device"),
    "realsense": CameraDriver(
        "realsense2_camera",
        "realsense2_camera_node",
        "serial_no",
        {"enable_depth": False, "rgb_camera.color_profile": "640x480x30"},
        "~/color/image_raw",
    ),
}

ROBOT_IP = "IP address or host name of the robot's controller."

ROBOTS = {
    robot.name: robot
    for robot in (
        Robot(
            name="franka_fr3",
            title="Franka Research 3 with the Franka Hand",
            driver=Driver(
                package="franka_bringup",
                launch_file="franka.launch.py",
                fixed={
                    "robot_type": "fr3",
                    "load_gripper": "true",
                    "joint_state_rate": "100",
                    "controllers_yaml": "@config/controllers/franka_fr3.yaml",
                },
                given=(DriverArgument("robot_ip", "robot_ip", None, ROBOT_IP),),
                mock=("use_fake_hardware", "true", "false"),
                namespace="namespace",
                republished=True,
            ),
            spawned=("fr3_arm_controller",),
            simulation=Simulation(
                contract="franka_fr3_sim",
                xacro="franka_fr3_sim.urdf.xacro",
                arguments={"controllers": "@controllers"},
                controllers=("joint_state_broadcaster", "fr3_arm_controller", "fr3_gripper_controller"),
                descriptions=("franka_description",),
            ),
        ),
        Robot(
            name="ur5e",
            title="UR5e with a Robotiq 2F-85",
            driver=Driver(
                package="ur_robot_driver",
                launch_file="ur_control.launch.py",
                fixed={
                    "ur_type": "ur5e",
                    # The vendor's controller would hold the joints that ours wants.
                    "activate_joint_controller": "false",
                    "launch_rviz": "false",
                    # 24 V and the tool's serial line are what the 2F-85 needs at the tool connector.
                    "use_tool_communication": "true",
                    "tool_voltage": "24",
                    # Read by ur_rsp.launch.py, which the vendor's file includes.
                    "description_file": "@config/urdf/ur5e_robotiq.urdf.xacro",
                },
                given=(DriverArgument("robot_ip", "robot_ip", None, ROBOT_IP),),
                mock=("use_mock_hardware", "true", "false"),
            ),
            spawned=("policy_arm_controller", "robotiq_gripper_controller", "robotiq_activation_controller"),
            simulation=Simulation(
                contract="ur5e",
                xacro="ur5e_sim.urdf.xacro",
                arguments={"controllers": "@controllers"},
                controllers=("joint_state_broadcaster", "policy_arm_controller", "robotiq_gripper_controller"),
                descriptions=("ur_description", "robotiq_description"),
            ),
        ),
        Robot(
            name="xarm7",
            title="UFACTORY xArm 7 with the xArm gripper",
            driver=Driver(
                package="xarm_controller",
                launch_file="_robot_ros2_control.launch.py",
                fixed={"dof": "7", "robot_type": "xarm", "add_gripper": "true"},
                given=(DriverArgument("robot_ip", "robot_ip", None, ROBOT_IP),),
                mock=(
                    "ros2_control_plugin",
                    "uf_robot_hardware/UFRobotFakeSystemHardware",
                    "uf_robot_hardware/UFRobotSystemHardware",
                ),
                republished=True,
            ),
            spawned=("joint_state_broadcaster", "policy_arm_controller"),
            simulation=Simulation(
                contract="xarm7_sim",
                xacro="xarm7_sim.urdf.xacro",
                arguments={
                    "add_gripper": "true",
                    "ros2_control_plugin": "gz_ros2_control/GazeboSimSystem",
                    "ros2_control_params": "@controllers",
                },
                controllers=("joint_state_broadcaster", "policy_arm_controller", "policy_gripper_controller"),
                descriptions=("xarm_description",),
            ),
        ),
        Robot(
            name="so101",
            title="SO-101 follower",
            driver=Driver(
                package="so101_bringup",
                launch_file="follower.launch.py",
                fixed={
                    "arm_controller": "trajectory_controller",
                    "controller_config_file": "@config/controllers/so101.yaml",
                    "use_rviz": "false",
                },
                given=(
                    DriverArgument("usb_port", "usb_port", "/dev/so101_follower", "Serial port of the arm."),
                    DriverArgument(
                        "joint_config_file",
                        "joint_config_file",
                        None,
                        "Calibration of the motors (YAML of so101_bringup).",
                    ),
                ),
                mock=("hardware_type", "mock", "real"),
                namespace="namespace",
            ),
            spawned=(),
            simulation=Simulation(
                contract="so101",
                xacro="so101_sim.urdf.xacro",
                arguments={"variant": "follower", "controllers": "@controllers"},
                controllers=("joint_state_broadcaster", "trajectory_controller"),
                descriptions=("so101_description",),
            ),
        ),
    )
}
"""Every shipped arm but the tabletop arm, which has a simulator of its own."""

"""The shipped arms: contract, controllers, URDF, bridge and world name the same things, and no limit is looser.

The URDFs are excerpts of ours with the published names and limits (test/data/urdf): the vendors' packages cannot be had
from the Python package index. None of this was run on an arm.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from omega_qvla_core.checkpoints.preflight import read_requirements
from omega_qvla_core.policy_types import CameraSpec, PolicySpec
from omega_qvla_ros.bringup.robots import CAMERAS, ROBOTS
from omega_qvla_ros.contract import (
    RobotContract,
    check_policy,
    limits_from_urdf,
    load_contract,
    requirements,
    with_urdf_limits,
)
from omega_qvla_ros.resources import config_file

URDFS = Path(__file__).resolve().parents[1] / "data" / "urdf"
DRIVEN_ACTIONS = {"franka_gripper/gripper_action", "xarm_gripper/gripper_action"}
"""Actions that a vendor's driver serves, not a controller of ours."""

# (contract, file of controllers, arm): the real arm and its simulation.
CASES = [
    pytest.param(contract, controllers, name, id=f"{name}-{'sim' if controllers.endswith('_sim') else 'real'}")
    for name, robot in ROBOTS.items()
    for contract, controllers in ((name, name), (robot.simulation.contract, f"{name}_sim"))
]


def contract_of(name: str) -> RobotContract:
    return load_contract(config_file(f"robots/{name}.yaml"))


def controllers_of(name: str) -> dict[str, dict]:
    """Controller -> its parameters."""
    data = yaml.safe_load(config_file(f"controllers/{name}.yaml").read_text())["/**"]
    return {key: value["ros__parameters"] for key, value in data.items()}


def spawned(controllers: str, name: str) -> tuple[str, ...]:
    robot = ROBOTS[name]
    return robot.simulation.controllers if controllers.endswith("_sim") else robot.spawned


def urdf_of(name: str) -> str:
    return (URDFS / f"{name}.urdf").read_text()


def test_every_shipped_contract_belongs_to_an_arm() -> None:
    names = {path.stem for path in config_file("robots/tabletop.yaml").parent.glob("*.yaml")}
    assert names == {"tabletop"} | {name for case in CASES for name in case.values[:1]}


@pytest.mark.parametrize(("contract", "controllers", "name"), CASES)
def test_limits_are_not_looser_than_the_urdf(contract, controllers, name) -> None:
    own = contract_of(contract)
    merged = with_urdf_limits(own, limits_from_urdf(urdf_of(name), own.joint_names))
    for field in ("position_min", "position_max", "max_velocity", "max_acceleration"):
        np.testing.assert_array_equal(getattr(merged.joint_limits(), field), getattr(own.joint_limits(), field))
    assert own.robot_description.use == "required"


@pytest.mark.parametrize(("contract", "controllers", "name"), CASES)
def test_every_output_has_a_controller_for_exactly_its_joints(contract, controllers, name) -> None:
    available = controllers_of(controllers)
    for output in contract_of(contract).outputs:
        if output.name in DRIVEN_ACTIONS:
            assert output.type == "gripper_command" and not controllers.endswith("_sim")
            continue
        controller, _, interface = output.name.rpartition("/")
        parameters = available[controller]
        if output.type == "joint_trajectory":
            assert interface == "joint_trajectory"
            assert tuple(parameters["joints"]) == output.joints
            assert parameters["type"].endswith("JointTrajectoryController")
        else:
            assert (output.type, interface) == ("parallel_gripper_command", "gripper_cmd")
            assert (parameters["joint"],) == output.joints
            assert parameters["type"] == "parallel_gripper_action_controller/GripperActionController"


@pytest.mark.parametrize(("contract", "controllers", "name"), CASES)
def test_trajectory_controllers_have_the_recommended_options(contract, controllers, name) -> None:
    joints = {joint.name: joint for joint in contract_of(contract).joints}
    found = {
        key: value for key, value in controllers_of(controllers).items() if "JointTrajectory" in value.get("type", "")
    }
    assert found
    for parameters in found.values():
        constraints = parameters["constraints"]
        # JTC ignores a cmd_timeout that is not above the goal time.
        assert parameters["cmd_timeout"] > constraints["goal_time"] and parameters["cmd_timeout"] == 0.5
        assert parameters["interpolate_from_desired_state"] is True
        assert parameters["allow_partial_joints_goal"] is False
        assert parameters["allow_nonzero_velocity_at_trajectory_end"] is False
        assert constraints["decelerate_on_cancel"] is True
        for name_, joint in ((name_, joints[name_]) for name_ in parameters["joints"]):
            assert constraints[name_]["max_deceleration_on_cancel"] == joint.max_acceleration
            # The node's own watch comes first; a gripper that holds something is watched by neither.
            if joint.max_tracking_error is None:
                assert constraints[name_]["trajectory"] == 0.0
            else:
                assert constraints[name_]["trajectory"] > joint.max_tracking_error


@pytest.mark.parametrize("name", [name for name, robot in ROBOTS.items() if robot.driver.republished])
def test_no_arm_is_watched_through_a_publisher_that_stamps_old_positions_as_new(name) -> None:
    """Whose timeout would it be? Only a gripper that nobody watches may come from there."""
    contract = contract_of(name)
    watched = {joint.name for joint in contract.joints if joint.max_tracking_error is not None}
    elsewhere = {joint for source in contract.sensors.joint_sources for joint in source.joints}
    republished = [source for source in contract.sensors.joint_sources if source.topic == "joint_states"]
    assert contract.sensors.joint_states_topic != "joint_states" and not watched & elsewhere
    assert all(not watched & set(source.joints) for source in republished)
    broadcaster = controllers_of(name)["joint_state_broadcaster"]
    local = contract.sensors.joint_states_topic == "joint_state_broadcaster/joint_states"
    assert broadcaster.get("use_local_topics", False) is local


@pytest.mark.parametrize("name", [robot.simulation.contract for robot in ROBOTS.values()])
def test_simulated_arms_have_every_joint_on_one_topic(name) -> None:
    assert contract_of(name).sensors.joint_topics == ("joint_states",)


@pytest.mark.parametrize(("contract", "controllers", "name"), CASES)
def test_every_controller_that_is_started_is_described(contract, controllers, name) -> None:
    available = controllers_of(controllers)
    for controller in spawned(controllers, name):
        assert "type" in available[controller], controller
    manager = available.get("controller_manager", {})
    for controller, entry in manager.items():
        if controller != "update_rate" and controller in available:
            assert entry["type"] == available[controller]["type"]
    if controllers.endswith("_sim"):
        assert set(spawned(controllers, name)) == set(available) - {"controller_manager"}


@pytest.mark.parametrize(("contract", "controllers", "name"), CASES)
def test_a_checkpoint_with_these_names_fits(contract, controllers, name) -> None:
    robot = contract_of(contract)
    wanted = requirements(robot)
    assert read_requirements(config_file(f"robots/{contract}.yaml")) == wanted
    spec = PolicySpec(
        name="lab",
        family="pi05",
        cameras=tuple(CameraSpec(key, 224, 224) for key in wanted.cameras),
        state_names=wanted.state_names[::-1],
        action_names=wanted.action_names[::-1],
        horizon=16,
        control_hz=wanted.control_hz,
        first_action_delay_s=1.0 / wanted.control_hz,
        num_steps=10,
        max_tokens=48,
    )
    binding = check_policy(robot, spec)
    middle = (robot.joint_limits().position_min + robot.joint_limits().position_max) / 2
    state = binding.state(middle)
    # The same names in state and action, so a standing arm is commanded to stand.
    np.testing.assert_allclose(binding.targets(state[None], middle)[0], middle, atol=1e-9)


def sensors(xml: str) -> dict[str, str]:
    """Gazebo topic -> camera sensor's name in a text of SDF or xacro."""
    found = ElementTree.fromstring(xml).iter("sensor")
    return {sensor.findtext("topic", ""): sensor.get("name", "") for sensor in found if sensor.get("type") == "camera"}


def test_topics_agree_between_contract_bridge_and_sensors() -> None:
    bridge = {entry["ros_topic_name"]: entry for entry in yaml.safe_load(config_file("gz/bridge.yaml").read_text())}
    cameras = sensors(config_file("gz/table.sdf").read_text()) | sensors(
        config_file("urdf/simulation.xacro").read_text()
    )
    assert set(cameras.values()) == set(CAMERAS)
    for robot in ROBOTS.values():
        for camera in contract_of(robot.simulation.contract).cameras:
            entry = bridge[camera.topic]
            assert entry["ros_type_name"] == "sensor_msgs/msg/Image" and entry["gz_type_name"] == "gz.msgs.Image"
            assert entry["direction"] == "GZ_TO_ROS"
            assert cameras[entry["gz_topic_name"]] == camera.key
    assert bridge["/clock"]["gz_type_name"] == "gz.msgs.Clock"
    assert set(bridge) == {"/clock", *(camera.topic for camera in contract_of("ur5e").cameras)}


def test_the_world_has_what_cameras_need() -> None:
    world = ElementTree.parse(config_file("gz/table.sdf")).getroot().find("world")
    plugins = {plugin.get("filename") for plugin in world.findall("plugin")}
    assert {"gz-sim-sensors-system", "gz-sim-physics-system", "gz-sim-user-commands-system"} <= plugins


def test_drivers_get_files_that_are_there() -> None:
    for robot in ROBOTS.values():
        for value in robot.driver.fixed.values():
            if value.startswith("@config/"):
                config_file(value.removeprefix("@config/"))
        config_file(f"urdf/{robot.simulation.xacro}")

"""The arms' launch files with every choice of every argument: their full list of nodes, and what the drivers are told.

The launch service runs for real; no process of it does, and the vendors' packages are stand-ins (see launched.py).
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

# Not "launch": the folder of that name in the repository would be found as a namespace package.
pytest.importorskip("launch_ros.actions", reason="launch and launch_ros come with a ROS installation only")
ament_index = pytest.importorskip("ament_index_python", reason="ament_index_python is not installed")
try:
    SHARE = Path(ament_index.get_package_share_directory("omega_qvla_ros"))
except (OSError, LookupError) as missing:
    pytest.skip(f"omega_qvla_ros is not on AMENT_PREFIX_PATH: {missing}", allow_module_level=True)

from launched import LAUNCH, arguments_of, choices_of, stand_in, start

from omega_qvla_ros.bringup.robots import CAMERA_DRIVERS, CAMERAS, ROBOTS

GIVEN = {
    "checkpoint": "/data/pack",
    "robot_ip": "192.0.2.1",
    "joint_config_file": "motors.yaml",
    "front_device": "/dev/video0",
    "wrist_device": "123456",
}
SIMULATED = {"policy_node", "spawner", "create", "parameter_bridge", "robot_state_publisher"}


def every_choice(kind: str) -> list[pytest.param]:
    return [
        pytest.param(name, choice, id=f"{name}-{'-'.join('='.join(item) for item in choice.items()) or 'defaults'}")
        for name in ROBOTS
        for choice in choices_of(LAUNCH / f"{name}_{kind}.launch.py")
    ]


def required(name: str, kind: str) -> dict[str, str]:
    """Values for what a launch file asks for."""
    return {
        argument.name: GIVEN[argument.name]
        for argument in arguments_of(LAUNCH / f"{name}_{kind}.launch.py")
        if argument.name in GIVEN
    }


@pytest.fixture()
def prefix(tmp_path, monkeypatch) -> Path:
    """An ament prefix with stand-ins of everything that is not ours, in front of the real one."""
    for robot in ROBOTS.values():
        stand_in(tmp_path, robot.driver.package, [robot.driver.launch_file])
        for package in robot.simulation.descriptions:
            stand_in(tmp_path, package)
    for camera in CAMERA_DRIVERS.values():
        stand_in(tmp_path, camera.package, executables=[camera.executable])
    stand_in(tmp_path, "controller_manager", executables=["spawner"])
    stand_in(tmp_path, "robot_state_publisher", executables=["robot_state_publisher"])
    stand_in(tmp_path, "ros_gz_bridge", executables=["parameter_bridge"])
    stand_in(tmp_path, "ros_gz_sim", ["gz_sim.launch.py"], ["create"])
    xacro = tmp_path / "bin" / "xacro"
    xacro.parent.mkdir()
    xacro.write_text('#!/bin/sh\necho "<robot name=\\"$*\\"/>"\n')
    xacro.chmod(0o755)
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path}:{os.environ['AMENT_PREFIX_PATH']}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def given_to(prefix: Path, package: str, launch_file: str) -> dict[str, str]:
    """The arguments that a vendor's launch file was included with."""
    return ast.literal_eval((prefix / "share" / package / "launch" / launch_file).with_suffix(".given").read_text())


@pytest.mark.parametrize(("name", "choice"), every_choice("real"))
def test_real_arm_starts_driver_controllers_cameras_and_policy(name, choice, prefix, monkeypatch) -> None:
    robot = ROBOTS[name]
    started = start(LAUNCH / f"{name}_real.launch.py", required(name, "real") | choice, monkeypatch)
    cameras = CAMERA_DRIVERS.get(choice.get("cameras", "none"))
    expected = {"policy_node"} | ({"spawner"} if robot.spawned else set())
    if cameras is not None:
        expected |= {cameras.executable, f"{cameras.executable} 2"}
    assert set(started) == expected
    given = given_to(prefix, robot.driver.package, robot.driver.launch_file)
    argument, mocked, real = robot.driver.mock
    assert given[argument] == (mocked if choice.get("mock_hardware") == "true" else real)
    for argument in robot.driver.given:
        assert given[argument.vendor] == GIVEN.get(argument.name, argument.default)
    for key, value in robot.driver.fixed.items():
        assert given[key] == (str(SHARE / value[1:]) if value.startswith("@") else value)
    policy = started["policy_node"].parameters
    assert (policy["contract"], policy["checkpoint"], policy["use_sim_time"]) == (name, "/data/pack", False)
    if robot.spawned:
        command = started["spawner"].command
        assert command[2 : 2 + len(robot.spawned)] == list(robot.spawned)
        assert command[command.index("--param-file") + 1] == str(SHARE / "config/controllers" / f"{name}.yaml")


@pytest.mark.parametrize(("name", "choice"), every_choice("sim"))
def test_simulated_arm_starts_gazebo_bridge_controllers_and_policy(name, choice, prefix, monkeypatch) -> None:
    robot = ROBOTS[name]
    started = start(LAUNCH / f"{name}_sim.launch.py", required(name, "sim") | choice, monkeypatch)
    assert set(started) == SIMULATED
    world = given_to(prefix, "ros_gz_sim", "gz_sim.launch.py")["gz_args"]
    assert world.endswith(str(SHARE / "config/gz/table.sdf"))
    assert ("-s" in world.split()) == (choice.get("headless", "true") == "true")
    for node in ("policy_node", "parameter_bridge", "robot_state_publisher", "create"):
        assert started[node].parameters["use_sim_time"] is True, node
    assert started["policy_node"].parameters["contract"] == robot.simulation.contract
    assert started["parameter_bridge"].parameters["config_file"] == str(SHARE / "config/gz/bridge.yaml")
    command = started["spawner"].command
    assert command[2 : 2 + len(robot.simulation.controllers)] == list(robot.simulation.controllers)
    assert command[command.index("--param-file") + 1].endswith(f"{name}_sim.yaml")
    description = started["robot_state_publisher"].parameters["robot_description"]
    assert robot.simulation.xacro in description and f"{name}_sim.yaml" in description
    folders = started["create"].environment["GZ_SIM_RESOURCE_PATH"]
    assert len(folders.split(":")) == len(robot.simulation.descriptions)


def test_cameras_are_where_the_contract_looks_for_them(prefix, monkeypatch) -> None:
    arguments = required("franka_fr3", "real") | {"cameras": "realsense", "namespace": "cell"}
    started = start(LAUNCH / "franka_fr3_real.launch.py", arguments, monkeypatch)
    nodes = [node for name, node in started.items() if name.startswith("realsense2_camera_node")]
    assert {f"__ns:=/cell/{key}" for key in CAMERAS} == {
        part for node in nodes for part in node.command if "__ns" in part
    }
    for node in nodes:
        assert "~/color/image_raw:=image_raw" in node.command
        assert isinstance(node.parameters["serial_no"], str)
    assert "__ns:=/cell" in started["policy_node"].command and "__ns:=/cell" in started["spawner"].command
    assert given_to(prefix, "franka_bringup", "franka.launch.py")["namespace"] == "cell"


def test_camera_without_a_device_is_refused_before_the_policy_starts(prefix, monkeypatch, capfd) -> None:
    arguments = required("so101", "real") | {"cameras": "v4l2", "wrist_device": ""}
    assert start(LAUNCH / "so101_real.launch.py", arguments, monkeypatch) == {}
    assert "cameras:=v4l2 needs wrist_device:=..." in "".join(capfd.readouterr())

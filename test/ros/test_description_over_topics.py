"""``robot_description`` and the pictures for people, with the policy node as a real process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from graph_fixtures import Graph
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image
from sensor_publisher import publish_sensors
from std_msgs.msg import String

from omega_qvla_core.envs.tabletop import JOINT_NAMES
from omega_qvla_ros.resources import config_file

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
LINK_M = 0.1
NARROW_RAD = 0.022
"""The sensors of these tests say 0.02 for every joint, so next to no room is left upwards."""


def urdf(limit_rad: float = NARROW_RAD) -> str:
    """An arm with the tabletop arm's joints in a row, each within plus and minus ``limit_rad``."""
    joints = "".join(
        f'<link name="link_{k}"/><joint name="{name}" type="{"prismatic" if name == "gripper" else "revolute"}">'
        f'<parent link="{"base" if k == 0 else f"link_{k - 1}"}"/><child link="link_{k}"/>'
        f'<origin xyz="0 0 {LINK_M}"/><axis xyz="0 1 0"/>'
        f'<limit lower="{0.0 if name == "gripper" else -limit_rad}" upper="{0.04 if name == "gripper" else limit_rad}" '
        'velocity="1.0" effort="1"/></joint>'
        for k, name in enumerate(JOINT_NAMES)
    )
    return f'<robot name="arm"><link name="base"/>{joints}</robot>'


def contract(folder: Path, use: str, timeout_s: float = 0.5, own_limits: bool = False) -> str:
    """The tabletop robot that leaves its limits to the URDF, or keeps the file's."""
    data = yaml.safe_load(config_file("robots/tabletop.yaml").read_text(encoding="utf-8"))
    data["robot_description"] = {"use": use, "timeout_s": timeout_s}
    data["limits"] = {"mode": "clamp", "reject_beyond_range": None}
    for joint in data["joints"]:
        joint["max_jump"] = 10.0
        for key in () if own_limits else ("position_min", "position_max", "max_velocity"):
            del joint[key]
    path = folder / f"{use}_{own_limits}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


def start_inactive(graph: Graph, checkpoint: str, **parameters: object) -> None:
    graph.start_policy(checkpoint=checkpoint, use_sim_time=False, **parameters)


def wait_refusal(graph: Graph, words: str) -> None:
    """configure fails, and the report says why."""
    assert not graph.transition("configure") and graph.lifecycle() == "unconfigured"
    graph.wait(lambda: words in graph.diagnostics.get("policy_node", ("",))[0], words)


def test_limits_of_the_description_hold_the_arm(graph: Graph, checkpoint: str, tmp_path: Path) -> None:
    """First it is missing, then the contract is looser than it, then its limits are the ones that clamp."""
    publish_sensors(graph)
    start_inactive(graph, checkpoint, contract=contract(tmp_path, "required"))
    wait_refusal(graph, "no URDF on 'robot_description' within 0.5 s")

    graph.node.create_publisher(String, "robot_description", LATCHED).publish(String(data=urdf()))
    loose = contract(tmp_path, "required", timeout_s=30.0, own_limits=True)
    assert graph.set_parameter("policy_node", "contract", loose).successful
    wait_refusal(graph, "looser than the URDF's")

    patient = contract(tmp_path, "required", timeout_s=30.0)
    assert graph.set_parameter("policy_node", "contract", patient).successful
    assert graph.transition("configure") and graph.transition("activate")
    graph.wait(lambda: any(key.startswith("clamped_position.joint_") for key in graph.policy()), "a clamped target")
    assert graph.commands
    for _, command in graph.commands:
        arm = np.array([point.positions[:6] for point in command.points])
        assert np.abs(arm).max() <= NARROW_RAD + 1e-9


@pytest.mark.parametrize(("own_limits", "configured"), [(True, True), (False, False)])
def test_optional_description_that_does_not_come_leaves_the_contracts_limits(
    graph: Graph, checkpoint: str, tmp_path: Path, own_limits: bool, configured: bool
) -> None:
    start_inactive(graph, checkpoint, contract=contract(tmp_path, "optional", own_limits=own_limits))
    assert graph.transition("configure") is configured
    if configured:
        assert "the contract's limits alone hold" in graph.logs()
    else:
        assert "has no max_velocity" in graph.logs()


def test_picture_is_drawn_while_somebody_looks(graph: Graph, checkpoint: str) -> None:
    publish_sensors(graph)
    start_inactive(graph, checkpoint, debug_image=True, auto_activate=True)
    images: list[Image] = []
    graph.node.create_subscription(Image, "policy_node/debug/image", images.append, qos_profile_sensor_data)
    graph.wait(lambda: images, "the picture")
    graph.wait(lambda: graph.commands, "commands")
    picture = images[-1]
    assert picture.encoding == "rgb8" and len(picture.data) == picture.step * picture.height
    assert picture.width >= 320 and picture.height > 160  # both cameras, and the text under them
    assert graph.set_parameter("policy_node", "debug_image", False).successful
    graph.spin(0.5)  # what was under way
    images.clear()
    graph.spin(0.7)
    assert images == []
    assert graph.transition("deactivate") and graph.transition("cleanup")  # frees publisher and thread
    assert graph.transition("configure")


def test_way_of_the_tip_link_is_drawn_to_the_end_of_the_plan(graph: Graph, checkpoint: str) -> None:
    markers = pytest.importorskip("visualization_msgs.msg", reason="visualization_msgs is not installed")
    publish_sensors(graph)
    graph.node.create_publisher(String, "robot_description", LATCHED).publish(String(data=urdf(3.0)))
    start_inactive(graph, checkpoint, debug_trajectory=True, auto_activate=True)
    ways: list = []
    graph.node.create_subscription(
        markers.MarkerArray, "policy_node/debug/trajectory", ways.append, qos_profile_sensor_data
    )
    graph.wait(lambda: any(len(way.markers[0].points) > 1 for way in ways), "a way")
    way = next(way for way in ways if len(way.markers[0].points) > 1).markers[0]
    assert way.header.frame_id == "base" and way.type == markers.Marker.LINE_STRIP and way.ns == "link_6"
    assert way.color.a > 0.0 and way.scale.x > 0.0
    # Six revolute joints in a row, nearly straight; the seventh slides sideways.
    heights = np.array([point.z for point in way.points])
    assert np.abs(heights - len(JOINT_NAMES) * LINK_M).max() < 0.1
    assert graph.trigger("policy_node/stop").success
    graph.wait(lambda: ways[-1].markers[0].action == markers.Marker.DELETE, "the end of the way")

"""Outputs and inputs that the demo does not have, with the policy node as a real process.

A forward position controller, a compressed camera, and a gripper with a topic of its own.
"""

from __future__ import annotations

import array
from pathlib import Path

import cv2
import numpy as np
import yaml
from graph_fixtures import DEADLINE_S, Graph
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState
from sensor_publisher import publish_sensors
from std_msgs.msg import Float64MultiArray

from omega_qvla_core.envs.tabletop import JOINT_NAMES
from omega_qvla_ros.resources import config_file

TOPIC = "forward_position_controller/commands"
BACKWARDS = tuple(reversed(JOINT_NAMES[:6]))
POSITIONS = {name: 0.1 * (k + 1) for k, name in enumerate(JOINT_NAMES[:6])} | {"gripper": 0.02}
"""Far enough apart to tell which joint a number belongs to."""


def contract(folder: Path, **changes: object) -> str:
    """The tabletop robot with other top-level keys."""
    data = yaml.safe_load(config_file("robots/tabletop.yaml").read_text(encoding="utf-8"))
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}), encoding="utf-8")
    return str(path)


def apart(state: JointState, image: Image) -> None:
    state.position = [POSITIONS[name] for name in state.name]


def test_position_of_every_period_goes_to_a_forward_controller_in_the_outputs_order(
    graph: Graph, checkpoint: str, tmp_path: Path
) -> None:
    publish_sensors(graph, apart)
    outputs = [
        {"type": "float64_multi_array", "name": TOPIC, "joints": list(BACKWARDS)},
        {"type": "joint_trajectory", "name": "joint_trajectory"},
    ]
    file = contract(tmp_path, outputs=outputs)
    policy = graph.start_policy(checkpoint=checkpoint, contract=file, use_sim_time=False, auto_activate=True)
    graph.wait_policy("HOLD", f"nobody subscribes to '{TOPIC}'")
    assert graph.commands == []  # the other output alone moves nothing
    came: list[np.ndarray] = []
    graph.node.create_subscription(
        Float64MultiArray, TOPIC, lambda message: came.append(np.array(message.data)), QoSProfile(depth=50)
    )
    graph.wait(lambda: len(came) > 40, "two seconds of positions")
    positions = np.array(came)
    assert positions.shape[1] == len(BACKWARDS) and np.isfinite(positions).all()
    measured = [POSITIONS[name] for name in BACKWARDS]
    np.testing.assert_allclose(positions[0], measured, atol=0.04)  # where the arm is, in this output's order
    assert all(command.joint_names == ("gripper",) for _, command in graph.commands) and graph.commands

    limits = {j["name"]: j["max_velocity"] for j in yaml.safe_load(Path(file).read_text())["joints"]}
    # A hold is streamed sample by sample to its end: a forward controller stops where the last one says.
    count = len(came)
    assert policy.stop(DEADLINE_S) == 0
    graph.spin(0.5)
    last = np.array(came[count:])
    assert len(last) >= 2
    np.testing.assert_allclose(last[-1], last[-2], atol=1e-9)
    # Twice a period: a message of a period that the probe did not hear may be missing in between.
    most = np.array([2.0 * 0.05 * limits[name] for name in BACKWARDS]) * (1 + 1e-6)
    assert (np.abs(np.diff(positions, axis=0)) <= most).all()


def test_compressed_camera_is_decoded_and_a_broken_one_holds_the_arm(
    graph: Graph, checkpoint: str, tmp_path: Path
) -> None:
    publish_sensors(graph)
    data = yaml.safe_load(config_file("robots/tabletop.yaml").read_text(encoding="utf-8"))
    cameras = [dict(camera, timeout_s=0.6) for camera in data["cameras"]]
    cameras[0] |= {"transport": "compressed", "topic": "front/image_raw/compressed", "encoding": "rgb8"}
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    sent = {"data": jpeg}
    publisher = graph.node.create_publisher(CompressedImage, cameras[0]["topic"], qos_profile_sensor_data)

    def tick() -> None:
        message = CompressedImage(format="jpeg", data=array.array("B", sent["data"]))
        message.header.stamp = graph.node.get_clock().now().to_msg()
        publisher.publish(message)

    graph.node.create_timer(0.05, tick)
    file = contract(tmp_path, cameras=cameras)
    policy = graph.start_policy(checkpoint=checkpoint, contract=file, use_sim_time=False, auto_activate=True)
    graph.wait(lambda: graph.commands, "commands")
    sent["data"] = jpeg[: len(jpeg) // 2]
    graph.wait_policy("HOLD", "'front/image_raw/compressed' is stale")
    assert int(graph.policy()["dropped.front:undecodable"]) > 3
    assert policy.returncode is None
    sent["data"] = jpeg
    graph.wait_policy("OK")


def test_gripper_with_a_topic_of_its_own_is_heard_and_holds_the_arm_when_it_stops(
    graph: Graph, checkpoint: str, tmp_path: Path
) -> None:
    """What joint_states says of it, as a joint_state_publisher would, is not taken."""
    data = yaml.safe_load(config_file("robots/tabletop.yaml").read_text(encoding="utf-8"))
    source = {"topic": "hand/joint_states", "joints": ["gripper"], "timeout_s": 0.6}
    sensors = data["sensors"] | {"joint_states_timeout_s": 0.6, "joint_sources": [source]}
    hand = graph.node.create_publisher(JointState, source["topic"], qos_profile_sensor_data)
    silent = {"hand": True}

    def tick(state: JointState, image: Image) -> None:
        if not silent["hand"]:
            own = JointState(header=state.header, name=["gripper"], position=[0.01])
            hand.publish(own)
        state.position[list(state.name).index("gripper")] = 0.035

    publish_sensors(graph, tick)
    cameras = [dict(camera, timeout_s=0.6) for camera in data["cameras"]]
    file = contract(tmp_path, sensors=sensors, cameras=cameras)
    graph.start_policy(checkpoint=checkpoint, contract=file, use_sim_time=False, auto_activate=True)
    graph.wait_policy("HOLD", "nothing received on 'hand/joint_states'")
    assert graph.commands == []
    silent["hand"] = False
    graph.wait(lambda: graph.commands, "commands")
    first = graph.commands[0][1]
    assert first.points[0].positions[first.joint_names.index("gripper")] == 0.01  # where it was measured
    graph.wait(lambda: float(graph.policy()["age_s.hand/joint_states"]) < 0.6, "its age in the diagnostics")
    silent["hand"] = True
    graph.wait_policy("HOLD", "'hand/joint_states' is stale")
    silent["hand"] = False
    graph.wait_policy("OK")

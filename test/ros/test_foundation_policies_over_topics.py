"""The policy node with public checkpoints: sensors from the test over topics, until a valid trajectory comes back."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from graph_fixtures import Graph
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from foundation_folders import JOINTS, nvidia_folder, openpi_folder

MEASURED = {"shoulder": 0.3, "elbow": -0.2, "gripper": 0.1}
SPREAD_RAD = 0.002
"""Half range of the actions' statistics: random weights then move the arm by a few millirad."""
LIMITS = {"unit": "rad", "position_min": -1.0, "position_max": 1.0, "max_velocity": 2.0, "max_acceleration": 10.0}


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def pi05_checkpoint(folder: Path) -> Path:
    """The recorded tiny Pi 0.5 as an openpi folder for this robot."""
    openpi_folder(folder)

    def narrow(data):
        data["norm_stats"]["actions"].update(q01=[-SPREAD_RAD] * 8, q99=[SPREAD_RAD] * 8)

    edit(folder / "assets" / "lab" / "robot" / "norm_stats.json", narrow)
    edit(folder / "omega_qvla.json", lambda data: data["robot"].update(action_modes=["delta"] * 3))
    return folder


def gr00t_checkpoint(folder: Path) -> Path:
    """The recorded tiny GR00T N1.5 as an NVIDIA folder for this robot."""
    nvidia_folder(folder)

    def narrow(data):
        for stats in data["tiny"]["statistics"]["action"].values():
            stats["min"] = [-SPREAD_RAD for _ in stats["min"]]
            stats["max"] = [SPREAD_RAD for _ in stats["max"]]

    edit(folder / "experiment_cfg" / "metadata.json", narrow)
    edit(folder / "omega_qvla.json", lambda data: data["robot"].update(action_modes=["delta"] * 3))
    return folder


def contract(folder: Path) -> Path:
    data = {
        "format_version": 1,
        "name": "lab",
        "control_rate_hz": 20.0,
        "cameras": [{"key": key, "topic": f"{key}/image_raw", "timeout_s": 2.0} for key in ("front", "wrist")],
        "joints": [{"name": name, **LIMITS} for name in JOINTS],
        # The test's process and the node share two cores with other work.
        "sensors": {"joint_states_timeout_s": 2.0, "sync_tolerance_s": 1.0},
        "chunk": {"execution_horizon_steps": 4},
    }
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def publish_sensors(graph: Graph) -> None:
    """Two cameras and three joints at 20 Hz, from the probe node."""
    node, pixels = graph.node, np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cameras = [node.create_publisher(Image, f"{key}/image_raw", qos_profile_sensor_data) for key in ("front", "wrist")]
    joints = node.create_publisher(JointState, "joint_states", qos_profile_sensor_data)

    def tick() -> None:
        stamp = node.get_clock().now().to_msg()
        message = JointState(name=list(MEASURED), position=list(MEASURED.values()), velocity=[0.0] * 3)
        message.header.stamp = stamp
        joints.publish(message)
        for camera in cameras:
            image = Image(height=96, width=128, encoding="rgb8", step=384, data=pixels.tobytes())
            image.header.stamp = stamp
            camera.publish(image)

    node.create_timer(0.05, tick)


@pytest.mark.parametrize("make", [pi05_checkpoint, gr00t_checkpoint], ids=["pi05", "gr00t_n15"])
def test_a_valid_trajectory_comes_back(graph: Graph, tmp_path: Path, make) -> None:
    checkpoint = make(tmp_path / "checkpoint")
    publish_sensors(graph)
    policy = graph.start_policy(
        checkpoint=str(checkpoint),
        contract=str(contract(tmp_path)),
        instruction="lift the red cube",
        use_sim_time=False,
        auto_activate=True,
    )
    measured = np.array([MEASURED[name] for name in JOINTS])

    def moving() -> bool:
        """A plan, not a hold: some point is away from where the arm is."""
        return any(np.abs(point.positions - measured).max() > 1e-5 for _, one in graph.commands for point in one.points)

    graph.wait(moving, "a trajectory that moves")
    for _, trajectory in graph.commands:
        assert tuple(trajectory.joint_names) == JOINTS
        positions = np.array([point.positions for point in trajectory.points])
        velocities = np.array([point.velocities for point in trajectory.points])
        assert np.isfinite(positions).all() and np.isfinite(velocities).all()
        assert (np.abs(positions) <= 1.0).all() and (np.abs(velocities) <= 2.0 + 1e-9).all()
        times = [point.time_from_start_ns for point in trajectory.points]
        assert all(later > earlier for earlier, later in pairwise(times))
    last = np.array([point.positions for point in graph.commands[-1][1].points])
    assert np.abs(last - measured).max() < 50 * SPREAD_RAD
    graph.wait_policy("OK")
    assert policy.returncode is None

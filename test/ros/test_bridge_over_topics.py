"""The simulator bridge as a process: clock, sensors, its controller's rules over topics, reset and results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graph_fixtures import Graph
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_core.envs.tabletop import JOINT_NAMES, Task
from omega_qvla_ros import msgs
from omega_qvla_ros.nodes.mujoco_bridge_node import _spin
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

S = 1_000_000_000


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    made = Graph(tmp_path_factory.mktemp("bridge"))
    made.start_bridge(seed=400_001, task="touch:red", episode_limit_s=3.0, overview=True)
    made.publisher = made.node.create_publisher(JointTrajectoryMsg, "joint_trajectory", 1)
    made.wait(lambda: made.joints and made.publisher.get_subscription_count() >= 2, "the bridge")
    yield made
    made.close()


def send(graph: Graph, *points: TrajectoryPoint, names=JOINT_NAMES, stamp_ns: int = 0) -> None:
    graph.publisher.publish(msgs.trajectory_to_msg(JointTrajectory(tuple(names), stamp_ns, points)))


def positions(graph: Graph) -> np.ndarray:
    return np.array([graph.joints[name] for name in JOINT_NAMES])


def reset(graph: Graph) -> dict:
    response = graph.trigger("mujoco_bridge_node/reset")
    assert response.success, response.message
    return json.loads(response.message)


def test_best_effort_cameras_arrive_with_camera_info(graph: Graph) -> None:
    images: dict[str, list[Image]] = {"front": [], "wrist": [], "overview": []}
    infos: list[CameraInfo] = []
    subscriptions = [
        graph.node.create_subscription(Image, f"{key}/image_raw", images[key].append, qos_profile_sensor_data)
        for key in images
    ]
    subscriptions.append(
        graph.node.create_subscription(CameraInfo, "front/camera_info", infos.append, qos_profile_sensor_data)
    )
    graph.wait(lambda: len(images["front"]) >= 21 and len(images["wrist"]) >= 21, "images of both cameras")
    for subscription in subscriptions:
        graph.node.destroy_subscription(subscription)
    stamps = np.array([msgs.stamp_to_ns(message.header.stamp) for message in images["front"]])
    assert (np.diff(stamps) == S // 20).mean() > 0.5  # with the defaults of Fast DDS one of twenty arrives
    first = images["front"][0]
    assert (first.height, first.width, first.encoding, first.header.frame_id) == (
        128,
        128,
        "rgb8",
        "front_optical_frame",
    )
    assert msgs.image_to_rgb(first).std() > 5.0
    assert (images["overview"][0].height, images["overview"][0].width) == (368, 480)
    assert infos[0].k[0] == pytest.approx(64 / np.tan(np.deg2rad(39) / 2))
    assert {message.header.frame_id for message in images["wrist"]} == {"wrist_optical_frame"}


def test_reset_reads_parameters_places_the_arm_and_never_turns_the_clock_back(graph: Graph) -> None:
    assert graph.set_parameter("mujoco_bridge_node", "seed", 400_007).successful
    assert graph.set_parameter("mujoco_bridge_node", "task", "lift:green").successful
    refused = graph.set_parameter("mujoco_bridge_node", "task", "lift:purple")
    assert not refused.successful and "purple" in refused.reason
    episode = reset(graph)
    assert episode["seed"] == 400_007 and episode["task"] == "lift:green"
    assert episode["instruction"] == Task("lift", "green").wording(400_007)
    graph.spin_sim(0.2)
    first = positions(graph)
    graph.set_parameter("mujoco_bridge_node", "seed", 400_008)
    reset(graph)
    graph.spin_sim(0.2)
    assert np.abs(positions(graph) - first)[:6].max() > 1e-3
    graph.set_parameter("mujoco_bridge_node", "seed", 400_007)
    assert reset(graph)["episode"] == episode["episode"] + 2
    graph.spin_sim(0.2)
    np.testing.assert_allclose(positions(graph), first, atol=1e-3)
    assert (np.diff(graph.clock_ns) > 0).all()


def test_trajectory_is_executed_with_joints_in_any_order(graph: Graph) -> None:
    reset(graph)
    graph.spin_sim(0.2)
    start = positions(graph)
    goal = start.copy()
    goal[0] += 0.3
    order = list(reversed(range(7)))
    send(graph, TrajectoryPoint(goal[order], S // 2, np.zeros(7)), names=[JOINT_NAMES[k] for k in order])
    graph.wait(lambda: abs(graph.joints["joint_1"] - goal[0]) < 0.02, "joint_1 at its goal")
    np.testing.assert_allclose(positions(graph)[1:6], start[1:6], atol=0.03)


@pytest.mark.parametrize("case", ["empty", "unknown joint", "joint twice", "moving end", "old", "not increasing"])
def test_trajectory_that_a_controller_rejects_is_counted_with_its_reason_and_does_not_move(
    graph: Graph, case: str
) -> None:
    reset(graph)
    graph.spin_sim(0.1)
    here = positions(graph)
    # The last report will do: none of these tests ends before what it sent is in one.
    graph.wait(graph.bridge, "a report of the bridge")
    before = int(graph.bridge()["trajectories_rejected"])
    goal = here + 0.2
    point = TrajectoryPoint(goal, S, np.zeros(7))
    if case == "empty":
        send(graph)
    elif case == "unknown joint":
        send(graph, point, names=(*JOINT_NAMES[:-1], "elbow"))
    elif case == "joint twice":
        send(graph, point, names=(*JOINT_NAMES[:-1], JOINT_NAMES[0]))
    elif case == "moving end":
        send(graph, TrajectoryPoint(goal, S, np.full(7, 0.1)))
    elif case == "old":
        send(graph, TrajectoryPoint(goal, 1, np.zeros(7)), stamp_ns=graph.clock_ns[-1] - S // 20)
    else:
        send(graph, point, point)
    # Three reports: the message may need longer than one.
    for _ in range(3):
        report = graph.fresh_bridge()
        if int(report["trajectories_rejected"]) > before:
            break
    assert int(report["trajectories_rejected"]) == before + 1
    assert sum(int(v) for k, v in report.items() if k.startswith("rejected.")) == before + 1
    np.testing.assert_allclose(positions(graph)[:6], here[:6], atol=0.02)


def test_episode_is_judged_from_its_first_command_and_the_arm_holds_after_its_end(graph: Graph) -> None:
    graph.set_parameter("mujoco_bridge_node", "task", "touch:blue")
    episode = reset(graph)
    count = len(graph.results)
    graph.spin_sim(0.5)  # nothing is counted while nobody commands
    goal = positions(graph)
    goal[0] += 0.5
    send(graph, TrajectoryPoint(goal, 10 * S, np.zeros(7)))
    graph.wait(lambda: len(graph.results) > count, "the result")
    result = graph.results[-1]
    assert result["episode"] == episode["episode"] and result["task"] == "touch:blue"
    assert result["success"] is False and result["stage"] == "none" and result["wrong_colour"] is False
    assert result["sim_time_s"] == pytest.approx(3.0, abs=0.06) and result["steps"] == 60
    graph.spin_sim(0.3)
    held = positions(graph)
    send(graph, TrajectoryPoint(goal, S // 2, np.zeros(7)))
    graph.spin_sim(1.0)
    np.testing.assert_allclose(positions(graph), held, atol=0.01)
    assert held[0] < goal[0] - 0.2


def test_trajectory_with_nan_is_counted_and_the_arm_holds_its_last_command(graph: Graph) -> None:
    """A stock controller accepts it; the simulator must survive it."""
    reset(graph)
    graph.spin_sim(0.2)
    count, here = len(graph.results), positions(graph)
    broken = here + 0.3
    broken[2] = np.nan
    send(graph, TrajectoryPoint(here, S // 10, np.zeros(7)), TrajectoryPoint(broken, S, np.zeros(7)))
    graph.wait(lambda: "trajectories_not_finite" in graph.bridge(), "the count in the diagnostics")
    assert "without finite positions" in graph.diagnostics["mujoco_bridge_node"][0]
    np.testing.assert_allclose(positions(graph)[:6], here[:6], atol=0.03)
    assert graph.processes[0].returncode is None and "'joint_3'" in graph.processes[0].log_text()
    goal = here.copy()
    goal[0] += 0.2
    send(graph, TrajectoryPoint(goal, S // 2, np.zeros(7)))
    graph.wait(lambda: abs(graph.joints["joint_1"] - goal[0]) < 0.02, "joint_1 at its goal")
    graph.wait(lambda: len(graph.results) > count, "the result")
    assert graph.results[-1]["not_finite_trajectories"] == 1


def test_executor_that_dies_ends_the_process_with_an_error() -> None:
    """A bridge without its executor would go on simulating, deaf."""

    class Broken:
        def spin(self) -> None:
            raise ValueError("a callback raised")

    stopping: list[int] = []
    died: list[Exception] = []
    _spin(Broken(), stopping, died)
    assert stopping and "a callback raised" in str(died[0])

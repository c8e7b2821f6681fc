"""The recorder as a process: what it hears is in the bag; a full disk ends the recording and nothing else."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
from bag_fixtures import told
from diagnostic_msgs.msg import DiagnosticStatus
from graph_fixtures import Graph
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from omega_qvla_ros import msgs
from omega_qvla_ros.bags.reader import Bag

RECORDER = "omega_qvla_ros.nodes.recorder_node"


class Robot:
    """Publishes what a robot and its policy node would."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        node = graph.node
        kept = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.image = node.create_publisher(Image, "front/image_raw", 5)
        self.joints = node.create_publisher(JointState, "joint_states", 10)
        self.instruction = node.create_publisher(String, "policy_node/instruction", 10)
        self.status = node.create_publisher(DiagnosticStatus, "policy_node/status", kept)
        self.sent = 0

    def publish(self) -> None:
        now_ns = self.graph.node.get_clock().now().nanoseconds
        message = msgs.rgb_to_image(np.full((64, 64, 3), self.sent % 256, dtype=np.uint8), now_ns, "front")
        self.image.publish(message)
        self.joints.publish(JointState(header=msgs.header(now_ns), name=["joint_1"], position=[0.1]))
        self.sent += 1

    def heard(self) -> bool:
        return all(p.get_subscription_count() for p in (self.image, self.joints, self.instruction, self.status))


def report(graph: Graph) -> dict[str, str]:
    return graph.diagnostics.get("recorder_node", ("", {}))[1]


def test_recorder_hears_the_robot_and_closes_its_bag_on_sigint(graph: Graph, tmp_path: Path) -> None:
    robot = Robot(graph)
    robot.status.publish(told("touch the red cube"))  # before the recorder is there: kept for late joiners
    folder = tmp_path / "run"
    recorder = graph.start(RECORDER, {"bag": str(folder), "min_free_mb": 1})
    graph.wait(robot.heard, "the recorder's subscriptions")
    robot.instruction.publish(String(data="lift the green cube"))

    def written() -> bool:
        robot.publish()
        return int(report(graph).get("written./front/image_raw", 0)) > 20

    graph.wait(written, "20 recorded images")
    assert report(graph)["state"] == "recording" and report(graph)["messages_dropped"] == "0"
    refused = graph.trigger("recorder_node/start")
    assert not refused.success and "already" in refused.message
    assert graph.trigger("recorder_node/stop").success
    with Bag(folder) as bag:
        assert bag.topics["/front/image_raw"].count > 20 and bag.topics["/policy_node/status"].count == 1
        texts = [m.message.data for m in bag.messages({"/policy_node/instruction"})]
        assert texts == ["lift the green cube"]
        joints = next(bag.messages({"/joint_states"})).message
        assert list(joints.name) == ["joint_1"] and list(joints.position) == [0.1] and not len(joints.velocity)
    assert graph.trigger("recorder_node/start").success  # a bag of its own, beside the first
    graph.wait(lambda: report(graph).get("bag") == f"{folder}_1", "the second bag")
    for _ in range(10):
        robot.publish()
    graph.wait(lambda: int(report(graph).get("written./front/image_raw", 0)) > 0, "images in the second bag")
    recorder.send(signal.SIGINT)
    graph.wait(lambda: recorder.returncode is not None, "the recorder's end")
    assert recorder.returncode == 0, recorder.log_text()
    assert (tmp_path / "run_1" / "metadata.yaml").is_file()
    with Bag(tmp_path / "run_1") as bag:
        assert bag.topics["/front/image_raw"].count > 0


FULL = """
import resource
from omega_qvla_ros.nodes import recorder_node
resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, resource.RLIM_INFINITY))
if __name__ == "__main__":
    recorder_node.main()
"""


def test_full_disk_degrades_the_recorder_which_lives_on(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "full_recorder.py").write_text(FULL, encoding="utf-8")
    graph.environment = {**graph.environment, "PYTHONPATH": str(tmp_path)}
    robot = Robot(graph)
    recorder = graph.start("full_recorder", {"bag": str(tmp_path / "run"), "min_free_mb": 1})
    graph.wait(robot.heard, "the recorder's subscriptions")

    def degraded() -> bool:
        robot.publish()
        return report(graph).get("state") == "degraded"

    graph.wait(degraded, "the recorder's report of a full disk")
    message = graph.diagnostics["recorder_node"][0]
    assert message.startswith("DEGRADED: the bag") and "cannot be written" in message
    dropped = int(report(graph)["messages_dropped"])

    def dropping() -> bool:
        robot.publish()
        return int(report(graph)["messages_dropped"]) > dropped

    graph.wait(dropping, "the count of what is not recorded")
    assert recorder.returncode is None
    with Bag(tmp_path / "run") as bag:
        assert bag.topics["/front/image_raw"].count > 10
    recorder.send(signal.SIGTERM)
    graph.wait(lambda: recorder.returncode is not None, "the recorder's end")
    assert recorder.returncode == 0, recorder.log_text()

"""Faults of the robot and of its sensors, with the policy node as a real process."""

from __future__ import annotations

import numpy as np
import pytest
from graph_fixtures import Graph
from sensor_msgs.msg import Image, JointState
from sensor_publisher import publish_sensors
from trajectory_msgs.msg import JointTrajectory

from omega_qvla_ros.trajectory import REST_NS


def test_restart_then_stop_stops_the_arm(graph: Graph, checkpoint: str) -> None:
    """The restart's hold is on the wire before the plan is forgotten."""
    graph.start_bridge(episode_limit_s=1000.0)
    graph.start_policy(checkpoint=checkpoint, auto_activate=True)
    graph.wait(lambda: graph.joints and graph.arm_speed() > 0.05, "the arm moves")
    count = len(graph.commands)
    assert graph.trigger("policy_node/restart").success
    assert graph.trigger("policy_node/stop").success
    stopped = graph.arm()
    graph.spin_sim(1.0)
    after = [command for _, command in graph.commands[count:]]
    assert after and graph.arm_speed() < 0.01
    # Braking from the tabletop arm's speed limits takes at most 0.2 s and 0.3 rad; a window goes on for 0.8 s.
    np.testing.assert_array_equal(after[-1].points[-1].velocities, 0.0)
    assert after[-1].end_ns - REST_NS - after[-1].stamp_ns < 600_000_000
    np.testing.assert_allclose(graph.arm(), after[-1].points[-1].positions[:6], atol=0.03)
    assert np.abs(graph.arm() - stopped).max() < 0.2
    assert graph.trigger("policy_node/start").success
    graph.wait(lambda: graph.arm_speed() > 0.02, "the arm moves again")
    assert graph.fresh_bridge()["trajectories_rejected"] == "0"


def test_arm_whose_controller_is_inactive_is_held_and_latched(graph: Graph) -> None:
    """The commands go nowhere, so the arm never follows; the shipped policy asks for the same motion for ever."""
    graph.node.create_subscription(JointTrajectory, "nowhere", lambda _: None, 10)
    graph.start_bridge(task="touch:red", episode_limit_s=1000.0)
    graph.start_policy({"joint_trajectory": "nowhere"}, checkpoint="tabletop_w4a4", auto_activate=True)
    graph.wait_policy("LATCHED", "3 tracking losses in a row, the last one: joint 'joint_")
    assert int(graph.policy()["tracking_lost"]) == 3
    assert graph.trigger("policy_node/reset_fault").message.startswith("cleared: 3 tracking losses")


def test_sim_time_without_a_clock_is_reported(graph: Graph, checkpoint: str) -> None:
    graph.start_policy(checkpoint=checkpoint, auto_activate=True, use_sim_time=True)
    graph.wait(
        lambda: "no /clock is published; set use_sim_time:=false" in graph.diagnostics.get("policy_node", ("",))[0],
        "the warning about the clock",
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"control_rate_hz": 0.1}, "control_rate_hz is 0.1, the contract 'tabletop' commands at 20 Hz"),
        ({"instruction": "   "}, "'instruction' is '   '"),
        ({"execution_horizon": 1000}, "execution_horizon is 1000"),
    ],
)
def test_configure_refuses(graph: Graph, checkpoint: str, given: dict, words: str) -> None:
    graph.start_policy(**{"checkpoint": checkpoint, "use_sim_time": False, **given})
    assert not graph.transition("configure")
    graph.wait(lambda: words in graph.diagnostics.get("policy_node", ("",))[0], words)
    assert graph.lifecycle() == "unconfigured"


def test_wrong_image_encoding_never_moves_the_arm_and_is_named(graph: Graph, checkpoint: str) -> None:
    def spoil(_: JointState, image: Image) -> None:
        image.encoding, image.step, image.data = "16UC1", 256, bytes(128 * 256)

    publish_sensors(graph, spoil)
    policy = graph.start_policy(checkpoint=checkpoint, use_sim_time=False, auto_activate=True)
    graph.wait_policy("HOLD", "'front/image_raw': encoding '16UC1' is not understood; publish one of rgb8")
    graph.wait(lambda: "image dropped: 'front/image_raw': encoding '16UC1'" in policy.log_text(), "the error")
    assert graph.commands == []

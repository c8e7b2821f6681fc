"""Bridge and policy node as real processes that talk over ROS topics: the main job and what can go wrong with it."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from graph_fixtures import DEADLINE_S, Graph
from std_msgs.msg import String

from omega_qvla_ros.resources import config_file
from omega_qvla_ros.trajectory import REST_NS

CONTRACT = config_file("robots/tabletop.yaml")


def wait_until_the_arm_has_moved(graph: Graph, distance_rad: float = 0.05) -> None:
    graph.wait(lambda: graph.joints, "joint states")
    start = graph.arm()
    graph.wait(lambda: np.abs(graph.arm() - start).max() > distance_rad, "the arm has moved")


def test_arm_moves_until_the_episode_ends_and_sigint_holds_it(graph: Graph, checkpoint: str) -> None:
    """The main job, end to end; then Ctrl-C in the middle of a motion."""
    bridge = graph.start_bridge(task="touch:red", episode_limit_s=2.0)
    policy = graph.start_policy(checkpoint=checkpoint, auto_activate=True)
    wait_until_the_arm_has_moved(graph)
    graph.wait(lambda: graph.results, "the episode's result")
    result = graph.results[0]
    assert (result["task"], result["seed"]) == ("touch:red", 400_000) and result["stage"] in (
        "none",
        "reached",
        "touched",
    )
    # A random policy does not touch the cube: the limit of 2 s ends the episode, 40 control periods.
    assert result["success"] is False and result["sim_time_s"] == pytest.approx(2.0) and result["steps"] == 40
    assert result["rejected_trajectories"] == 0 and result["not_finite_trajectories"] == 0
    report = graph.fresh_bridge()
    assert report["trajectories_rejected"] == "0" and int(report["trajectories_accepted"]) > 5

    graph.set_parameter("mujoco_bridge_node", "episode_limit_s", 100.0)
    graph.trigger("policy_node/stop")
    graph.trigger("mujoco_bridge_node/reset")
    assert graph.trigger("policy_node/start").success
    wait_until_the_arm_has_moved(graph)
    policy.send(signal.SIGINT)
    graph.wait(lambda: policy.returncode is not None, "the policy node's end")
    assert policy.returncode == 0, policy.log_text()
    graph.spin_sim(0.5)
    last = graph.commands[-1][1]
    np.testing.assert_array_equal(last.points[-1].velocities, 0.0)
    assert last.end_ns - REST_NS - last.stamp_ns < 1_000_000_000  # a hold, not the rest of a chunk
    np.testing.assert_allclose(last.points[-1].positions, last.points[-2].positions)
    assert graph.arm_speed() < 0.01
    np.testing.assert_allclose(graph.arm(), last.points[-1].positions[:6], atol=0.03)
    assert graph.fresh_bridge()["trajectories_rejected"] == "0"
    assert bridge.stop() == 0, bridge.log_text()


def test_arm_stops_by_itself_when_the_policy_node_is_killed(graph: Graph, checkpoint: str) -> None:
    graph.start_bridge(episode_limit_s=1000.0)
    policy = graph.start_policy(checkpoint=checkpoint, auto_activate=True)
    wait_until_the_arm_has_moved(graph)
    policy.kill()
    graph.spin_sim(1.5)  # longer than any window: 16 steps and the way to rest
    stopped = graph.arm()
    graph.spin_sim(0.5)
    assert graph.arm_speed() < 0.01
    np.testing.assert_allclose(graph.arm(), stopped, atol=2e-3)
    last = graph.commands[-1][1]
    np.testing.assert_array_equal(last.points[-1].velocities, 0.0)
    np.testing.assert_allclose(stopped, last.points[-1].positions[:6], atol=0.03)
    assert graph.fresh_bridge()["trajectories_rejected"] == "0"


def wrong_contract(folder: Path) -> str:
    """The tabletop robot with one joint called otherwise."""
    data = yaml.safe_load(CONTRACT.read_text())
    data["joints"][2]["name"] = "elbow"
    path = folder / "wrong.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_wrong_contract_is_refused_and_configure_can_be_tried_again(
    graph: Graph, checkpoint: str, tmp_path: Path
) -> None:
    graph.start_bridge(episode_limit_s=1000.0)
    policy = graph.start_policy(checkpoint=checkpoint, contract=wrong_contract(tmp_path), instruction="")
    assert not graph.transition("configure")
    assert graph.lifecycle() == "unconfigured"
    text = policy.log_text()
    assert "'elbow' is 'joint_3'" in text and "contract [joint_1, joint_2, elbow" in text

    assert graph.set_parameter("policy_node", "contract", "tabletop").successful
    assert graph.set_parameter("policy_node", "checkpoint", checkpoint + "_missing").successful
    assert not graph.transition("configure")
    assert "there is no checkpoint folder" in policy.log_text()

    assert graph.set_parameter("policy_node", "checkpoint", checkpoint).successful
    assert graph.transition("configure") and graph.lifecycle() == "inactive"
    refused = graph.set_parameter("policy_node", "checkpoint", "other")
    assert not refused.successful and "read at configure" in refused.reason
    assert not graph.trigger("policy_node/start").success
    assert graph.commands == []

    assert graph.transition("activate")
    graph.wait_policy("DEGRADED", "no instruction yet")
    assert graph.commands == []
    tell = graph.node.create_publisher(String, "policy_node/instruction", 1)
    graph.wait(lambda: tell.get_subscription_count() == 1, "the instruction topic")
    tell.publish(String(data="  "))
    graph.wait(lambda: "instruction ignored" in policy.log_text(), "the warning about an empty instruction")
    assert not graph.set_parameter("policy_node", "instruction", "").successful
    tell.publish(String(data="touch the red cube"))
    wait_until_the_arm_has_moved(graph)
    graph.wait(lambda: graph.policy().get("instruction") == "touch the red cube", "the instruction in the diagnostics")

    assert graph.transition("deactivate")
    graph.spin_sim(1.0)
    count, stopped = len(graph.commands), graph.arm()
    graph.spin_sim(0.5)
    assert len(graph.commands) == count
    np.testing.assert_allclose(graph.arm(), stopped, atol=2e-3)
    assert graph.transition("cleanup") and graph.lifecycle() == "unconfigured"
    assert graph.transition("configure")
    assert policy.stop(DEADLINE_S) == 0


def test_policy_notices_an_automatic_reset(graph: Graph, checkpoint: str) -> None:
    """The bridge moves the arm away; the plan is dropped and begins anew where the arm is."""
    graph.start_bridge(episode_limit_s=4.0, auto_reset=True)
    graph.start_policy(checkpoint=checkpoint, auto_activate=True)
    graph.wait(lambda: len(graph.results) >= 2, "two episodes")
    assert graph.results[1]["seed"] == graph.results[0]["seed"] + 1
    assert graph.fresh_bridge()["trajectories_rejected"] == "0"


def test_typing_error_in_a_parameter_name_is_refused(graph: Graph, checkpoint: str) -> None:
    policy = graph.start_policy(checkpoint=checkpoint, contrakt="tabletop", auto_activate=True)
    graph.wait(lambda: "did you mean 'contract'" in policy.log_text(), "the refusal")
    bridge = graph.start_bridge(sead=1)
    graph.wait(lambda: bridge.returncode is not None, "the bridge's end")
    assert bridge.returncode == 1 and "did you mean 'seed'" in bridge.log_text()

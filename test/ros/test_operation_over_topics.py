"""The operator's services and topics, with the policy node as a real process."""

from __future__ import annotations

import signal
import time

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from graph_fixtures import Graph
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_publisher import publish_sensors
from std_msgs.msg import Bool
from std_srvs.srv import SetBool
from trajectory_msgs.msg import JointTrajectory

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def check_silence(graph: Graph) -> None:
    """The hold's repetitions have been sent; nothing comes after them."""
    graph.wait_policy("HOLD") if graph.policy()["state"] != "LATCHED" else None
    until_s = time.monotonic() + 0.5
    graph.wait(lambda: time.monotonic() > until_s, "the hold's repetitions")
    count = len(graph.commands)
    until_s = time.monotonic() + 0.5
    graph.wait(lambda: time.monotonic() > until_s, "half a second of silence")
    assert len(graph.commands) == count
    np.testing.assert_array_equal(graph.commands[-1][1].points[-1].velocities, 0.0)


def test_start_enable_and_emergency_stop(graph: Graph, checkpoint: str) -> None:
    publish_sensors(graph)
    graph.start_policy(checkpoint=checkpoint, use_sim_time=False, auto_activate=True, start_on_activate=False)
    graph.wait(lambda: graph.policy().get("lifecycle") == "active", "activation")
    graph.wait(lambda: "nobody" not in graph.policy()["reasons"], "the probe's subscription")
    assert graph.trigger("policy_node/start").success
    graph.wait(lambda: graph.commands, "commands")
    second = graph.trigger("policy_node/start")
    assert not second.success and "running already" in second.message
    assert graph.set_parameter("policy_node", "second_goal", "preempt").successful
    assert graph.trigger("policy_node/start").success
    refused = graph.set_parameter("policy_node", "second_goal", "prempt")
    assert not refused.successful and "nearest: 'preempt'" in refused.reason

    assert graph.call(SetBool, "policy_node/enable", SetBool.Request(data=False)).success
    graph.wait_policy("HOLD", "disabled by ~/enable")
    check_silence(graph)
    refusal = graph.trigger("policy_node/start")
    assert not refusal.success and "disabled" in refusal.message
    count = len(graph.commands)
    assert graph.call(SetBool, "policy_node/enable", SetBool.Request(data=True)).success
    graph.wait(lambda: len(graph.commands) > count, "motion after ~/enable")

    switch = graph.node.create_publisher(Bool, "policy_node/e_stop", 10)
    graph.wait(lambda: switch.get_subscription_count(), "the emergency stop's subscription")
    switch.publish(Bool(data=True))
    graph.wait_policy("LATCHED", "emergency stop")
    assert graph.policy()["e_stop"] == "True"
    check_silence(graph)
    refusal = graph.trigger("policy_node/reset_fault")
    assert not refusal.success and "pressed" in refusal.message
    switch.publish(Bool(data=False))
    graph.wait(lambda: graph.trigger("policy_node/reset_fault").success, "the reset")
    graph.wait_policy("HOLD", "~/start begins anew")
    count = len(graph.commands)
    assert graph.trigger("policy_node/start").success
    graph.wait(lambda: len(graph.commands) > count, "motion after the reset")


def test_kept_emergency_stop_from_before_the_node_keeps_it_inactive_and_status_is_kept(
    graph: Graph, checkpoint: str
) -> None:
    graph.node.create_publisher(Bool, "policy_node/e_stop", LATCHED).publish(Bool(data=True))
    policy = graph.start_policy(checkpoint=checkpoint, use_sim_time=False)
    graph.wait(lambda: "emergency stop on" in policy.log_text(), "the kept message")
    assert graph.transition("configure") and not graph.transition("activate")
    assert graph.lifecycle() == "inactive" and "is pressed; release it first" in policy.log_text()
    heard: list[DiagnosticStatus] = []
    graph.node.create_subscription(DiagnosticStatus, "policy_node/status", heard.append, LATCHED)
    graph.wait(lambda: heard, "the kept status")
    values = {pair.key: pair.value for pair in heard[0].values}
    assert values["e_stop"] == "True" and heard[0].name.endswith("policy_node: status")


def test_dry_run_sends_nothing_to_the_arm(graph: Graph, checkpoint: str) -> None:
    publish_sensors(graph)
    shown: list[JointTrajectory] = []
    graph.node.create_subscription(JointTrajectory, "policy_node/dry_run/joint_trajectory", shown.append, 10)
    graph.start_policy(checkpoint=checkpoint, use_sim_time=False, auto_activate=True, dry_run=True)
    graph.wait(lambda: len(shown) > 20, "the motion that would be")
    assert graph.commands == [] and graph.node.count_publishers("joint_trajectory") == 0
    graph.wait(graph.policy, "the node's report")
    assert graph.policy()["dry_run"] == "True"


def test_start_is_refused_and_nothing_sent_while_nobody_subscribes(graph: Graph, checkpoint: str) -> None:
    publish_sensors(graph)
    remap = {"joint_trajectory": "arm_controller/joint_trajectory"}
    graph.start_policy(remap, checkpoint=checkpoint, use_sim_time=False, auto_activate=True, start_on_activate=False)
    graph.wait_policy("HOLD", "nobody subscribes to 'joint_trajectory'")
    refusal = graph.trigger("policy_node/start")
    assert not refusal.success and "nobody subscribes to 'joint_trajectory'" in refusal.message
    came: list[JointTrajectory] = []
    graph.node.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", came.append, 10)
    graph.wait(lambda: graph.trigger("policy_node/start").success, "a start with a controller")
    graph.wait(lambda: came, "commands")


def test_listener_that_cannot_hear_the_commands_is_named(graph: Graph, checkpoint: str) -> None:
    """A subscriber that asks for kept messages gets none from a publisher that keeps none."""
    graph.node.create_subscription(JointTrajectory, "joint_trajectory", lambda _: None, LATCHED)
    policy = graph.start_policy(checkpoint=checkpoint, use_sim_time=False)
    assert graph.transition("configure")
    graph.wait(lambda: "incompatible QoS on 'joint_trajectory' (durability)" in policy.log_text(), "the error")
    graph.wait(lambda: graph.policy().get("qos_incompatible.joint_trajectory"), "the count")


def test_both_nodes_in_one_process(graph: Graph, checkpoint: str) -> None:
    process = graph.start(
        "omega_qvla_ros.nodes.composed",
        {
            "policy_node:use_sim_time": True,
            "policy_node:checkpoint": checkpoint,
            "policy_node:instruction": "touch the red cube",
            "policy_node:inference_threads": 1,
            "policy_node:auto_activate": True,
            "mujoco_bridge_node:episode_limit_s": 1000.0,
        },
    )
    graph.wait(lambda: graph.joints and graph.arm_speed() > 0.05, "the arm moves")
    graph.wait(lambda: graph.policy() and graph.bridge(), "both reports")
    assert graph.policy()["state"] in ("OK", "DEGRADED") and graph.bridge()["trajectories_rejected"] == "0"
    process.send(signal.SIGINT)
    graph.wait(lambda: process.returncode is not None, "the end of the process")
    assert process.returncode == 0, process.log_text()

"""Cameras and joint states that stop, freeze or lie, with the policy node as a real process."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from stage import NAME, PERIOD_S, Stage

IMAGE_TIMEOUT_S, JOINT_TIMEOUT_S = 0.25, 0.1


def check_hold_follows(
    stage: Stage, spoil: Callable[[], object], stream: str, timeout_s: float, words: str, record_property
) -> None:
    """Spoil a stream; the arm is held for it and stays, without one inference; the time is reported, not asserted."""
    stage.set("image_timeout_s", IMAGE_TIMEOUT_S, 0.0)
    stage.set("joint_states_timeout_s", JOINT_TIMEOUT_S, 0.0)
    at_s = time.monotonic()
    spoil()
    held = stage.wait_state("HOLD", words, at_s)
    record_property("fault_to_hold_s", held.at_s - stage.robot.last_sent[stream])
    record_property("bound_s", timeout_s + PERIOD_S)
    stage.check_stopped()
    inferences = stage.script.inferences
    stage.spin(0.5)
    assert stage.script.inferences == inferences


def test_fault_01_camera_that_never_comes_is_named_and_the_start_is_aborted(stage: Stage) -> None:
    stage.graph.trigger(f"{NAME}/stop")
    stage.robot.wrist.silent = True
    stage.set("startup_warn_s", 0.5, 5.0)
    stage.set("start_timeout_s", 2.0, 30.0)
    stage.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.spin(0.5)
    commands, inferences, at_s = len(stage.robot.commands), stage.script.inferences, time.monotonic()
    assert stage.graph.trigger(f"{NAME}/start").success
    named = stage.wait_words("no usable data from 'wrist/image_raw' for", at_s)
    assert "QoS" in named.reasons
    aborted = stage.wait_words("start aborted", at_s)
    assert aborted.state == "HOLD" and aborted.at_s > named.at_s
    assert stage.script.inferences == inferences and len(stage.robot.commands) == commands
    stage.robot.mend()
    stage.spin(1.0)  # the camera alone does not start it again
    assert stage.script.inferences == inferences and len(stage.robot.commands) == commands
    assert stage.graph.trigger(f"{NAME}/start").success
    stage.wait_moving()


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_fault_02_camera_that_stops_holds_and_resumes_by_itself(stage: Stage, camera: str, record_property) -> None:
    faults = getattr(stage.robot, camera)
    check_hold_follows(
        stage,
        lambda: setattr(faults, "silent", True),
        camera,
        IMAGE_TIMEOUT_S,
        f"'{camera}/image_raw' is stale",
        record_property,
    )
    at_s = time.monotonic()
    faults.silent = False
    stage.wait_state("OK", since_s=at_s)
    stage.wait_moving()
    stage.check_commands()


def test_fault_03_same_stamp_again_and_again_holds(stage: Stage, record_property) -> None:
    check_hold_follows(
        stage,
        lambda: setattr(stage.robot.front, "same_stamp", True),
        "front",
        IMAGE_TIMEOUT_S,
        "'front/image_raw' is stale",
        record_property,
    )
    stage.wait_count("dropped.front:repeated", 4)
    at_s = time.monotonic()
    stage.robot.front.same_stamp = False
    stage.wait_state("OK", since_s=at_s)


def test_fault_03_same_bytes_under_new_stamps_are_a_warning_and_no_hold(stage: Stage) -> None:
    at_s = time.monotonic()
    stage.robot.front.same_bytes = True
    stage.wait_words("'front/image_raw' repeats the same picture", at_s)
    stage.wait_moving()
    assert stage.robot.first(lambda s: s.state in ("HOLD", "LATCHED") and "front" in s.reasons, at_s) is None
    at_s = time.monotonic()
    stage.robot.front.same_bytes = False
    stage.wait(
        lambda: stage.robot.first(lambda s: "repeats" not in s.values.get("warnings", ""), at_s), "the warning's end"
    )


def test_fault_11_joint_that_is_missing_is_named_and_nothing_moves(stage: Stage) -> None:
    """From the start on: the node stays active and not ready."""
    stage.graph.trigger(f"{NAME}/stop")
    stage.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.spin(0.5)
    stage.robot.joints.missing = ("joint_3", "gripper")
    commands, inferences, at_s = len(stage.robot.commands), stage.script.inferences, time.monotonic()
    assert stage.graph.trigger(f"{NAME}/start").success
    found = stage.wait_words("lacks joint 'joint_3'", at_s)
    assert found.state == "HOLD" and "missing: joint_3, gripper" in found.reasons
    stage.wait(lambda: "lacks joint 'joint_3'" in stage.policy.log_text(), "the log line")
    line = next(line for line in stage.policy.log_text().splitlines() if "lacks joint 'joint_3'" in line)
    assert "[ERROR]" in line
    stage.spin(0.5)
    assert stage.graph.lifecycle() == "active"
    assert stage.script.inferences == inferences and len(stage.robot.commands) == commands
    at_s = time.monotonic()
    stage.robot.mend()
    stage.wait_state("OK", since_s=at_s)
    stage.wait_moving()


def test_fault_13_joint_that_is_not_finite_holds_with_its_name(stage: Stage, record_property) -> None:
    """A joint_state_broadcaster publishes NaN for what it does not know."""
    check_hold_follows(
        stage,
        lambda: setattr(stage.robot.joints, "not_finite", ("joint_2",)),
        "joints",
        JOINT_TIMEOUT_S,
        "joint 'joint_2' is not finite",
        record_property,
    )
    stage.wait_count("dropped.joint_states:not_finite", 4)
    at_s = time.monotonic()
    stage.robot.mend()
    stage.wait_state("OK", since_s=at_s)
    stage.wait_moving()


def test_fault_14_joint_states_that_stop_hold(stage: Stage, record_property) -> None:
    check_hold_follows(
        stage,
        lambda: setattr(stage.robot.joints, "silent", True),
        "joints",
        JOINT_TIMEOUT_S,
        "'joint_states' is stale",
        record_property,
    )
    at_s = time.monotonic()
    stage.robot.mend()
    stage.wait_state("OK", since_s=at_s)
    stage.wait_moving()


def test_fault_50_publisher_with_the_wrong_qos_is_an_error_with_its_topic(stage: Stage) -> None:
    """Sensor subscriptions are best effort and hear everybody, so the mismatch is shown on a reliable one."""
    from rclpy.qos import qos_profile_sensor_data
    from std_msgs.msg import String

    for topic in ("front/image_raw", "wrist/image_raw", "joint_states"):
        ends = stage.graph.node.get_subscriptions_info_by_topic(f"/{topic}")
        ours = [end for end in ends if end.node_name == NAME]
        assert ours and all(end.qos_profile.reliability.name == "BEST_EFFORT" for end in ours), topic
    publisher = stage.graph.node.create_publisher(String, f"{NAME}/instruction", qos_profile_sensor_data)
    try:
        stage.wait(
            lambda: any(
                "[ERROR]" in line and "incompatible QoS" in line and "instruction" in line
                for line in stage.policy.log_text().splitlines()
            ),
            "the error in the log",
        )
        stage.wait_report(
            lambda report: any(key.startswith("qos_incompatible.") and "instruction" in key for key in report),
            "the topic under qos_incompatible",
        )
    finally:
        stage.graph.node.destroy_publisher(publisher)


def test_fault_50_camera_that_a_reliable_subscription_cannot_hear_is_an_error_with_its_topic(
    make_stage: Callable[..., Stage],
) -> None:
    """The matrix's own case, which takes somebody who overrides the default of best effort."""
    stage = make_stage()
    override = {"qos_overrides./front/image_raw.subscription.reliability": "reliable"}
    policy = stage.start_policy(**override)
    words = "incompatible QoS on 'front/image_raw' (reliability)"
    stage.wait(lambda: any("[ERROR]" in line and words in line for line in policy.log_text().splitlines()), "the error")
    stage.wait_state("HOLD", "front/image_raw")
    stage.wait_count("qos_incompatible.front/image_raw", 1)
    assert stage.robot.commands == [] and stage.script.inferences == 0

"""Rows that need a process of their own: clocks that jump, processes that end, two robots on one graph."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fake_robot import FakeRobot
from stage import NAME, QUIET_S, Stage, check_hold_message

from omega_qvla_ros.trajectory import REST_NS

MakeStage = Callable[..., Stage]
SHARED_TOPICS = ("/diagnostics", "/rosout", "/parameter_events", "/clock", "/tf", "/tf_static")
"""Absolute by convention: what is in them says whose it is."""


def test_fault_43_clock_that_stops_and_jumps_back(make_stage: MakeStage) -> None:
    """Paused: nothing is sent and nothing latches. Back by 100 s: hold with stamp 0, new epoch, no old stamp after."""
    stage = make_stage(simulated=True)
    stage.start_policy(use_sim_time=True)
    stage.wait_moving()
    assert all(command.trajectory.stamp_ns > 0 for command in stage.robot.commands)

    stage.robot.paused = True
    stage.spin(0.5)  # what was under way
    count, inferences, at_s = len(stage.robot.commands), stage.script.inferences, time.monotonic()
    stage.spin(3.0)  # longer than every timeout
    assert len(stage.robot.commands) == count and stage.script.inferences <= inferences + 1
    assert stage.robot.first(lambda s: s.state == "LATCHED", at_s) is None
    stage.wait_words("/clock stands", at_s)
    stage.robot.paused = False
    stage.wait_moving()

    epoch, count = int(stage.report()["epoch"]), len(stage.robot.commands)
    stage.robot.jump(-100.0)
    stage.wait(lambda: any(c.trajectory.stamp_ns == 0 for c in stage.robot.commands[count:]), "a hold with stamp 0")
    hold = next(c for c in stage.robot.commands[count:] if c.trajectory.stamp_ns == 0)
    np.testing.assert_array_equal(hold.trajectory.points[-1].velocities, 0.0)
    assert hold.trajectory.points[0].time_from_start_ns > 0
    stage.wait_moving()
    stage.wait_count("epoch", epoch + 1)
    for command in stage.robot.commands[stage.robot.commands.index(hold) :]:
        assert command.trajectory.stamp_ns <= stage.robot.now_ns  # no stamp of the old time
    stage.check_commands()


def test_fault_44_sigint_in_the_middle_of_a_chunk_ends_with_a_decelerating_hold(make_stage: MakeStage) -> None:
    stage = make_stage()
    policy = stage.start_policy()
    stage.wait_moving()
    # In the middle: on a busy machine the window may have run out, and an arm that stands is sent no hold.
    stage.wait(lambda: stage.robot.speed > 0.05 and stage.motion_left_s() > 0.4, "the middle of a chunk")
    at_s = time.monotonic()
    policy.send(signal.SIGINT)
    stage.graph.wait(lambda: policy.returncode is not None, "the end of the process")
    assert policy.returncode == 0, policy.log_text()[-2000:]
    stage.graph.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.graph.spin(QUIET_S)
    last = stage.robot.commands[-1]
    check_hold_message(last.trajectory)
    assert last.at_s > at_s
    np.testing.assert_allclose(stage.robot.arm, last.trajectory.points[-1].positions[:6], atol=1e-6)
    stage.check_commands()


def test_fault_45_killed_node_leaves_a_window_that_ends_at_rest_and_its_death_is_seen(make_stage: MakeStage) -> None:
    """Nothing can be sent any more. A manager sees the node's silence and its endpoints going."""
    stage = make_stage()
    policy = stage.start_policy()
    stage.wait_moving()
    assert stage.graph.node.count_publishers(f"{NAME}/status") == 1
    policy.kill()
    killed_ns = stage.robot.now_ns
    stage.graph.wait(lambda: stage.robot.speed == 0.0, "rest")
    last = stage.robot.commands[-1].trajectory
    np.testing.assert_array_equal(last.points[-1].velocities, 0.0)
    assert last.end_ns - REST_NS - killed_ns < 1_500_000_000  # sixteen steps and the way to rest
    np.testing.assert_allclose(stage.robot.arm, last.points[-1].positions[:6], atol=1e-6)
    count, position = len(stage.robot.commands), stage.robot.arm
    stage.graph.wait(lambda: stage.graph.node.count_publishers(f"{NAME}/status") == 0, "the end of the endpoints")
    stage.graph.diagnostics.clear()
    until_s = time.monotonic() + 2.0  # two reports are missing
    stage.graph.wait(lambda: time.monotonic() > until_s, "time")
    assert stage.graph.policy() == {}
    assert len(stage.robot.commands) == count
    np.testing.assert_array_equal(stage.robot.arm, position)


def test_fault_52_two_robots_on_one_graph_do_not_touch_each_other(make_stage: MakeStage) -> None:
    stage = make_stage()
    left, right = (FakeRobot(stage.graph.domain_id, namespace=name) for name in ("left", "right"))
    try:
        for name in ("left", "right"):
            stage.start_policy(__ns=f"/{name}")
        stage.wait(lambda: left.state == "OK" and right.state == "OK", "both in OK")
        stage.wait(lambda: left.speed > 0.05 and right.speed > 0.05, "both move")
        assert stage.robot.commands == []  # nobody without a namespace is commanded
        for name in ("left", "right"):
            entities = stage.graph.node.get_publisher_names_and_types_by_node(NAME, f"/{name}")
            entities += stage.graph.node.get_subscriber_names_and_types_by_node(NAME, f"/{name}")
            entities += stage.graph.node.get_service_names_and_types_by_node(NAME, f"/{name}")
            foreign = [topic for topic, _ in entities if not topic.startswith(f"/{name}/")]
            assert set(foreign) <= set(SHARED_TOPICS), foreign

        at_s = time.monotonic()
        left.wrist.silent = True
        stage.wait(lambda: left.first(lambda s: s.state == "HOLD" and "wrist" in s.reasons, at_s), "HOLD of the left")
        assert stage.graph.trigger("left/policy_node/stop").success
        stage.wait(lambda: left.speed == 0.0, "rest of the left")
        start, count = left.arm, len(left.commands)
        stage.spin(QUIET_S)
        np.testing.assert_array_equal(left.arm, start)
        moved = right.arm
        stage.wait(lambda: np.abs(right.arm - moved).max() > 0.01, "the right moves on")
        assert len(left.commands) <= count + 3
        assert right.first(lambda s: s.state == "HOLD" and "stopped" in s.reasons, at_s) is None
        assert left.refused == [] and right.refused == []
    finally:
        left.close()
        right.close()


def test_fault_53_full_disk_degrades_the_recorder_and_the_arm_moves_on(stage: Stage, tmp_path: Path) -> None:
    before, at_s = stage.report(), time.monotonic()
    recorder = stage.graph.start(
        "full_disk_recorder",
        {"bag": str(tmp_path / "run"), "min_free_mb": 1, "contract": str(stage.contract)},
    )
    try:
        stage.wait(lambda: recorder_state(stage) == "degraded", "the recorder's report of a full disk")
        assert stage.graph.diagnostics["recorder_node"][0].startswith("DEGRADED")
        dropped = int(stage.graph.diagnostics["recorder_node"][1]["messages_dropped"])
        stage.wait(
            lambda: int(stage.graph.diagnostics["recorder_node"][1]["messages_dropped"]) > dropped,
            "the count of what is not recorded",
        )
        assert recorder.returncode is None
        stage.wait_moving()
        stage.wait_count("chunks_accepted", int(before["chunks_accepted"]) + 1)
        assert stage.robot.first(lambda s: s.state == "LATCHED", at_s) is None
        stage.check_commands()
    finally:
        recorder.stop()


def recorder_state(stage: Stage) -> str:
    return stage.graph.diagnostics.get("recorder_node", ("", {}))[1].get("state", "")

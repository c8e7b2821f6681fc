"""What is refused at configure, activate and start, what an operator does, and a starved processor."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from rclpy.qos import QoSProfile, ReliabilityPolicy
from stage import NAME, PERIOD_S, Stage
from std_msgs.msg import Bool


def unconfigure(stage: Stage) -> None:
    assert stage.graph.transition("deactivate") and stage.graph.transition("cleanup")
    assert stage.graph.lifecycle() == "unconfigured"


def check_configure_fails(stage: Stage, words: str) -> str:
    """configure returns FAILURE, the status says why, nothing was published."""
    commands, inferences, at_s = len(stage.robot.commands), stage.script.inferences, time.monotonic()
    assert not stage.graph.transition("configure")
    assert stage.graph.lifecycle() == "unconfigured"
    found = stage.wait_words(words, at_s)
    assert len(stage.robot.commands) == commands and stage.script.inferences == inferences
    return found.message


@pytest.mark.parametrize("offset_s", [2.0, -2.0])
def test_fault_10_camera_whose_clock_is_off_by_two_seconds_is_refused_at_activation(
    stage: Stage, offset_s: float
) -> None:
    assert stage.graph.transition("deactivate")
    stage.robot.front.stamp_offset_s = offset_s
    stage.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.spin(1.0)
    commands, at_s = len(stage.robot.commands), time.monotonic()
    assert not stage.graph.transition("activate")
    found = stage.wait_words("front/image_raw", at_s)
    assert found is not None and stage.graph.lifecycle() == "inactive"
    log = stage.policy.log_text()
    line = next(line for line in reversed(log.splitlines()) if "activate failed" in line)
    assert "front/image_raw" in line and "stamp_source" in line and "synchronize" in line
    assert len(stage.robot.commands) == commands
    stage.robot.mend()
    stage.spin(1.0)
    stage.graph.wait(lambda: stage.graph.transition("activate"), "activation with a good clock")


def test_fault_30_out_of_memory_at_load_fails_configure_which_can_be_tried_again(stage: Stage) -> None:
    unconfigure(stage)
    stage.script.write(load="oom")
    message = check_configure_fails(stage, "out of memory")
    assert "2.00 GiB" in message and "1.00 GiB" in message  # needed and free
    stage.script.write()
    assert stage.graph.transition("configure") and stage.graph.transition("activate")
    stage.wait_moving()


def test_fault_35_missing_checkpoint_fails_configure_and_nothing_is_made_up(stage: Stage, tmp_path: Path) -> None:
    unconfigure(stage)
    stage.set("checkpoint", str(tmp_path / "missing"), str(stage.checkpoint))
    check_configure_fails(stage, "there is no checkpoint folder")
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    for file in stage.checkpoint.iterdir():
        if file.suffix == ".json":
            (incomplete / file.name).write_bytes(file.read_bytes())
    stage.set("checkpoint", str(incomplete), str(stage.checkpoint))
    check_configure_fails(stage, str(incomplete))
    half = without_some_tensors(stage.checkpoint, tmp_path / "half")
    stage.set("checkpoint", str(half), str(stage.checkpoint))
    check_configure_fails(stage, "tensor")


def without_some_tensors(folder: Path, target: Path) -> Path:
    """The checkpoint with every third tensor missing: what is left may never be filled up with random weights."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            kept = {name: tensors[name] for index, name in enumerate(sorted(tensors)) if index % 3}
            save_file(kept, target / file.name)
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_fault_38_policy_that_is_not_quantized_is_refused_where_it_must_be(stage: Stage) -> None:
    unconfigure(stage)
    stage.set("require_quantization", True, False)
    message = check_configure_fails(stage, "require_quantization is set")
    assert "(quantization 'none') holds no quantized layer" in message and "omega-qvla quantize" in message


def test_fault_39_start_without_a_controller_is_refused_and_one_that_goes_holds(stage: Stage) -> None:
    at_s = time.monotonic()
    stage.robot.disconnect_controller()
    found = stage.wait_state("HOLD", "joint_trajectory", at_s)
    assert found.values["state"] == "HOLD"
    published = int(stage.report()["trajectories_published"])
    assert int(stage.report()["trajectories_published"]) <= published + 1  # no flood: the hold, then silence
    assert stage.graph.trigger(f"{NAME}/stop").success
    refused = stage.graph.trigger(f"{NAME}/start")
    assert not refused.success and "joint_trajectory" in refused.message
    stage.robot.connect_controller()
    stage.graph.wait(lambda: stage.graph.trigger(f"{NAME}/start").success, "the start with a controller")
    stage.wait_moving()


def test_fault_39_controller_that_is_there_and_inactive_is_found_by_the_arm_that_stands(stage: Stage) -> None:
    """It subscribes and ignores what it hears, as a joint_trajectory_controller does. Held, tried again, latched."""
    at_s = time.monotonic()
    stage.script.write(mode="far")
    stage.robot.inactive = True
    held = stage.wait_state("HOLD", "is the controller active", at_s)
    latched = stage.wait_state("LATCHED", "3 tracking losses in a row", held.at_s)
    assert "joint 'joint_1' " in latched.reasons
    count = len(stage.robot.commands)
    stage.spin(1.0)
    assert len(stage.robot.commands) <= count + 3  # the hold, then silence
    stage.script.write()
    stage.robot.inactive = False
    assert stage.graph.trigger(f"{NAME}/reset_fault").success
    stage.wait_state("OK", since_s=time.monotonic())
    stage.wait_moving()


def test_fault_42_emergency_stop_holds_latches_and_is_reset_after_its_release(stage: Stage, record_property) -> None:
    switch = stage.graph.node.create_publisher(
        Bool, f"{NAME}/e_stop", QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
    )
    try:
        stage.wait(lambda: switch.get_subscription_count() > 0, "the e-stop topic")
        at_s = time.monotonic()
        switch.publish(Bool(data=True))
        latched = stage.wait_state("LATCHED", "emergency stop", at_s)
        record_property("fault_to_hold_s", latched.at_s - at_s)
        record_property("bound_s", PERIOD_S)
        stage.check_stopped()
        refused = stage.graph.trigger(f"{NAME}/reset_fault")
        assert not refused.success and "pressed" in refused.message
        assert not stage.graph.trigger(f"{NAME}/start").success
        switch.publish(Bool(data=False))
        released_s = time.monotonic()
        answers = []
        stage.wait(
            lambda: answers.append(stage.graph.trigger(f"{NAME}/reset_fault")) or answers[-1].success, "the reset"
        )
        assert time.monotonic() - released_s >= 0.5
        stage.spin(0.5)
        assert stage.robot.speed == 0.0  # the reset alone moves nothing
        assert stage.graph.trigger(f"{NAME}/start").success
        stage.wait_moving()
    finally:
        stage.graph.node.destroy_publisher(switch)


def test_fault_44_deactivate_in_the_middle_of_a_chunk_ends_with_a_decelerating_hold(stage: Stage) -> None:
    at_s = time.monotonic()
    assert stage.graph.transition("deactivate")
    assert time.monotonic() - at_s < 5.0 or stage.robot.commands[-1].at_s - at_s < 5.0
    stage.check_stopped()
    assert stage.graph.lifecycle() == "inactive"


def test_fault_44_stop_in_the_middle_of_a_chunk_ends_with_a_decelerating_hold(stage: Stage) -> None:
    assert stage.graph.trigger(f"{NAME}/stop").success
    stage.check_stopped()
    assert "stopped" in stage.robot.reasons


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("execution_horizon", 1000, "execution_horizon is 1000"),
        ("blend_time_s", 4.9, "blend_time_s is 4.9"),
        ("instruction", " ", "empty instruction"),
        ("checkpoint", "other", "read at configure"),
        ("noise_seed", -1, ""),
    ],
)
def test_fault_46_bad_parameter_is_refused_while_the_arm_moves_on(
    stage: Stage, name: str, bad: object, words: str
) -> None:
    at_s = time.monotonic()
    result = stage.graph.set_parameter(NAME, name, bad)
    assert not result.successful and result.reason and words in result.reason
    stage.wait_moving()
    assert stage.robot.first(lambda s: s.state == "LATCHED" or name in s.reasons, at_s) is None


def test_fault_48_second_start_while_running_is_refused_and_the_first_goes_on(stage: Stage) -> None:
    epoch, at_s = stage.report()["epoch"], time.monotonic()
    response = stage.graph.trigger(f"{NAME}/start")
    assert not response.success and "running" in response.message
    stage.wait_moving()
    assert stage.report()["epoch"] == epoch
    assert stage.robot.first(lambda s: s.state in ("HOLD", "LATCHED"), at_s) is None


def test_fault_48_second_start_preempts_where_that_is_chosen(stage: Stage) -> None:
    unconfigure(stage)
    stage.set("second_goal", "preempt", "reject")
    assert stage.graph.transition("configure") and stage.graph.transition("activate")
    stage.wait_moving()
    epoch = int(stage.report()["epoch"])
    assert stage.graph.trigger(f"{NAME}/start").success
    stage.wait_count("epoch", epoch + 1)
    stage.wait_moving()
    stage.check_commands()
    unconfigure(stage)


def test_fault_54_starved_processor_is_reported_and_the_stamps_do_not_drift(stage: Stage) -> None:
    """The process gets no time for half a second; ten control periods are missed."""
    late = int(stage.report()["control_ticks_late"])
    at_s = time.monotonic()
    stage.policy.send(signal.SIGSTOP)
    time.sleep(0.5)
    stage.policy.send(signal.SIGCONT)
    stage.wait_words("the control timer was", at_s)
    report = stage.wait_report(lambda report: int(report["control_ticks_late"]) > late, "a late control tick")
    assert float(report["control_jitter_p99_ms"]) > 0.0
    stage.wait_state("OK", since_s=time.monotonic())
    stage.wait_moving()
    commands = stage.robot.commands[-5:]
    for command in commands:
        # The window begins in the near past of the clock, whatever happened before.
        assert 0 <= command.at_ns - command.trajectory.stamp_ns < 1_000_000_000
        check_hold_message_or_window(command.trajectory)
    stage.check_commands()


def check_hold_message_or_window(trajectory) -> None:
    np.testing.assert_array_equal(trajectory.points[-1].velocities, 0.0)
    times = [point.time_from_start_ns for point in trajectory.points]
    assert times == sorted(set(times))

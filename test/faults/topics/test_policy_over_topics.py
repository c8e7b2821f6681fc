"""A policy that is slow, hangs, raises or emits nonsense, in a real process."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from stage import NAME, PERIOD_S, Stage, check_hold_message


def test_fault_19_instruction_changed_in_the_middle_of_a_chunk(stage: Stage) -> None:
    """The chunk under way is for the old task: it is dropped, and the next inference has the new words."""
    report = stage.report()
    before, dropped = int(report["task"]), int(report.get("chunks_dropped_task", "0"))
    stage.script.write(mode="hang")
    stage.wait(lambda: stage.script.hanging, "an inference that hangs")
    at_s = time.monotonic()
    assert stage.graph.set_parameter(NAME, "instruction", "lift the green cube").successful
    stage.script.write()
    stage.wait(lambda: stage.script.log_file.read_text().splitlines()[-1] == "lift the green cube", "the new words")
    found = stage.wait_words("lift the green cube", at_s)
    assert int(found.values["task"]) == before + 1
    assert stage.wait_count("chunks_dropped_task", dropped + 1) == dropped + 1
    stage.wait_moving()
    stage.check_commands()


@pytest.mark.parametrize("mode", ["nan", "inf"])
def test_fault_20_chunk_that_is_not_finite_is_never_published_and_the_third_latches(stage: Stage, mode: str) -> None:
    rejected = int(stage.report().get("chunks_rejected_not_finite", "0"))
    at_s = time.monotonic()
    stage.script.write(mode=mode)
    held = stage.wait_state("HOLD", "action 3 of joint 'joint_2' is", at_s)
    latched = stage.wait_state("LATCHED", "3 policy errors in a row", held.at_s)
    assert latched.at_s > held.at_s
    assert stage.wait_count("chunks_rejected_not_finite", rejected + 3) == rejected + 3
    stage.check_stopped()
    inferences = stage.script.inferences
    stage.script.write()
    stage.spin(1.0)
    assert stage.robot.state == "LATCHED" and stage.script.inferences == inferences
    assert not stage.graph.trigger(f"{NAME}/start").success
    assert stage.graph.trigger(f"{NAME}/reset_fault").success
    stage.wait_moving()


def test_fault_23_jump_beyond_the_limit_is_refused_and_holds(stage: Stage) -> None:
    at_s = time.monotonic()
    stage.script.write(mode="jump")
    stage.wait_state("HOLD", "joint 'joint_1' would jump by", at_s)
    stage.script.write()
    stage.wait_state("OK", since_s=time.monotonic())
    stage.wait_moving()
    stage.check_commands()
    for before, after in zip(stage.robot.commands, stage.robot.commands[1:]):
        np.testing.assert_allclose(
            after.trajectory.points[0].positions[:6], before.trajectory.points[0].positions[:6], atol=0.2
        )


def test_fault_26_inference_slower_than_the_chunk_stops_smoothly_and_resumes(stage: Stage, record_property) -> None:
    """A chunk lasts 0.8 s; the arm stands in the meantime and nobody repeats the last action."""
    at_s = time.monotonic()
    stage.script.write(mode="slow", seconds=1.4)
    found = stage.wait_state("DEGRADED", "the plan ran out before the next chunk: inference p95", at_s)
    assert "HOLD" not in found.message
    last = stage.robot.commands[-1].trajectory
    np.testing.assert_array_equal(last.points[-1].velocities, 0.0)
    stage.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.script.write()
    stage.wait_state("OK", since_s=time.monotonic())
    stage.wait_moving()
    stage.check_commands()


def test_fault_27_policy_that_is_always_slower_than_its_chunk_is_latched_with_numbers(stage: Stage) -> None:
    at_s = time.monotonic()
    stage.script.write(mode="slow", seconds=1.0)
    found = stage.wait_state("LATCHED", "came after its own end", at_s)
    assert "a chunk lasts 0.80 s" in found.reasons and "inference takes 1.0" in found.reasons
    assert "step" in found.reasons  # the advice
    stage.check_stopped(stood=True)


def test_fault_28_hanging_inference_holds_and_its_result_is_void(stage: Stage, record_property) -> None:
    stage.script.write(mode="hang")
    stage.wait(lambda: stage.script.hanging, "an inference that hangs")
    at_s = time.monotonic()
    held = stage.wait_state("HOLD", "inference has not returned for 2.0 s", at_s)
    record_property("fault_to_hold_s", held.at_s - at_s)
    record_property("bound_s", 2.0 + PERIOD_S)
    stage.check_stopped(stood=True)
    accepted, count = int(stage.report()["chunks_accepted"]), stage.script.inferences
    at_s = time.monotonic()
    stage.script.write()  # it returns now, too late
    stage.wait_state("OK", since_s=at_s)
    stage.wait_moving()
    # Every chunk that was taken since is one that was asked for since.
    assert int(stage.report()["chunks_accepted"]) - accepted <= stage.script.inferences - count
    stage.check_commands()


def test_fault_29_inference_that_raises_holds_retries_and_latches_at_the_third(stage: Stage) -> None:
    at_s = time.monotonic()
    count = stage.script.inferences
    stage.script.write(mode="raise")
    held = stage.wait_state("HOLD", "ValueError: the script says so", at_s)
    latched = stage.wait_state("LATCHED", "3 policy errors in a row", held.at_s)
    assert latched.at_s - held.at_s > 2 * 0.5 - 2 * PERIOD_S  # two retries, half a second after the error each
    assert stage.script.inferences <= count + 4
    stage.check_stopped()
    stage.script.write()
    assert stage.graph.trigger(f"{NAME}/reset_fault").success
    stage.wait_moving()


def test_fault_29_one_error_is_forgiven(stage: Stage) -> None:
    at_s = time.monotonic()
    stage.script.write(mode="raise")
    stage.wait_state("HOLD", "the script says so", at_s)
    stage.script.write()
    stage.wait_state("OK", since_s=time.monotonic())
    stage.wait_moving()
    assert stage.robot.first(lambda s: s.state == "LATCHED", at_s) is None


def test_fault_32_cold_start_is_spent_in_configure_and_idle_time_costs_nothing(stage: Stage) -> None:
    """The first inference is ten times slower; no chunk is planned with it, and the summary says how long it took."""
    assert stage.graph.transition("deactivate") and stage.graph.transition("cleanup")
    stage.script.write(warm_up_s=1.5)
    count, at_s = stage.script.inferences, time.monotonic()
    assert stage.graph.transition("configure")
    assert time.monotonic() - at_s >= 1.5 and stage.script.inferences == count
    said_ms = [int(number) for number in re.findall(r"(\d+) ms per inference", stage.policy.log_text())]
    assert said_ms[-1] >= 1500
    stage.script.write()
    assert stage.graph.transition("activate")
    stage.wait_moving()
    assert stage.graph.trigger(f"{NAME}/stop").success
    stage.wait(lambda: stage.robot.speed == 0.0, "rest")
    stage.spin(1.0)  # idle
    stage.script.write(mode="slow", seconds=0.3)
    commands = len(stage.robot.commands)
    assert stage.graph.trigger(f"{NAME}/start").success
    stage.wait(lambda: len(stage.robot.commands) > commands, "the first chunk")
    # Real latency: the 0.3 s that it took are skipped, the first point is not in the future.
    first = stage.robot.commands[commands]
    assert first.trajectory.stamp_ns <= first.at_ns
    report = stage.wait_report(lambda report: int(report["steps_skipped"]) >= 5, "five steps skipped")
    assert float(report["inference_p99_ms"]) >= 290.0
    check_hold_message(stage.robot.commands[commands - 1].trajectory)
    stage.check_commands()

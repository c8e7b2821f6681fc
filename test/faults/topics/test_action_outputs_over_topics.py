"""Outputs to action servers that abort, are absent or stall; with control_msgs the servers are real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from goal_server import GoalServer
from stage import Stage

from omega_qvla_core.envs.tabletop import JOINT_NAMES

MakeStage = Callable[..., Stage]
ARM, GRIPPER = "arm_controller/follow_joint_trajectory", "gripper_controller/gripper_cmd"


def with_outputs(stage: Stage, folder: Path, *outputs: dict) -> str:
    """The stage's contract with other outputs."""
    data = yaml.safe_load(stage.contract.read_text(encoding="utf-8"))
    data["outputs"] = list(outputs)
    path = folder / "actions.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


@pytest.fixture
def servers() -> Iterator[list[GoalServer]]:
    made: list[GoalServer] = []
    yield made
    for server in made:
        server.close()


def test_fault_41_aborted_trajectory_goal_holds_with_its_code(
    make_stage: MakeStage, servers: list[GoalServer], tmp_path: Path
) -> None:
    stage = make_stage()
    server = GoalServer(stage.graph.domain_id, ARM, "FollowJointTrajectory", stage.robot.accept)
    servers.append(server)
    contract = with_outputs(stage, tmp_path, {"type": "follow_joint_trajectory", "name": ARM})
    stage.start_policy(module="action_policy", contract=contract)
    stage.wait(lambda: np.abs(stage.robot.arm).max() > 0.02, "the arm moves by goals")
    at_s = time.monotonic()
    server.behaviour = "abort"
    held = stage.wait_words("error code -4 (PATH_TOLERANCE_VIOLATED)", at_s)
    assert held.state in ("HOLD", "LATCHED") and "joint_2 is too far away" in held.message + held.reasons
    server.behaviour = "accept"
    if stage.robot.state == "LATCHED":
        assert stage.graph.trigger("policy_node/reset_fault").success
    position = stage.robot.arm
    stage.wait(lambda: np.abs(stage.robot.arm - position).max() > 0.02, "the arm moves again")
    for _, goal in server.goals:
        np.testing.assert_array_equal(goal.points[-1].velocities, 0.0)


def test_fault_49_gripper_that_is_absent_or_stalls_does_not_block_the_arm(
    make_stage: MakeStage, servers: list[GoalServer], tmp_path: Path
) -> None:
    stage = make_stage(joints=JOINT_NAMES[:6])
    contract = with_outputs(
        stage,
        tmp_path,
        {"type": "joint_trajectory", "name": "joint_trajectory"},
        {"type": "gripper_command", "name": GRIPPER, "joints": ["gripper"]},
    )
    stage.start_policy(module="action_policy", contract=contract)
    stage.wait_moving()
    absent = stage.wait_state("DEGRADED", f"no action server '{GRIPPER}'")
    assert absent.state == "DEGRADED"

    server = GoalServer(stage.graph.domain_id, GRIPPER, "GripperCommand")
    servers.append(server)
    at_s = time.monotonic()
    stage.wait_state("OK", since_s=at_s)
    stage.script.write(gripper=0.03)
    stage.wait(lambda: server.goals, "a goal for the gripper")

    server.stalled = True
    at_s = time.monotonic()
    stage.script.write(gripper=0.01)
    stage.wait_state("DEGRADED", "has not answered", at_s)
    stage.wait_moving()
    stage.wait_report(lambda report: report["output." + GRIPPER] != "ok", f"what is wrong with {GRIPPER}")
    # Reasons are in order, the worst first: one that holds the arm would stand before those that only degrade.
    held = [status for status in stage.robot.statuses if status.state in ("HOLD", "LATCHED")]
    assert not [status for status in held if GRIPPER in status.reasons.partition("; ")[0]]
    server.stalled = False
    stage.wait_state("OK", since_s=time.monotonic())
    stage.check_commands()

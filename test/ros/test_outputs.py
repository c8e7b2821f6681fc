"""Outputs of a contract against a server that a test can make do anything; no action is needed for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, contract_dict
from session_rig import Rig

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract import OutputContract, contract_from_dict
from omega_qvla_ros.nodes import action_outputs
from omega_qvla_ros.nodes.action_outputs import GripperActionOutput, TrajectoryActionOutput
from omega_qvla_ros.nodes.goal_clients import GoalResult, OnResult, Outcome
from omega_qvla_ros.nodes.outputs import Outputs, output_joints
from omega_qvla_ros.trajectory import JointTrajectory, Plan, pick_joints, still_plan, window

NAMES = ("shoulder", "finger")


class Server:
    """A ``GoalClient`` whose server is the test."""

    def __init__(self) -> None:
        self.name = "server"
        self.there = True
        self.silent_s = 0.0
        self.goals: list[tuple[Any, OnResult]] = []

    def ready(self) -> bool:
        return self.there

    def unanswered_s(self) -> float:
        return self.silent_s

    def send(self, goal: Any, on_result: OnResult) -> None:
        self.goals.append((goal, on_result))

    def end(self, number: int, outcome: Outcome, **result: object) -> None:
        self.goals[number][1](GoalResult(outcome, SimpleNamespace(**result)))

    def destroy(self) -> None:
        self.there = False


@pytest.fixture
def server() -> Server:
    return Server()


def arm(server: Server, on_fault: Callable[[str], None]) -> TrajectoryActionOutput:
    contract = OutputContract("follow_joint_trajectory", "arm/follow", ("shoulder",))
    return TrajectoryActionOutput(contract, server, lambda trajectory: trajectory, [0], on_fault)


def gripper(server: Server) -> GripperActionOutput:
    return GripperActionOutput(OutputContract("gripper_command", "hand", ("finger",)), server, lambda p: p, 1)


def motion(position: float, finger: float = 0.02) -> tuple[JointTrajectory, Plan]:
    plan = still_plan(T0, np.array([position, finger]), PERIOD_NS)
    plan = plan.then(np.array([T0 + 10 * PERIOD_NS]), np.array([[position + 0.1, finger]]), np.zeros((1, 2)))
    return window(plan, T0, NAMES, PERIOD_NS), plan


def test_one_goal_per_plan_with_its_own_joints(server: Server) -> None:
    output = arm(server, pytest.fail)
    trajectory, plan = motion(0.3)
    for k in range(5):
        output.send(trajectory, plan, T0 + k * PERIOD_NS)
    assert len(server.goals) == 1
    goal = server.goals[0][0]
    assert list(goal.joint_names) == ["shoulder"] and goal.points[0].positions.tolist() == [0.3]
    output.send(*motion(0.4), T0)
    assert len(server.goals) == 2
    output.send(None, plan, T0)
    assert len(server.goals) == 2


def test_fault_41_end_of_the_newest_goal_tells_the_code_and_of_a_replaced_one_nothing(server: Server) -> None:
    faults: list[str] = []
    output = arm(server, faults.append)
    output.send(*motion(0.3), T0)
    output.send(*motion(0.4), T0)
    server.end(0, Outcome.ABORTED, error_code=0, error_string="")
    assert faults == []
    server.end(1, Outcome.ABORTED, error_code=-4, error_string="joint shoulder is 0.4 away")
    assert faults == ["'arm/follow': goal aborted, error code -4 (PATH_TOLERANCE_VIOLATED): joint shoulder is 0.4 away"]
    output.send(*motion(0.5), T0)
    server.goals[2][1](GoalResult(Outcome.REJECTED))
    assert faults[1] == "'arm/follow': goal rejected"


def test_success_is_no_fault(server: Server) -> None:
    output = arm(server, pytest.fail)
    output.send(*motion(0.3), T0)
    server.end(0, Outcome.SUCCEEDED, error_code=0)


def test_absent_or_silent_server_of_the_arm_is_a_problem_and_gets_no_goals(server: Server) -> None:
    output = arm(server, pytest.fail)
    assert output.problem() is None
    server.silent_s = 1.1
    assert "has not answered for 1.1 s" in output.problem()
    server.there = False
    assert "no action server 'arm/follow'" in output.problem()
    trajectory, plan = motion(0.3)
    output.send(trajectory, plan, T0)
    assert server.goals == []
    server.there = True
    output.send(trajectory, plan, T0)
    assert len(server.goals) == 1


def test_fault_49_absent_gripper_degrades_and_blocks_nothing(server: Server) -> None:
    server.there = False
    arm_server = Server()
    outputs = Outputs([arm(arm_server, pytest.fail), gripper(server)], PERIOD_NS)
    outputs.send(*motion(0.3), T0)
    assert len(arm_server.goals) == 1 and server.goals == []
    assert outputs.problem() is None
    assert outputs.degraded() == {"hand": "no action server 'hand': the gripper does not move"}
    server.there = True
    outputs.send(*motion(0.4), T0 + PERIOD_NS)
    assert len(server.goals) == 1 and outputs.degraded() == {"hand": None}


def test_fault_49_stalled_gripper_degrades_until_a_goal_succeeds(server: Server) -> None:
    output = gripper(server)
    output.send(*motion(0.3), T0)
    server.end(0, Outcome.ABORTED, stalled=True)
    assert "goal aborted, stalled (does it hold something?)" in output.problem()
    output.send(*motion(0.3, finger=0.0), T0 + 2 * PERIOD_NS)
    server.end(1, Outcome.SUCCEEDED, stalled=False)
    assert output.problem() is None
    server.silent_s = 3.0
    assert "has not answered for 3.0 s" in output.problem()


def test_gripper_gets_a_goal_only_for_a_real_change_and_not_too_often(server: Server) -> None:
    output = gripper(server)
    output.send(*motion(0.3, 0.02), T0)
    output.send(*motion(0.3, 0.0215), T0 + 10 * PERIOD_NS)  # 1.5 mm: noise
    assert [goal for goal, _ in server.goals] == [0.02]
    output.send(*motion(0.3, 0.04), T0 + PERIOD_NS)  # too soon after the first
    assert len(server.goals) == 1
    output.send(*motion(0.3, 0.04), T0 + 11 * PERIOD_NS)
    assert [goal for goal, _ in server.goals] == [0.02, 0.04]
    server.there = False
    output.send(*motion(0.3, 0.04), T0 + 20 * PERIOD_NS)
    server.there = True  # it has been restarted: it gets its target again
    output.send(*motion(0.3, 0.04), T0 + 30 * PERIOD_NS)
    assert len(server.goals) == 3


def test_contract_with_actions_needs_control_msgs(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "control_msgs", None)
    with pytest.raises(ConfigError, match=r"need the package control_msgs; install ros-\$ROS_DISTRO-control-msgs"):
        action_outputs.action_types()


def test_joints_of_an_output_are_those_that_no_other_output_names() -> None:
    contract = contract_from_dict(
        contract_dict(
            outputs=[
                {"type": "joint_trajectory", "name": "arm/joint_trajectory"},
                {"type": "gripper_command", "name": "hand", "joints": ["finger"]},
            ]
        )
    )
    assert [output_joints(contract, output) for output in contract.outputs] == [[0], [1]]


def test_all_joints_in_order_are_the_trajectory_itself_and_others_are_picked() -> None:
    trajectory, _ = motion(0.3)
    assert pick_joints(trajectory, [0, 1]) is trajectory
    turned = pick_joints(trajectory, [1, 0])
    assert turned.joint_names == ("finger", "shoulder") and turned.stamp_ns == trajectory.stamp_ns
    np.testing.assert_array_equal(turned.points[0].positions, [0.02, 0.3])


class Recorder:
    """An output that remembers, with or without a need for every sample."""

    essential = True

    def __init__(self, streaming: bool) -> None:
        self.name = "recorder"
        self.streaming = streaming
        self.windows: list[JointTrajectory] = []
        self.samples: list[np.ndarray] = []

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        if trajectory is not None:
            self.windows.append(trajectory)
        if plan is not None:
            self.samples.append(plan.sample(now_ns + PERIOD_NS)[0])

    def problem(self) -> str | None:
        return None

    def finish(self, timeout_s: float) -> None:
        pass

    def destroy(self) -> None:
        pass


@pytest.mark.parametrize("real_time", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_last_hold_is_sent_three_times_and_streamed_to_its_end(streaming: bool, real_time: bool) -> None:
    rig = Rig()
    rig.run(10)
    assert rig.speed > 0.1
    recorder = Recorder(streaming)
    first = rig.session.deactivate(rig.now)
    Outputs([recorder], PERIOD_NS).send_hold(first, rig.session.motion, rig.now, 5.0, real_time)
    assert len(recorder.windows) == 3 and len({message.stamp_ns for message in recorder.windows}) == 1
    if streaming:
        steps = np.abs(np.diff([sample[0] for sample in recorder.samples]))
        assert steps[-1] < 1e-6  # it has come to rest
        np.testing.assert_allclose(recorder.samples[-1], recorder.windows[-1].points[-1].positions, atol=1e-6)
    rig.session.close()


def test_nothing_is_sent_at_the_end_if_nothing_was_commanded() -> None:
    rig = Rig()
    recorder = Recorder(False)
    Outputs([recorder], PERIOD_NS).send_hold(None, rig.session.motion, rig.now, 5.0, True)
    assert recorder.windows == [] and recorder.samples == []
    rig.session.close()

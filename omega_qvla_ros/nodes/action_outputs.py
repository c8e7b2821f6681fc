"""Outputs to action servers: FollowJointTrajectory, GripperCommand, ParallelGripperCommand.

A goal is sent when there is something new to say, never waited for. What became of it arrives as a callback: the end
of an arm's goal can hold the arm, a gripper's only degrades.

``control_msgs`` comes with ROS only, so it is imported when a contract asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros import msgs
from omega_qvla_ros.contract import OutputContract
from omega_qvla_ros.nodes.goal_clients import GoalClient, GoalResult, Outcome
from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.trajectory import JointTrajectory, Plan, pick_joints

ANSWER_S = 1.0
"""A server that has not said yes or no to a goal after this wall time is stalled."""
GRIPPER_AHEAD_S = 0.2
"""A gripper's goal is a place, not a path: it is aimed a little ahead of the plan, about as long as a gripper takes."""
GRIPPER_INTERVAL_NS = nanoseconds(0.1)
"""Goals of a gripper come no faster than this: each replaces the one before."""
ERROR_NAMES = {
    0: "SUCCESSFUL",
    -1: "INVALID_GOAL",
    -2: "INVALID_JOINTS",
    -3: "OLD_HEADER_TIMESTAMP",
    -4: "PATH_TOLERANCE_VIOLATED",
    -5: "GOAL_TOLERANCE_VIOLATED",
}
"""Codes of FollowJointTrajectory's result."""

OnFault = Callable[[str], None]


def action_types() -> ModuleType:
    """``control_msgs.action``.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from control_msgs import action
    except ImportError as error:
        raise ConfigError(
            "the contract has outputs to actions, which need the package control_msgs; install "
            "ros-$ROS_DISTRO-control-msgs, or use outputs of type joint_trajectory or float64_multi_array"
        ) from error
    return action


class TrajectoryActionOutput:
    """The plan as goals of a FollowJointTrajectory server; each new plan replaces the goal before.

    Args:
        contract: The output.
        client: The server.
        make_goal: Trajectory message -> goal.
        joints: Indices of its joints in contract order.
        on_fault: Called with the reason when the newest goal failed; the caller holds.
    """

    essential = True
    streaming = False

    def __init__(
        self,
        contract: OutputContract,
        client: GoalClient,
        make_goal: Callable[[Any], Any],
        joints: Sequence[int],
        on_fault: OnFault,
    ) -> None:
        self.name = contract.name
        self._client = client
        self._make_goal = make_goal
        self._joints = joints
        self._on_fault = on_fault
        self._plan: Plan | None = None
        self._newest = 0

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """Send the window as a goal if the plan is another one than at the last goal."""
        if trajectory is None or plan is self._plan or not self._client.ready():
            return
        self._plan = plan
        self._newest += 1
        number = self._newest
        goal = self._make_goal(msgs.trajectory_to_msg(pick_joints(trajectory, self._joints)))
        self._client.send(goal, lambda result: self._ended(number, result))

    def _ended(self, number: int, result: GoalResult) -> None:
        """A goal that was replaced ends as aborted too; only the newest one says something about the arm."""
        if number != self._newest or result.outcome is Outcome.SUCCEEDED:
            return
        text = f"{self.name!r}: goal {result.outcome.value}"
        code = getattr(result.result, "error_code", None)
        if code is not None:
            text += f", error code {code} ({ERROR_NAMES.get(code, 'unknown')})"
        details = getattr(result.result, "error_string", "")
        self._on_fault(f"{text}: {details}" if details else text)

    def problem(self) -> str | None:
        """Why nobody takes the goals, None if somebody does."""
        if not self._client.ready():
            return (
                f"no action server {self.name!r}: is the controller loaded and active, is the name right "
                "(outputs of the contract, or a remapping)?"
            )
        if self._client.unanswered_s() > ANSWER_S:
            return f"the action server {self.name!r} has not answered for {self._client.unanswered_s():.1f} s"
        return None

    def finish(self, timeout_s: float) -> None:
        """Nothing to wait for: a request is on its way when it was sent."""

    def destroy(self) -> None:
        """Free the client."""
        self._client.destroy()


class GripperActionOutput:
    """One joint's target as goals of a gripper's action.

    Args:
        contract: The output.
        client: The server.
        make_goal: Position in the joint's unit -> goal.
        joint: Index of the joint in contract order.
    """

    essential = False
    streaming = False

    def __init__(
        self, contract: OutputContract, client: GoalClient, make_goal: Callable[[float], Any], joint: int
    ) -> None:
        self.name = contract.name
        self._client = client
        self._make_goal = make_goal
        self._joint = joint
        self._min_change = contract.min_change
        self._sent: float | None = None
        self._sent_ns = 0
        self._failed: str | None = None

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """Send a goal if the target has moved by more than ``min_change`` since the last one."""
        if not self._client.ready():
            self._sent = None  # a server that comes back knows nothing of the last goal
            return
        if trajectory is None or plan is None:
            return
        if self._sent is not None and 0 <= now_ns - self._sent_ns < GRIPPER_INTERVAL_NS:
            return
        target = float(plan.sample(now_ns + nanoseconds(GRIPPER_AHEAD_S))[0][self._joint])
        if self._sent is not None and abs(target - self._sent) <= self._min_change:
            return
        self._sent, self._sent_ns = target, now_ns
        self._client.send(self._make_goal(target), self._ended)

    def _ended(self, result: GoalResult) -> None:
        failed = result.outcome in (Outcome.REJECTED, Outcome.ABORTED)
        stalled = bool(getattr(result.result, "stalled", False))
        hint = ", stalled (does it hold something?)" if stalled else ""
        self._failed = f"{self.name!r}: goal {result.outcome.value}{hint}" if failed else None

    def problem(self) -> str | None:
        """What is wrong with the gripper, None if nothing is known to be."""
        if not self._client.ready():
            return f"no action server {self.name!r}: the gripper does not move"
        if self._client.unanswered_s() > ANSWER_S:
            return f"the action server {self.name!r} has not answered for {self._client.unanswered_s():.1f} s"
        return self._failed

    def finish(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    def destroy(self) -> None:
        """Free the client."""
        self._client.destroy()


def follow_joint_trajectory_goal(actions: ModuleType) -> Callable[[Any], Any]:
    """Trajectory message -> goal, without tolerances: those of the controller hold."""
    return lambda trajectory: actions.FollowJointTrajectory.Goal(trajectory=trajectory)


def gripper_command_goal(actions: ModuleType, max_effort: float | None) -> Callable[[float], Any]:
    """Position -> goal of GripperCommand; an effort of 0 leaves it to the driver."""

    def make(position: float) -> Any:
        goal = actions.GripperCommand.Goal()
        goal.command.position = position
        goal.command.max_effort = 0.0 if max_effort is None else max_effort
        return goal

    return make


def parallel_gripper_goal(actions: ModuleType, joint_name: str, max_effort: float | None) -> Callable[[float], Any]:
    """Position -> goal of ParallelGripperCommand, with the effort only where one is given.

    Raises:
        ConfigError: The installed control_msgs does not have this action.
    """
    if not hasattr(actions, "ParallelGripperCommand"):
        raise ConfigError(
            "the installed control_msgs has no ParallelGripperCommand; update it, or use an output of type "
            "gripper_command"
        )

    def make(position: float) -> Any:
        goal = actions.ParallelGripperCommand.Goal()
        goal.command.name = [joint_name]
        goal.command.position = [position]
        goal.command.effort = [] if max_effort is None else [float(np.float64(max_effort))]
        return goal

    return make

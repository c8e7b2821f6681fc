"""Where the motion goes: the outputs of the contract, or one topic to look at in a dry run.

Every output gets the same window and the same plan in every control period and takes its own joints of it.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_ros import msgs
from omega_qvla_ros.contract import OutputContract, RobotContract
from omega_qvla_ros.motion import HOLD_REPEATS, Motion
from omega_qvla_ros.nodes import action_outputs as actions
from omega_qvla_ros.nodes import qos
from omega_qvla_ros.nodes.goal_clients import RclpyGoalClient
from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.trajectory import JointTrajectory, Plan, pick_joints

DRY_RUN_TOPIC = "~/dry_run/joint_trajectory"


class Output(Protocol):
    """One place where commands go.

    Attributes:
        name: Topic or action name as the contract gives it.
        essential: Without it the arm must not move; else it only degrades.
        streaming: It needs a message in every control period, so a hold has to be sent to its end.
    """

    name: str
    essential: bool
    streaming: bool

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """One control period: what is to be sent now, and the plan that it is a part of."""

    def problem(self) -> str | None:
        """Why nobody takes the commands, None if somebody does."""

    def finish(self, timeout_s: float) -> None:
        """Wait until what was sent has left."""

    def destroy(self) -> None:
        """Free it."""


class TrajectoryTopic:
    """Windows on a topic of a joint_trajectory_controller.

    Args:
        node: Its owner.
        topic: Relative topic.
        joints: Indices of its joints in contract order.
        essential: Whether a subscriber is needed before the arm may move.
        on_incompatible: Told of subscribers that cannot hear it.
    """

    streaming = False

    def __init__(
        self,
        node: LifecycleNode,
        topic: str,
        joints: Sequence[int],
        essential: bool,
        on_incompatible: qos.OnIncompatible,
    ) -> None:
        self.name = topic
        self.essential = essential
        self._node = node
        self._joints = joints
        self._publisher = node.create_lifecycle_publisher(
            JointTrajectoryMsg, topic, qos.COMMAND, event_callbacks=qos.publisher_events(topic, on_incompatible)
        )

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """See ``Output``."""
        if trajectory is not None:
            self._publisher.publish(msgs.trajectory_to_msg(pick_joints(trajectory, self._joints)))

    def problem(self) -> str | None:
        """See ``Output``."""
        return _no_subscriber(self._publisher.get_subscription_count(), self.name) if self.essential else None

    def finish(self, timeout_s: float) -> None:
        """See ``Output``."""
        if self._publisher.get_subscription_count():
            self._publisher.wait_for_all_acked(Duration(seconds=timeout_s))

    def destroy(self) -> None:
        """See ``Output``."""
        self._node.destroy_lifecycle_publisher(self._publisher)


class PositionStream:
    """The position of every control period on the topic of a forward position controller.

    Such a controller has no time line: it goes where the last message says, at once, and stays there. A window cannot
    end by itself here, so a node that dies leaves the arm at its last position, at whatever speed it had.

    Args:
        node: Its owner.
        topic: Relative topic.
        joints: Indices of its joints in contract order.
        period_ns: Control period; a sample is where the arm is to be at its end.
        on_incompatible: Told of subscribers that cannot hear it.
    """

    essential = True
    streaming = True

    def __init__(
        self,
        node: LifecycleNode,
        topic: str,
        joints: Sequence[int],
        period_ns: int,
        on_incompatible: qos.OnIncompatible,
    ) -> None:
        self.name = topic
        self._node = node
        self._joints = np.asarray(joints, dtype=np.intp)
        self._period_ns = period_ns
        self._publisher = node.create_lifecycle_publisher(
            Float64MultiArray, topic, qos.COMMAND, event_callbacks=qos.publisher_events(topic, on_incompatible)
        )

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """Publish the plan's sample, up to a few periods after its end."""
        if plan is None or now_ns > plan.end_ns + HOLD_REPEATS * self._period_ns:
            return
        position = plan.sample(now_ns + self._period_ns)[0][self._joints]
        self._publisher.publish(Float64MultiArray(data=array.array("d", position.tobytes())))

    def problem(self) -> str | None:
        """See ``Output``."""
        return _no_subscriber(self._publisher.get_subscription_count(), self.name)

    def finish(self, timeout_s: float) -> None:
        """See ``Output``."""
        if self._publisher.get_subscription_count():
            self._publisher.wait_for_all_acked(Duration(seconds=timeout_s))

    def destroy(self) -> None:
        """See ``Output``."""
        self._node.destroy_lifecycle_publisher(self._publisher)


def _no_subscriber(count: int, topic: str) -> str | None:
    if count:
        return None
    return (
        f"nobody subscribes to {topic!r}: is the controller loaded and active, is the topic right (outputs of the "
        "contract, or a remapping)?"
    )


class Outputs:
    """All outputs of one robot.

    Args:
        outputs: In the contract's order.
        period_ns: Control period.
    """

    def __init__(self, outputs: Sequence[Output], period_ns: int) -> None:
        self.outputs = tuple(outputs)
        self._period_ns = period_ns

    def send(self, trajectory: JointTrajectory | None, plan: Plan | None, now_ns: int) -> None:
        """One control period; ``plan`` is the commanded plan that ``trajectory`` is a window of."""
        for output in self.outputs:
            output.send(trajectory, plan, now_ns)

    def problem(self) -> str | None:
        """Why the arm must not move: an essential output that nobody takes. None if all are taken."""
        return next((text for output in self.outputs if output.essential and (text := output.problem())), None)

    def degraded(self) -> dict[str, str | None]:
        """Name -> what is wrong, or None, for every output that is not essential."""
        return {output.name: output.problem() for output in self.outputs if not output.essential}

    def states(self) -> dict[str, str]:
        """Name -> ``ok`` or what is wrong, for the diagnostics."""
        return {output.name: output.problem() or "ok" for output in self.outputs}

    def send_hold(
        self, first: JointTrajectory | None, motion: Motion, now_ns: int, budget_s: float, real_time: bool
    ) -> None:
        """The last message on the wire is a decelerating hold: sent in three control periods, to its end if streamed.

        Args:
            first: What to send at once; None: nothing was commanded, so nothing is sent.
            motion: Gives the repetitions.
            now_ns: The node's time.
            budget_s: Longest wall time for all of it.
            real_time: False with simulated time, which does not go on in here: repetitions follow at once, except
                where a stream needs its samples one after the other.
        """
        if first is None and (motion.plan is None or now_ns >= motion.plan.end_ns):
            return
        streaming = any(output.streaming for output in self.outputs)
        started_s = time.monotonic()
        begun_ns, message, sent = now_ns, first, 0
        while True:
            self.send(message, motion.plan, now_ns)
            sent += message is not None
            elapsed_s = time.monotonic() - started_s
            streamed = not streaming or motion.plan is None or now_ns >= motion.plan.end_ns
            if (streamed and (sent >= HOLD_REPEATS or message is None)) or elapsed_s > budget_s:
                break
            if real_time or streaming:
                time.sleep(self._period_ns / 1e9)
                now_ns = begun_ns + nanoseconds(time.monotonic() - started_s)
            message = motion.tick(now_ns)
        for output in self.outputs:
            output.finish(max(0.0, min(ACKNOWLEDGE_S, budget_s - (time.monotonic() - started_s))))

    def destroy(self) -> None:
        """Free all."""
        for output in self.outputs:
            output.destroy()


ACKNOWLEDGE_S = 0.5
"""Longest wait for a controller to have received the last hold."""


def make_outputs(
    node: LifecycleNode,
    contract: RobotContract,
    dry_run: bool,
    on_fault: Callable[[str], None],
    on_incompatible: qos.OnIncompatible,
) -> Outputs:
    """The outputs that a contract asks for.

    Args:
        node: Owner of publishers and clients.
        contract: The robot.
        dry_run: Nothing of the contract's is created; the windows go to ``~/dry_run/joint_trajectory``.
        on_fault: Called when an arm's goal failed.
        on_incompatible: Told of subscribers whose quality of service does not fit.

    Raises:
        ConfigError: An output needs ``control_msgs``, which is not installed.
    """
    period_ns = nanoseconds(contract.period_s)
    if dry_run:
        every = range(len(contract.joints))
        return Outputs([TrajectoryTopic(node, DRY_RUN_TOPIC, every, False, on_incompatible)], period_ns)
    made: list[Output] = []
    try:
        for output in contract.outputs:
            made.append(_make(node, contract, output, on_fault, on_incompatible))
    except Exception:
        Outputs(made, period_ns).destroy()
        raise
    return Outputs(made, period_ns)


def output_joints(contract: RobotContract, output: OutputContract) -> list[int]:
    """Indices of an output's joints in contract order; by default all that no other output names."""
    names = contract.joint_names
    if output.joints:
        return [names.index(name) for name in output.joints]
    taken = {name for other in contract.outputs for name in other.joints}
    return [k for k, name in enumerate(names) if name not in taken]


def _make(
    node: LifecycleNode,
    contract: RobotContract,
    output: OutputContract,
    on_fault: Callable[[str], None],
    on_incompatible: qos.OnIncompatible,
) -> Output:
    joints = output_joints(contract, output)
    if output.type == "joint_trajectory":
        return TrajectoryTopic(node, output.name, joints, True, on_incompatible)
    if output.type == "float64_multi_array":
        return PositionStream(node, output.name, joints, nanoseconds(contract.period_s), on_incompatible)
    types = actions.action_types()
    if output.type == "follow_joint_trajectory":
        client = RclpyGoalClient(node, types.FollowJointTrajectory, output.name)
        goal = actions.follow_joint_trajectory_goal(types)
        return actions.TrajectoryActionOutput(output, client, goal, joints, on_fault)
    if output.type == "gripper_command":
        client = RclpyGoalClient(node, types.GripperCommand, output.name)
        return actions.GripperActionOutput(
            output, client, actions.gripper_command_goal(types, output.max_effort), joints[0]
        )
    name = contract.joint_names[joints[0]]
    goal = actions.parallel_gripper_goal(types, name, output.max_effort)
    client = RclpyGoalClient(node, types.ParallelGripperCommand, output.name)
    return actions.GripperActionOutput(output, client, goal, joints[0])

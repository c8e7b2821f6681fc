"""One joint of a contract: names, units, limits, and how its number in the checkpoint follows from the robot's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omega_qvla_core.errors import ConfigError

JUMP_FACTOR = 1.5
"""A joint may not be asked to move further in one period than its velocity limit x period x this."""


@dataclass(frozen=True)
class EndPoints:
    """Two points of a straight line between robot and checkpoint, for units that are no SI units.

    Attributes:
        robot: Two different positions of the joint, in its unit.
        checkpoint: The checkpoint's numbers at these positions. Default: the percentage of LeRobot's motors, -100 to
            100 between the calibrated ends.
    """

    robot: tuple[float, float]
    checkpoint: tuple[float, float] = (-100.0, 100.0)


@dataclass(frozen=True)
class GripperMap:
    """Two measured points of a gripper. Measure them: open and close the gripper and read ``joint_states``.

    Attributes:
        robot_open: Position of the open gripper, in the joint's unit.
        robot_closed: Position of the closed, empty gripper.
        checkpoint_open: The checkpoint's state when open.
        checkpoint_closed: The checkpoint's state when closed.
        action_open: The checkpoint's action for open, where it differs from the state.
        action_closed: The checkpoint's action for closed, where it differs from the state.
    """

    robot_open: float
    robot_closed: float
    checkpoint_open: float
    checkpoint_closed: float
    action_open: float | None = None
    action_closed: float | None = None


@dataclass(frozen=True)
class JointContract:
    """One joint. ``unit`` holds for every number of the robot here.

    At most one of three conversions may be given: ``sign``, ``offset`` and ``checkpoint_unit`` together, giving
    ``checkpoint = sign * (robot - offset) * scale``; ``end_points``; or ``gripper``. With none of them the checkpoint
    and the robot use the same numbers.

    Attributes:
        name: Name in ``joint_states`` and in the commands.
        unit: ``rad`` or ``m`` (REP-103).
        position_min: Lowest commanded position. Not given: the URDF's.
        position_max: Highest commanded position. Not given: the URDF's.
        max_velocity: Highest commanded speed, unit/s. Not given: the URDF's.
        max_acceleration: Highest commanded acceleration, unit/s^2, and the deceleration of a hold. A URDF has none.
        max_jump: Largest step between two commanded samples one control period apart; a chunk with a larger one is
            refused. Not given: velocity limit x period x 1.5.
        max_tracking_error: Largest difference between commanded and measured position before the arm is held and
            planned for anew from the measured position; a joint that stands at a fifth of it for 2 s is held, too.
            Not given: not watched (a gripper that holds something).
        sign: -1 where the checkpoint's joint turns the other way.
        offset: Position of the robot at which the checkpoint's joint is 0.
        checkpoint_unit: ``rad``, ``m`` or ``deg``. Not given: ``unit``.
        end_points: Two points instead, for percent.
        gripper: Two measured points of a gripper instead.
        state_name: Name of this joint among the checkpoint's state entries. Not given: ``name``.
        action_name: Name of this joint among the checkpoint's action entries. Not given: ``name``.
        in_state: ``false`` for a joint that the checkpoint moves but does not see.
        action_mode: ``absolute`` or ``delta`` for this joint alone (a gripper of a policy with deltas is usually
            absolute). Not given: the one of ``checkpoint``.
    """

    name: str
    unit: Literal["rad", "m"] = "rad"
    position_min: float | None = None
    position_max: float | None = None
    max_velocity: float | None = None
    max_acceleration: float | None = None
    max_jump: float | None = None
    max_tracking_error: float | None = None
    sign: Literal[1, -1] = 1
    offset: float = 0.0
    checkpoint_unit: Literal["rad", "m", "deg"] | None = None
    end_points: EndPoints | None = None
    gripper: GripperMap | None = None
    state_name: str | None = None
    action_name: str | None = None
    in_state: bool = True
    action_mode: Literal["absolute", "delta"] | None = None


@dataclass(frozen=True)
class JointLimits:
    """Limits of all joints in contract order, each float64 ``[joints]``, in rad or m, and per second."""

    position_min: np.ndarray
    position_max: np.ndarray
    max_velocity: np.ndarray
    max_acceleration: np.ndarray
    max_jump: np.ndarray
    max_tracking_error: np.ndarray


def joint_limits(joints: Sequence[JointContract], period_s: float) -> JointLimits:
    """Limits as arrays, with the defaults that follow from others.

    Args:
        joints: In contract order.
        period_s: Control period, for the default of ``max_jump``.

    Raises:
        ConfigError: A limit without a default is missing.
    """

    def column(name: str) -> np.ndarray:
        for joint in joints:
            if getattr(joint, name) is None:
                raise ConfigError(
                    f"joint {joint.name!r} has no {name}: give it in the robot contract, or let a URDF give it "
                    "(robot_description.use: required)"
                )
        return np.array([getattr(joint, name) for joint in joints], dtype=np.float64)

    max_velocity = column("max_velocity")
    default_jump = max_velocity * period_s * JUMP_FACTOR
    jumps = [joint.max_jump for joint in joints]
    errors = [joint.max_tracking_error for joint in joints]
    return JointLimits(
        position_min=column("position_min"),
        position_max=column("position_max"),
        max_velocity=max_velocity,
        max_acceleration=column("max_acceleration"),
        max_jump=np.array([d if jump is None else jump for jump, d in zip(jumps, default_jump)]),
        max_tracking_error=np.array([np.inf if error is None else error for error in errors]),
    )


@dataclass(frozen=True)
class JointConversion:
    """``checkpoint = gain * robot + bias`` for all joints, each float64 ``[joints]``, no gain is 0."""

    gain: np.ndarray
    bias: np.ndarray

    def to_checkpoint(self, robot: np.ndarray) -> np.ndarray:
        """Robot units ``[..., joints]`` to checkpoint units."""
        return self.gain * robot + self.bias

    def to_robot(self, checkpoint: np.ndarray) -> np.ndarray:
        """Checkpoint units ``[..., joints]`` to robot units."""
        return (checkpoint - self.bias) / self.gain


def conversion(joints: Sequence[JointContract], which: Literal["state", "action"]) -> JointConversion:
    """The conversion of the state's or of the action's entries of all joints, in contract order."""
    lines = np.array([_line(joint, which) for joint in joints], dtype=np.float64)
    return JointConversion(gain=lines[:, 0], bias=lines[:, 1])


def _line(joint: JointContract, which: Literal["state", "action"]) -> tuple[float, float]:
    """Gain and bias of one joint."""
    if joint.gripper is not None:
        ends = joint.gripper
        checkpoint = (ends.checkpoint_closed, ends.checkpoint_open)
        if which == "action" and ends.action_open is not None and ends.action_closed is not None:
            checkpoint = (ends.action_closed, ends.action_open)
        return _through((ends.robot_closed, ends.robot_open), checkpoint)
    if joint.end_points is not None:
        return _through(joint.end_points.robot, joint.end_points.checkpoint)
    scale = 180.0 / np.pi if joint.checkpoint_unit == "deg" else 1.0
    gain = joint.sign * scale
    return gain, -gain * joint.offset if joint.offset else 0.0


def _through(robot: tuple[float, float], checkpoint: tuple[float, float]) -> tuple[float, float]:
    gain = (checkpoint[1] - checkpoint[0]) / (robot[1] - robot[0])
    return gain, checkpoint[0] - gain * robot[0]

"""The robot contract: which cameras, which joints in which units and limits, and how fast, as one typed YAML file.

The contract is the robot's side; a ``PolicySpec`` is the checkpoint's side. Nothing moves before both agree
(``check_policy``). Joints are matched by name everywhere, never by position.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_core.strict_json import dataclass_from_json

FORMAT_VERSION = 1
JUMP_FACTOR = 1.5
"""A joint may not be asked to move further in one period than its velocity limit x period x this."""
MAX_CONTRACT_BYTES = 1024 * 1024


@dataclass(frozen=True)
class CameraContract:
    """One camera stream.

    Attributes:
        key: Name that the checkpoint uses (``front``).
        topic: Relative topic of ``sensor_msgs/Image``.
        timeout_s: An image older than this holds the arm.
    """

    key: str
    topic: str
    timeout_s: float = 0.25


@dataclass(frozen=True)
class JointContract:
    """One joint with its limits. ``unit`` is ``rad`` or ``m`` and holds for every number here.

    Attributes:
        name: Name in ``joint_states`` and in the trajectory.
        position_min: Lowest commanded position.
        position_max: Highest commanded position.
        max_velocity: Highest commanded speed, unit/s.
        max_acceleration: Deceleration of a hold and of the end of every window, unit/s^2.
        unit: ``rad`` or ``m``.
        max_jump: Largest step between two commanded samples one control period apart; a chunk with a larger one is
            refused. None: velocity limit x period x 1.5.
        max_tracking_error: Largest difference between commanded and measured position before the arm is held and
            planned for anew from the measured position; a joint that stands at a fifth of it for 2 s is held, too.
            None: not watched (a gripper that holds something).
        state_name: Name of this joint among the checkpoint's state entries. None: ``name``.
        action_name: Name of this joint among the checkpoint's action entries. None: ``name``.
    """

    name: str
    position_min: float
    position_max: float
    max_velocity: float
    max_acceleration: float
    unit: Literal["rad", "m"] = "rad"
    max_jump: float | None = None
    max_tracking_error: float | None = None
    state_name: str | None = None
    action_name: str | None = None


@dataclass(frozen=True)
class SensorContract:
    """Joint states and how streams are put together.

    Attributes:
        joint_states_topic: Relative topic of ``sensor_msgs/JointState``.
        joint_states_timeout_s: A joint position older than this holds the arm.
        sync_tolerance_s: Largest difference between the stamps within one observation.
        max_future_stamp_s: A stamp further ahead of the node's clock than this is dropped.
        resume_after_samples: Fresh samples that a stream must give after it was stale.
    """

    joint_states_topic: str = "joint_states"
    joint_states_timeout_s: float = 0.1
    sync_tolerance_s: float = 0.05
    max_future_stamp_s: float = 0.05
    resume_after_samples: int = 3


@dataclass(frozen=True)
class CommandContract:
    """Where the motion goes. ``topic`` carries ``trajectory_msgs/JointTrajectory`` (relative; remap it in launch)."""

    topic: str = "joint_trajectory"


@dataclass(frozen=True)
class LimitContract:
    """What happens with a plan outside the limits.

    Attributes:
        mode: ``clamp`` limits position and speed and counts it; ``reject`` refuses the whole chunk.
        reject_beyond_range: With ``clamp``, a target further outside than this fraction of the joint's range is no
            inaccuracy but a fault: the chunk is refused. None: everything is clamped.
    """

    mode: Literal["clamp", "reject"] = "clamp"
    reject_beyond_range: float | None = 0.25


@dataclass(frozen=True)
class ChunkContract:
    """How chunks are used.

    Attributes:
        execution_horizon_steps: Steps of a chunk after which the next inference starts.
        blend_time_s: Time over which a new chunk replaces the committed one.
    """

    execution_horizon_steps: int = 4
    blend_time_s: float = 0.1


@dataclass(frozen=True)
class JointLimits:
    """Limits of all joints in contract order, each float64 ``[joints]``, in rad or m, and per second."""

    position_min: np.ndarray
    position_max: np.ndarray
    max_velocity: np.ndarray
    max_acceleration: np.ndarray
    max_jump: np.ndarray
    max_tracking_error: np.ndarray


@dataclass(frozen=True)
class RobotContract:
    """One robot, as read from ``config/robots/<name>.yaml``."""

    format_version: int
    name: str
    control_rate_hz: float
    cameras: tuple[CameraContract, ...]
    joints: tuple[JointContract, ...]
    sensors: SensorContract = field(default_factory=SensorContract)
    command: CommandContract = field(default_factory=CommandContract)
    limits: LimitContract = field(default_factory=LimitContract)
    chunk: ChunkContract = field(default_factory=ChunkContract)
    default_instruction: str = ""

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Joint names in contract order, which is the order of every array in this package."""
        return tuple(joint.name for joint in self.joints)

    @property
    def period_s(self) -> float:
        """One control period."""
        return 1.0 / self.control_rate_hz

    def joint_limits(self) -> JointLimits:
        """Limits as arrays."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(joint, name) for joint in self.joints], dtype=np.float64)

        max_velocity = column("max_velocity")
        default_jump = max_velocity * self.period_s * JUMP_FACTOR
        jumps = [joint.max_jump for joint in self.joints]
        errors = [joint.max_tracking_error for joint in self.joints]
        return JointLimits(
            position_min=column("position_min"),
            position_max=column("position_max"),
            max_velocity=max_velocity,
            max_acceleration=column("max_acceleration"),
            max_jump=np.array([d if jump is None else jump for jump, d in zip(jumps, default_jump)]),
            max_tracking_error=np.array([np.inf if error is None else error for error in errors]),
        )


@dataclass(frozen=True)
class PolicyBinding:
    """Where the contract's joints stand in the checkpoint's vectors.

    Attributes:
        state_joints: For each state entry of the checkpoint, the index of the joint in the contract.
        action_entries: For each joint of the contract, the index of its action entry in the checkpoint.
    """

    state_joints: np.ndarray
    action_entries: np.ndarray


def load_contract(path: Path | str) -> RobotContract:
    """Read and check a contract.

    Args:
        path: YAML file.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (with the nearest valid name) or missing, or a
            value is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"the robot contract {path} does not exist; set the parameter 'contract' to a YAML file")
    if path.stat().st_size > MAX_CONTRACT_BYTES:
        raise ConfigError(f"{path} has more than {MAX_CONTRACT_BYTES} bytes; is it a robot contract?")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return contract_from_dict(data, str(path))


def contract_from_dict(data: object, where: str = "contract") -> RobotContract:
    """Build a contract from a decoded YAML mapping; ``where`` names it in messages.

    Raises:
        ConfigError: See ``load_contract``.
    """
    contract = dataclass_from_json(RobotContract, data, where)
    _check(contract, where)
    return contract


def _check(contract: RobotContract, where: str) -> None:
    if contract.format_version != FORMAT_VERSION:
        raise ConfigError(f"{where}.format_version is {contract.format_version}; this release reads {FORMAT_VERSION}")
    if not contract.cameras or not contract.joints:
        raise ConfigError(f"{where} must have at least one camera and one joint")
    _positive(contract.control_rate_hz, f"{where}.control_rate_hz")
    _unique([camera.key for camera in contract.cameras], f"{where}.cameras: key")
    _unique([camera.topic for camera in contract.cameras], f"{where}.cameras: topic")
    _unique(list(contract.joint_names), f"{where}.joints: name")
    for camera in contract.cameras:
        _positive(camera.timeout_s, f"{where}.cameras[{camera.key}].timeout_s")
    for joint in contract.joints:
        _check_joint(joint, f"{where}.joints[{joint.name}]")
    sensors = contract.sensors
    _positive(sensors.joint_states_timeout_s, f"{where}.sensors.joint_states_timeout_s")
    _positive(sensors.sync_tolerance_s, f"{where}.sensors.sync_tolerance_s")
    _positive(sensors.max_future_stamp_s, f"{where}.sensors.max_future_stamp_s")
    if sensors.resume_after_samples < 1:
        raise ConfigError(f"{where}.sensors.resume_after_samples is {sensors.resume_after_samples}; at least 1")
    if contract.chunk.execution_horizon_steps < 1:
        raise ConfigError(
            f"{where}.chunk.execution_horizon_steps is {contract.chunk.execution_horizon_steps}; at least 1"
        )
    if contract.chunk.blend_time_s < 0:
        raise ConfigError(f"{where}.chunk.blend_time_s is {contract.chunk.blend_time_s}; it must not be negative")
    if contract.limits.reject_beyond_range is not None and contract.limits.reject_beyond_range < 0:
        raise ConfigError(f"{where}.limits.reject_beyond_range must not be negative")


def _check_joint(joint: JointContract, where: str) -> None:
    if joint.position_min >= joint.position_max:
        raise ConfigError(f"{where}: position_min {joint.position_min} must be below position_max {joint.position_max}")
    _positive(joint.max_velocity, f"{where}.max_velocity")
    _positive(joint.max_acceleration, f"{where}.max_acceleration")
    for name in ("max_jump", "max_tracking_error"):
        value = getattr(joint, name)
        if value is not None:
            _positive(value, f"{where}.{name}")


def _positive(value: float, where: str) -> None:
    if value <= 0:
        raise ConfigError(f"{where} is {value}; it must be greater than 0")


def _unique(names: Sequence[str], where: str) -> None:
    for name in names:
        if not name:
            raise ConfigError(f"{where} must not be empty")
        if names.count(name) > 1:
            raise ConfigError(f"{where} {name!r} occurs {names.count(name)} times; each must be unique")


def check_policy(contract: RobotContract, spec: PolicySpec) -> PolicyBinding:
    """Check that a checkpoint fits the robot.

    Args:
        contract: The robot.
        spec: What the checkpoint says about itself.

    Returns:
        The index maps between both.

    Raises:
        ConfigError: Camera keys, state names, action names or control rate differ; the message prints both lists.
    """
    _same_names("camera keys", [camera.key for camera in contract.cameras], [camera.key for camera in spec.cameras])
    state_names = [joint.state_name or joint.name for joint in contract.joints]
    action_names = [joint.action_name or joint.name for joint in contract.joints]
    _same_names("state names", state_names, spec.state_names)
    _same_names("action names", action_names, spec.action_names)
    if abs(spec.control_hz - contract.control_rate_hz) > 1e-6 * contract.control_rate_hz:
        raise ConfigError(
            f"contract {contract.name!r} commands at {contract.control_rate_hz} Hz, the checkpoint {spec.name!r} was "
            f"trained at {spec.control_hz} Hz; set control_rate_hz of the contract to {spec.control_hz}"
        )
    if contract.chunk.execution_horizon_steps > spec.horizon:
        raise ConfigError(
            f"contract {contract.name!r}: execution_horizon_steps is {contract.chunk.execution_horizon_steps}, the "
            f"checkpoint's chunks have {spec.horizon} steps; choose at most {spec.horizon}"
        )
    return PolicyBinding(
        state_joints=np.array([state_names.index(name) for name in spec.state_names], dtype=np.intp),
        action_entries=np.array([list(spec.action_names).index(name) for name in action_names], dtype=np.intp),
    )


def _same_names(what: str, contract_names: Sequence[str], checkpoint_names: Sequence[str]) -> None:
    if len(contract_names) == len(set(checkpoint_names)) and set(contract_names) == set(checkpoint_names):
        return
    unmatched = [name for name in contract_names if name not in checkpoint_names]
    hint = ""
    if unmatched:
        free = [name for name in checkpoint_names if name not in contract_names]
        near = difflib.get_close_matches(unmatched[0], free, n=1, cutoff=0.0)
        hint = f" (nearest to {unmatched[0]!r} is {near[0]!r})" if near else ""
    raise ConfigError(
        f"the {what} of contract and checkpoint differ{hint}: contract [{', '.join(contract_names)}], "
        f"checkpoint [{', '.join(checkpoint_names)}]; correct the contract or load the checkpoint made for this robot"
    )

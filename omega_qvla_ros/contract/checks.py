"""What a contract must keep to beyond the types of its fields. Messages name file, key, value and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, replace

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract.joints import JointContract
from omega_qvla_ros.contract.schema import FORMAT_VERSION, GRIPPER_OUTPUTS, OutputContract, RobotContract

_RELATIVE_NAME = re.compile(r"[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)


def with_all_joints(contract: RobotContract, where: str) -> RobotContract:
    """The contract with the joints of an output that names none filled in: all that no other output takes.

    Raises:
        ConfigError: Several outputs name none.
    """
    open_outputs = [output for output in contract.outputs if not output.joints]
    if len(open_outputs) > 1:
        raise ConfigError(
            f"{where}.outputs: {open_outputs[0].name!r} and {open_outputs[1].name!r} both name no joints; only one may "
            "take all that are left"
        )
    taken = {name for output in contract.outputs for name in output.joints}
    rest = tuple(name for name in contract.joint_names if name not in taken)
    outputs = tuple(output if output.joints else replace(output, joints=rest) for output in contract.outputs)
    return replace(contract, outputs=outputs)


def check_contract(contract: RobotContract, where: str) -> None:
    """Check everything that types cannot say.

    Raises:
        ConfigError: For the first thing that is wrong.
    """
    if contract.format_version != FORMAT_VERSION:
        raise ConfigError(f"{where}.format_version is {contract.format_version}; this release reads {FORMAT_VERSION}")
    if not contract.cameras or not contract.joints:
        raise ConfigError(f"{where} must have at least one camera and one joint")
    _positive(contract.control_rate_hz, f"{where}.control_rate_hz")
    _check_cameras(contract, where)
    _unique(list(contract.joint_names), f"{where}.joints: name")
    seen = [joint.state_name or joint.name for joint in contract.joints if joint.in_state]
    _unique(seen, f"{where}.joints: state_name")
    _unique([joint.action_name or joint.name for joint in contract.joints], f"{where}.joints: action_name")
    for joint in contract.joints:
        _check_joint(joint, f"{where}.joints[{joint.name}]")
    _check_sensors(contract, where)
    _check_outputs(contract, where)
    _check_numbers(contract, where)


def _check_cameras(contract: RobotContract, where: str) -> None:
    _unique([camera.key for camera in contract.cameras], f"{where}.cameras: key")
    _unique([camera.topic for camera in contract.cameras], f"{where}.cameras: topic")
    for camera in contract.cameras:
        here = f"{where}.cameras[{camera.key}]"
        _relative(camera.topic, f"{here}.topic")
        _positive(camera.timeout_s, f"{here}.timeout_s")
        if camera.transport == "compressed" and camera.encoding not in (None, "rgb8", "bgr8"):
            raise ConfigError(
                f"{here}.encoding is {camera.encoding!r}, but a compressed image holds colours; leave encoding out"
            )


def _check_sensors(contract: RobotContract, where: str) -> None:
    sensors, description = contract.sensors, contract.robot_description
    _relative(sensors.joint_states_topic, f"{where}.sensors.joint_states_topic")
    for name in ("joint_states_timeout_s", "sync_tolerance_s", "max_future_stamp_s", "max_clock_skew_s"):
        _positive(getattr(sensors, name), f"{where}.sensors.{name}")
    if sensors.resume_after_samples < 1:
        raise ConfigError(f"{where}.sensors.resume_after_samples is {sensors.resume_after_samples}; at least 1")
    _check_joint_sources(contract, f"{where}.sensors")
    _relative(description.topic, f"{where}.robot_description.topic")
    _positive(description.timeout_s, f"{where}.robot_description.timeout_s")


def _check_joint_sources(contract: RobotContract, where: str) -> None:
    _unique(list(contract.sensors.joint_topics), f"{where}: topic of joint states")
    taken: dict[str, str] = {}
    for source in contract.sensors.joint_sources:
        here = f"{where}.joint_sources[{source.topic}]"
        _relative(source.topic, f"{here}.topic")
        _positive(source.timeout_s, f"{here}.timeout_s")
        if not source.joints:
            raise ConfigError(f"{here}.joints is empty; name the joints that come from there")
        _take(source.joints, source.topic, taken, contract.joint_names, here, "comes from")
    if len(taken) == len(contract.joint_names):
        raise ConfigError(f"{where}.joint_sources names every joint; make one of its topics the joint_states_topic")


def _take(names: Sequence[str], by: str, taken: dict[str, str], known: Sequence[str], where: str, verb: str) -> None:
    """Note joints as taken by ``by``; each must be known, and taken once."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}.joints: {name!r} is none of the contract's joints; did you mean {near!r}?")
        if name in taken:
            raise ConfigError(f"{where}.joints: {name!r} {verb} {taken[name]!r} already; name each joint in one")
        taken[name] = by


def _check_outputs(contract: RobotContract, where: str) -> None:
    if not contract.outputs:
        raise ConfigError(f"{where}.outputs is empty; list at least one, or leave it out")
    _unique([output.name for output in contract.outputs], f"{where}.outputs: name")
    taken: dict[str, str] = {}
    for output in contract.outputs:
        here = f"{where}.outputs[{output.name}]"
        _relative(output.name, f"{here}.name")
        _check_output(output, here)
        _take(output.joints, output.name, taken, contract.joint_names, here, "is commanded by")
    left = [name for name in contract.joint_names if name not in taken]
    if left:
        raise ConfigError(f"{where}.outputs: no output takes the joint {left[0]!r}; name it in one of them")


def _check_output(output: OutputContract, where: str) -> None:
    if not output.joints:
        raise ConfigError(f"{where}.joints is empty and the other outputs take every joint; remove this output")
    if output.type in GRIPPER_OUTPUTS and len(output.joints) != 1:
        raise ConfigError(f"{where}: {output.type} moves one joint, not {', '.join(output.joints)}")
    if output.max_effort is not None:
        if output.type not in GRIPPER_OUTPUTS:
            raise ConfigError(f"{where}.max_effort is for grippers; remove it from {output.type}")
        _positive(output.max_effort, f"{where}.max_effort")
    _positive(output.min_change, f"{where}.min_change")


def _check_numbers(contract: RobotContract, where: str) -> None:
    chunk, limits, safety = contract.chunk, contract.limits, contract.safety
    if chunk.rate_hz is not None:
        _positive(chunk.rate_hz, f"{where}.chunk.rate_hz")
    if chunk.execution_horizon_steps < 1:
        raise ConfigError(f"{where}.chunk.execution_horizon_steps is {chunk.execution_horizon_steps}; at least 1")
    if chunk.blend_time_s < 0:
        raise ConfigError(f"{where}.chunk.blend_time_s is {chunk.blend_time_s}; it must not be negative")
    _positive(chunk.min_remaining_s, f"{where}.chunk.min_remaining_s")
    if not 0.0 <= chunk.switch_lead_s < chunk.min_remaining_s:
        raise ConfigError(
            f"{where}.chunk.switch_lead_s is {chunk.switch_lead_s}; at least 0, and below min_remaining_s "
            f"({chunk.min_remaining_s:g}), or no chunk would be there in time"
        )
    if not limits.max_slowdown >= 1.0:
        raise ConfigError(f"{where}.limits.max_slowdown is {limits.max_slowdown}; at least 1, which slows nothing down")
    if limits.reject_beyond_range is not None and limits.reject_beyond_range < 0:
        raise ConfigError(
            f"{where}.limits.reject_beyond_range is {limits.reject_beyond_range}; it must not be negative"
        )
    for field in fields(safety):
        value = getattr(safety, field.name)
        if field.name in ("retry_delay_s", "estop_reset_delay_s"):
            if value < 0:
                raise ConfigError(f"{where}.safety.{field.name} is {value}; it must not be negative")
        elif field.name != "estop_topic":
            _positive(value, f"{where}.safety.{field.name}")
    if safety.estop_topic is not None:
        _relative(safety.estop_topic.removeprefix("/"), f"{where}.safety.estop_topic")


def _check_joint(joint: JointContract, where: str) -> None:
    low, high = joint.position_min, joint.position_max
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"{where}: position_min {low} must be below position_max {high}")
    if joint.max_acceleration is None:
        raise ConfigError(f"{where} lacks the key 'max_acceleration'; no URDF has it, so the contract must")
    for name in ("max_velocity", "max_acceleration", "max_jump", "max_tracking_error"):
        value = getattr(joint, name)
        if value is not None:
            _positive(value, f"{where}.{name}")
    _check_conversion(joint, where)


def _check_conversion(joint: JointContract, where: str) -> None:
    plain = joint.sign != 1 or joint.offset != 0.0 or joint.checkpoint_unit is not None
    given = [
        name
        for name, there in (
            ("sign, offset and checkpoint_unit", plain),
            ("end_points", joint.end_points is not None),
            ("gripper", joint.gripper is not None),
        )
        if there
    ]
    if len(given) > 1:
        raise ConfigError(f"{where} has two conversions, {' and '.join(given)}; keep one")
    if joint.checkpoint_unit is not None and (joint.unit == "m") != (joint.checkpoint_unit == "m"):
        raise ConfigError(
            f"{where}.checkpoint_unit is {joint.checkpoint_unit!r} for a joint in {joint.unit}; give a unit of "
            "the same kind, or two end_points"
        )
    pairs = {}
    if joint.end_points is not None:
        pairs = {"end_points.robot": joint.end_points.robot, "end_points.checkpoint": joint.end_points.checkpoint}
    if joint.gripper is not None:
        ends = joint.gripper
        if (ends.action_open is None) != (ends.action_closed is None):
            raise ConfigError(f"{where}.gripper needs both of action_open and action_closed, or none")
        pairs = {
            "gripper.robot_open and robot_closed": (ends.robot_open, ends.robot_closed),
            "gripper.checkpoint_open and checkpoint_closed": (ends.checkpoint_open, ends.checkpoint_closed),
        }
        if ends.action_open is not None and ends.action_closed is not None:
            pairs["gripper.action_open and action_closed"] = (ends.action_open, ends.action_closed)
    for name, (first, second) in pairs.items():
        if first == second:
            raise ConfigError(f"{where}.{name} are both {first}; two different points make a line")


def _positive(value: float, where: str) -> None:
    if value <= 0:
        raise ConfigError(f"{where} is {value}; it must be greater than 0")


def _relative(name: str, where: str) -> None:
    """Names are relative, so that two robots in two namespaces do not touch each other."""
    if name.startswith(("/", "~")):
        raise ConfigError(
            f"{where} is {name!r}; give a relative name (without / or ~ in front) and remap it in launch, so that a "
            "second robot can have a namespace of its own"
        )
    if not _RELATIVE_NAME.fullmatch(name):
        raise ConfigError(f"{where} is {name!r}, which is no ROS name; use letters, digits, _ and single /")


def _unique(names: Sequence[str], where: str) -> None:
    for name in names:
        if not name:
            raise ConfigError(f"{where} must not be empty")
        if names.count(name) > 1:
            raise ConfigError(f"{where} {name!r} occurs {names.count(name)} times; each must be unique")

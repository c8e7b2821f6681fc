"""Joint limits of a URDF, and a contract whose limits are never looser than those.

The URDF comes over a topic, so it is read as data from a stranger: bounded in size and without a document type, so no
entity, internal or external, can be declared. Four attributes of ``<limit>`` are needed; a robot model is not, which is
why no URDF library is asked for (``urdf_parser_py`` expands entities through lxml).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract.joints import JointContract
from omega_qvla_ros.contract.schema import RobotContract

MAX_URDF_CHARACTERS = 16 * 1024 * 1024
"""The largest published descriptions with all their meshes named have some hundred kB."""

_UNITS = {"revolute": "rad", "continuous": "rad", "prismatic": "m"}
_RELATIVE_TOLERANCE = 1e-6
"""A contract written with six digits is not looser than the URDF's 2 pi."""


@dataclass(frozen=True)
class UrdfLimits:
    """Limits of one joint as its URDF says, None where it does not say.

    Attributes:
        name: Of the joint.
        unit: ``rad`` or ``m``, by the joint's type.
        position_min: Lower limit; the tighter one of ``limit`` and ``safety_controller``. None for continuous joints.
        position_max: Upper limit, likewise.
        max_velocity: Of ``limit``, unit/s.
    """

    name: str
    unit: str
    position_min: float | None
    position_max: float | None
    max_velocity: float | None


def limits_from_urdf(xml: str, joint_names: Sequence[str]) -> dict[str, UrdfLimits]:
    """Read the limits of some joints.

    Args:
        xml: Text of a URDF (not of a xacro).
        joint_names: Joints to look for.

    Returns:
        Joint name -> limits, for every name.

    Raises:
        ConfigError: No URDF, a document type or entities in it, a joint that is not there (with the nearest name) or
            does not move, or a limit that is no finite number.
    """
    joints = {joint.get("name", ""): joint for joint in read_urdf(xml).findall("joint")}
    found = {}
    for name in joint_names:
        if name not in joints:
            near = difflib.get_close_matches(name, joints, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"the URDF has no joint {name!r}{hint} Its joints: {', '.join(sorted(joints)) or 'none'}; correct the "
                "contract, or load the robot's own description"
            )
        found[name] = _limits(name, joints[name])
    return found


def with_urdf_limits(contract: RobotContract, limits: Mapping[str, UrdfLimits]) -> RobotContract:
    """A contract completed by the URDF's limits; the contract's own may only be tighter.

    Args:
        contract: As read from its file.
        limits: From ``limits_from_urdf`` for ``contract.joint_names``.

    Returns:
        The contract with every position and velocity limit that its file leaves out.

    Raises:
        ConfigError: A unit differs, a limit of the contract is looser than the URDF's, or neither has one.
    """
    joints = tuple(_merge(joint, limits[joint.name], contract.name) for joint in contract.joints)
    return replace(contract, joints=joints)


def read_urdf(xml: str) -> ElementTree.Element:
    """The ``<robot>`` element of a URDF from a stranger.

    Raises:
        ConfigError: No URDF, too large, or it declares a document type or entities.
    """
    if len(xml) > MAX_URDF_CHARACTERS:
        raise ConfigError(f"the URDF has {len(xml)} characters, more than {MAX_URDF_CHARACTERS}; is it a URDF?")
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ConfigError("the URDF declares a document type or entities, which no robot description needs; remove it")
    try:
        robot = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"the URDF is not valid XML ({error}); run check_urdf on it") from error
    if robot.tag != "robot":
        raise ConfigError(f"the robot description is a <{robot.tag}>, not a URDF's <robot>; publish the URDF")
    return robot


def _limits(name: str, joint: ElementTree.Element) -> UrdfLimits:
    kind = joint.get("type", "")
    if kind not in _UNITS:
        raise ConfigError(
            f"joint {name!r} of the URDF is of type {kind!r}; the contract may name joints that move only"
        )
    limit, soft = joint.find("limit"), joint.find("safety_controller")
    positions = kind != "continuous"
    low = _number(limit, "lower", name) if positions else None
    high = _number(limit, "upper", name) if positions else None
    if positions and limit is not None:
        # The format's own default where an attribute is left out.
        low, high = low or 0.0, high or 0.0
    if positions:
        soft_low, soft_high = _number(soft, "soft_lower_limit", name), _number(soft, "soft_upper_limit", name)
        low = max((value for value in (low, soft_low) if value is not None), default=None)
        high = min((value for value in (high, soft_high) if value is not None), default=None)
    velocity = _number(limit, "velocity", name)
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"joint {name!r} of the URDF has the limits {low} to {high}; lower must be below upper")
    # A velocity of 0 is how some descriptions say that they do not know.
    return UrdfLimits(name, _UNITS[kind], low, high, velocity if velocity else None)


def _number(element: ElementTree.Element | None, attribute: str, joint: str) -> float | None:
    text = None if element is None else element.get(attribute)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"joint {joint!r} of the URDF has {attribute}={text!r}; it must be a number") from error
    if not math.isfinite(value):
        raise ConfigError(f"joint {joint!r} of the URDF has {attribute}={text!r}; it must be finite")
    return value


def _merge(joint: JointContract, urdf: UrdfLimits, contract: str) -> JointContract:
    if joint.unit != urdf.unit:
        raise ConfigError(
            f"contract {contract!r}: joint {joint.name!r} is in {joint.unit}, the URDF's is in {urdf.unit}; set its "
            f"unit to {urdf.unit} and check its numbers"
        )
    merged = {}
    for name, looser in (("position_min", -1.0), ("position_max", 1.0), ("max_velocity", 1.0)):
        mine, theirs = getattr(joint, name), getattr(urdf, name)
        if mine is None and theirs is None:
            raise ConfigError(f"neither the contract {contract!r} nor the URDF has {name} of {joint.name!r}; give it")
        if mine is not None and theirs is not None:
            if looser * (mine - theirs) > _RELATIVE_TOLERANCE * max(1.0, abs(theirs)):
                raise ConfigError(
                    f"contract {contract!r}: {name} of joint {joint.name!r} is {mine}, looser than the URDF's "
                    f"{theirs}; set it to {theirs} or tighter, or leave it out"
                )
            merged[name] = mine if looser * (theirs - mine) > 0 else theirs
        else:
            merged[name] = theirs if mine is None else mine
    return replace(joint, **merged)

"""Where a link is for given joint positions: the chain of a URDF from its root to one link. For pictures only.

Nothing that moves the arm goes through here, so a description that cannot be used costs a marker and no motion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract.urdf import read_urdf

_MOVING = ("revolute", "continuous", "prismatic")


@dataclass(frozen=True)
class ChainJoint:
    """One joint of a chain.

    Attributes:
        name: Of the joint.
        kind: ``revolute``, ``continuous``, ``prismatic`` or ``fixed``.
        origin: ``[4, 4]`` from its frame at position 0 to the parent link.
        axis: ``[3]`` unit vector in its own frame.
        mimic: The joint whose position it follows, its multiplier and its offset; None for its own position.
    """

    name: str
    kind: str
    origin: np.ndarray
    axis: np.ndarray
    mimic: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Chain:
    """Joints from the root link to the tip link.

    Attributes:
        root: Name of the root link, the frame of every position.
        tip: Name of the tip link.
        joints: In that order.
    """

    root: str
    tip: str
    joints: tuple[ChainJoint, ...]

    def tip_position(self, positions: Mapping[str, float]) -> np.ndarray:
        """Position of the tip link's origin in the root frame, ``[3]`` in m.

        Args:
            positions: Joint name -> position in rad or m; joints that are not in it stand at 0.
        """
        pose = np.eye(4)
        for joint in self.joints:
            source, factor, offset = joint.mimic or (joint.name, 1.0, 0.0)
            pose = pose @ joint.origin @ _motion(joint, factor * positions.get(source, 0.0) + offset)
        return pose[:3, 3].copy()


def chain_from_urdf(xml: str, joint_names: Sequence[str], tip: str = "") -> Chain:
    """Read the chain to a link.

    Args:
        xml: Text of a URDF.
        joint_names: The contract's joints; the default tip is the child of the one that is furthest from the root.
        tip: Name of the tip link, empty for the default.

    Raises:
        ConfigError: No URDF, an unknown link or joint type in the chain, or links that form a circle.
    """
    joints = {}
    for element in read_urdf(xml).findall("joint"):
        child, parent = element.find("child"), element.find("parent")
        if child is not None and parent is not None:
            joints[child.get("link", "")] = (parent.get("link", ""), element)
    if not tip:
        ends = [child for child, (_, element) in joints.items() if element.get("name") in joint_names]
        if not ends:
            raise ConfigError(f"the URDF has none of the joints {', '.join(joint_names)}; load the robot's own")
        tip = max(ends, key=lambda link: len(_way(joints, link)))
    if tip not in joints:
        raise ConfigError(f"the URDF has no link {tip!r} behind a joint; set tip_link to one of {', '.join(joints)}")
    way = _way(joints, tip)
    return Chain(joints[way[0]][0], tip, tuple(_joint(joints[link][1]) for link in way))


def _way(joints: Mapping[str, tuple[str, ElementTree.Element]], tip: str) -> list[str]:
    """Links from the first behind the root to the tip."""
    way = [tip]
    while (parent := joints[way[-1]][0]) in joints:
        if parent in way:
            raise ConfigError(f"the links of the URDF form a circle at {parent!r}; run check_urdf on it")
        way.append(parent)
    return way[::-1]


def _joint(element: ElementTree.Element) -> ChainJoint:
    name, kind = element.get("name", ""), element.get("type", "")
    if kind not in (*_MOVING, "fixed"):
        raise ConfigError(f"joint {name!r} of the URDF is of type {kind!r}, which no chain is drawn through")
    origin, axis, mimic = element.find("origin"), element.find("axis"), element.find("mimic")
    pose = np.eye(4)
    if origin is not None:
        pose[:3, :3] = _rotation_rpy(*_vector(origin.get("rpy", "0 0 0"), name))
        pose[:3, 3] = _vector(origin.get("xyz", "0 0 0"), name)
    direction = _vector("1 0 0" if axis is None else axis.get("xyz", "1 0 0"), name)
    length = float(np.linalg.norm(direction))
    if length == 0.0:
        raise ConfigError(f"joint {name!r} of the URDF has an axis of length 0")
    follows = None
    if mimic is not None:
        numbers = _vector(f"{mimic.get('multiplier', '1')} {mimic.get('offset', '0')} 0", name)
        follows = (mimic.get("joint", ""), float(numbers[0]), float(numbers[1]))
    return ChainJoint(name, kind, pose, direction / length, follows)


def _vector(text: str, name: str) -> np.ndarray:
    try:
        values = np.array([float(part) for part in text.split()])
    except ValueError as error:
        raise ConfigError(f"joint {name!r} of the URDF has {text!r} where three numbers belong") from error
    if values.shape != (3,) or not np.isfinite(values).all():
        raise ConfigError(f"joint {name!r} of the URDF has {text!r} where three numbers belong")
    return values


def _motion(joint: ChainJoint, position: float) -> np.ndarray:
    pose = np.eye(4)
    if joint.kind == "prismatic":
        pose[:3, 3] = joint.axis * position
    elif joint.kind != "fixed":
        pose[:3, :3] = _rotation_about(joint.axis, position)
    return pose


def _rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def _rotation_rpy(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Fixed axes x, y, z, as URDF defines roll, pitch and yaw."""
    x, y, z = np.eye(3)
    return _rotation_about(z, yaw) @ _rotation_about(y, pitch) @ _rotation_about(x, roll)

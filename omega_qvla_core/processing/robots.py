"""Conventions of the robots that public checkpoints were trained on: rotations, ALOHA's joint space, grippers.

Constants of ALOHA are those of openpi's data transforms, which quote Trossen's and Interbotix' code.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

GripperConvention = Literal["as_is", "libero_sign", "binary"]

_ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, dtype=np.float64)
_ALOHA_GRIPPERS = (6, 13)
ALOHA_WIDTH = 14

# Linear position of the puppet gripper, m.
_LINEAR_CLOSED_M, _LINEAR_OPEN_M = 0.01844, 0.05800
# Lever of the gripper, m.
_ARM_LENGTH_M, _HORN_RADIUS_M = 0.036, 0.022
# Gripper angle that Pi 0.5 calls 0 and 1, rad.
_ANGLE_CLOSED_RAD, _ANGLE_OPEN_RAD = 0.5476, 1.6296
# Gripper joint that ALOHA calls 0 and 1, rad.
_JOINT_CLOSED_RAD, _JOINT_OPEN_RAD = -0.6213, 1.4910


def quaternion_to_axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Quaternion ``[4]`` (x, y, z, w) -> axis times angle ``[3]``, rad; zeros for no rotation (LIBERO's state)."""
    x, y, z, w = (float(value) for value in quaternion)
    w = min(1.0, max(-1.0, w))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * 2.0 * math.acos(w) / sine


def aloha_state_to_model(state: np.ndarray) -> np.ndarray:
    """ALOHA's proprioception ``[..., 14]`` -> the space of the base model: joint signs, angular grippers."""
    result = np.asarray(state, dtype=np.float64) * _ALOHA_SIGNS
    for index in _ALOHA_GRIPPERS:
        linear = result[..., index] * (_LINEAR_OPEN_M - _LINEAR_CLOSED_M) + _LINEAR_CLOSED_M
        sine = (_HORN_RADIUS_M**2 + linear**2 - _ARM_LENGTH_M**2) / (2 * _HORN_RADIUS_M * linear)
        angle = np.arcsin(np.clip(sine, -1.0, 1.0))
        result[..., index] = (angle - _ANGLE_CLOSED_RAD) / (_ANGLE_OPEN_RAD - _ANGLE_CLOSED_RAD)
    return result


def aloha_actions_to_robot(actions: np.ndarray) -> np.ndarray:
    """The base model's actions ``[..., 14]`` -> ALOHA's commands."""
    result = np.asarray(actions, dtype=np.float64) * _ALOHA_SIGNS
    for index in _ALOHA_GRIPPERS:
        angle = result[..., index] + _ANGLE_CLOSED_RAD
        result[..., index] = (angle - _JOINT_CLOSED_RAD) / (_JOINT_OPEN_RAD - _JOINT_CLOSED_RAD)
    return result


def aloha_actions_to_model(actions: np.ndarray) -> np.ndarray:
    """Inverse of ``aloha_actions_to_robot``."""
    result = np.asarray(actions, dtype=np.float64) * _ALOHA_SIGNS
    for index in _ALOHA_GRIPPERS:
        joint = result[..., index] * (_JOINT_OPEN_RAD - _JOINT_CLOSED_RAD) + _JOINT_CLOSED_RAD
        result[..., index] = joint - _ANGLE_CLOSED_RAD
    return result


def gripper_command(values: np.ndarray, convention: GripperConvention) -> np.ndarray:
    """What the robot's gripper is told.

    Args:
        values: The action's gripper entries, physical units. NaN stays NaN.
        convention: ``as_is``; ``libero_sign`` (data: 1 open, 0 closed -> simulator: -1 open, +1 closed, by sign);
            ``binary`` (DROID's client: above 0.5 is 1, else 0).
    """
    values = np.asarray(values, dtype=np.float64)
    if convention == "libero_sign":
        return np.sign(1.0 - 2.0 * values)
    if convention == "binary":
        return np.where(np.isnan(values), values, (values > 0.5).astype(np.float64))
    return values


def gripper_value(commands: np.ndarray, convention: GripperConvention) -> np.ndarray:
    """Inverse of ``gripper_command`` as far as there is one: the end points of the data, linear in between."""
    commands = np.asarray(commands, dtype=np.float64)
    return (1.0 - commands) / 2.0 if convention == "libero_sign" else commands

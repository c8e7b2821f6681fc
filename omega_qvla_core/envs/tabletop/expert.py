"""A scripted expert: memoryless feedback from privileged poses to joint targets.

The action depends on the present state alone, never on a phase counter. So its labels can be learned from single
observations, a state that noise or a learner's mistake has led to has a right action too, and a missed grasp or a
dropped cube is tried again without extra code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omega_qvla_core.envs.tabletop.kinematics import ArmKinematics, rotation_error
from omega_qvla_core.envs.tabletop.privileged import PrivilegedState, yaw_of
from omega_qvla_core.envs.tabletop.scene import CUBE_HALF_M, HOME
from omega_qvla_core.envs.tabletop.tasks import Task

OPEN_M = float(HOME[6])
"""Opening of one finger for approach and release. Leaves 1.6 cm on each side of a cube; the hand stays narrow enough
not to touch a cube 8 cm away."""

CLOSED_M = 0.0
"""Commanded opening for grasping; the cube stops the fingers at 0.02 m."""

# Speeds of the tool. The joint servos follow about 45 ms late, so the target is set that much further ahead than the
# 50 ms period: otherwise the arm, led by its own measured position, would run at about half the speed.
_SPEED_M_S = 0.42
_TURN_SPEED_RAD_S = 2.2
_LOOKAHEAD_S = 0.095
_GAIN_1_S = 10.0

# Heights of the tool (between the fingertips; the fingers reach 1.2 cm further).
_GRASP_HEIGHT_M = 0.018
_LIFTED_HEIGHT_M = 0.15
_CARRY_HEIGHT_M = 0.13
_RELEASE_HEIGHT_M = 0.021
_RETREAT_HEIGHT_M = 0.12
_FINGERTIP_M = 0.012
# Press a little: the servo's target lies this far inside the cube.
_PRESS_M = 0.006

# The funnel: how high above its goal the tool has to be, as a function of the sideways error.
_FUNNEL_TOLERANCE_M = 0.008
_FUNNEL_SLOPE = 3.0
_FUNNEL_TOP_M = 0.09
_CLEAR_M = 0.055
_YAW_TOLERANCE_RAD = 0.12
# Below the funnel the tool rises first and moves sideways only as far as this length scale allows.
_SIDEWAYS_SCALE_M = 0.012

# When the fingers may close, and what counts as holding.
_CLOSE_XY_M = 0.011
_CLOSE_Z_M = 0.013
_CLOSE_YAW_RAD = 0.22
_HOLD_XY_M = 0.016
_HOLD_Z_M = 0.020
_HOLD_OPENING_M = 0.0225
_RAISED_M = 0.008
_PLACE_XY_M = 0.014
_PLACED_XY_M = 0.030
_OPENED_M = 0.029

# How strongly the yaw that is free (a cube looks the same after a quarter turn) prefers the arm's own heading over
# the present yaw. With the present yaw alone, repeated tries could wind the wrist up.
_HEADING_WEIGHT = 0.35


@dataclass(frozen=True)
class _Goal:
    position: np.ndarray
    yaw: float
    opening: float


class Expert:
    """Solves every task from privileged poses. Holds no state between calls."""

    def __init__(self) -> None:
        self._kinematics = ArmKinematics()

    def action(self, state: PrivilegedState, task: Task) -> np.ndarray:
        """The target for the end of this control period.

        Args:
            state: Poses now (``TabletopEnv.privileged()``).
            task: What to do.

        Returns:
            float64 ``[7]``: joint targets in rad and the finger opening in m (either open or closed; the environment
            limits its speed).
        """
        goal = self._touch(state, task) if task.kind == "touch" else self._pick(state, task)
        return self.towards(state, goal.position, goal.yaw, goal.opening)

    def towards(self, state: PrivilegedState, position: np.ndarray, yaw: float, opening: float) -> np.ndarray:
        """One control period's move of the tool towards a pose, pointing down, at limited speed.

        Args:
            state: Poses now.
            position: float64 ``[3]`` m, where the tool shall go.
            yaw: Heading of the tool in rad.
            opening: Finger opening in m.

        Returns:
            float64 ``[7]``, as ``action``.
        """
        offset = position - state.tool_position
        distance = float(np.linalg.norm(offset))
        reach = min(_SPEED_M_S, _GAIN_1_S * distance) * _LOOKAHEAD_S
        waypoint = state.tool_position + offset * min(1.0, reach / max(distance, 1e-9))
        turn = rotation_error(state.tool_rotation, _pointing_down(yaw))
        angle = float(np.linalg.norm(turn))
        turn_reach = min(_TURN_SPEED_RAD_S, _GAIN_1_S * angle) * _LOOKAHEAD_S
        rotation = _rotation(turn * min(1.0, turn_reach / max(angle, 1e-9))) @ state.tool_rotation
        joints = self._kinematics.inverse(state.joint_positions, waypoint, rotation)
        return np.concatenate([joints, [opening]])

    def _touch(self, state: PrivilegedState, task: Task) -> _Goal:
        cube = state.cube_positions[task.colour_index]
        goal_z = cube[2] + CUBE_HALF_M + _FINGERTIP_M - _PRESS_M
        if state.joint_positions[6] > 0.006:
            # Open fingers would pass the cube on both sides: stay above until they are closed.
            goal_z += 0.03
        position = _through_funnel(state.tool_position, cube[:2], goal_z, 0.0)
        return _Goal(position, _heading(cube), CLOSED_M)

    def _pick(self, state: PrivilegedState, task: Task) -> _Goal:
        cube = state.cube_positions[task.colour_index]
        on_plate = float(np.linalg.norm(cube[:2] - state.plate_position[:2]))
        placed = task.kind == "place" and on_plate < _PLACED_XY_M and cube[2] < CUBE_HALF_M + 0.006
        if placed and (self._at_cube(state, cube) or state.joint_positions[6] >= _OPENED_M):
            return self._leave(state)
        if self._holds(state, cube):
            return self._lift(state) if task.kind == "lift" else self._carry(state, cube)
        return self._approach(state, cube, state.cube_rotations[task.colour_index])

    @staticmethod
    def _at_cube(state: PrivilegedState, cube: np.ndarray) -> bool:
        offset = state.tool_position - cube
        return bool(np.linalg.norm(offset[:2]) < _HOLD_XY_M and abs(offset[2]) < _HOLD_Z_M)

    def _holds(self, state: PrivilegedState, cube: np.ndarray) -> bool:
        # A cube in the air is held, even when it was gripped across a corner and keeps the fingers apart.
        raised = cube[2] > CUBE_HALF_M + _RAISED_M
        opening = _OPENED_M if raised else _HOLD_OPENING_M
        return self._at_cube(state, cube) and bool(state.joint_positions[6] < opening)

    @staticmethod
    def _leave(state: PrivilegedState) -> _Goal:
        """The cube lies on the plate: open, then rise and stay there."""
        position = state.tool_position.copy()
        if state.joint_positions[6] > _OPENED_M:
            position[2] = max(_RETREAT_HEIGHT_M, position[2])
        return _Goal(position, yaw_of_tool(state), OPEN_M)

    @staticmethod
    def _lift(state: PrivilegedState) -> _Goal:
        position = np.array([*state.tool_position[:2], _LIFTED_HEIGHT_M])
        return _Goal(position, yaw_of_tool(state), CLOSED_M)

    def _carry(self, state: PrivilegedState, cube: np.ndarray) -> _Goal:
        plate = state.plate_position
        offset = float(np.linalg.norm(cube[:2] - plate[:2]))
        # Aim so that the cube, not the tool, ends over the plate's centre.
        aim = plate[:2] + (state.tool_position[:2] - cube[:2])
        # A tilted cube cannot come lower than the fingers, which then are at the table.
        low = cube[2] < _RELEASE_HEIGHT_M + 0.004 or state.tool_position[2] < _GRASP_HEIGHT_M - 0.002
        if offset < _PLACE_XY_M and low:
            return _Goal(state.tool_position.copy(), yaw_of_tool(state), OPEN_M)
        release_z = _RELEASE_HEIGHT_M + (state.tool_position[2] - cube[2])
        position = _through_funnel(state.tool_position, aim, release_z, 0.0, top=_CARRY_HEIGHT_M, tolerance=0.010)
        return _Goal(position, yaw_of_tool(state), CLOSED_M)

    def _approach(self, state: PrivilegedState, cube: np.ndarray, rotation: np.ndarray) -> _Goal:
        yaw = _grasp_yaw(state, cube, rotation)
        tool = state.tool_position
        yaw_error = abs(_wrapped(yaw - yaw_of_tool(state), 2 * np.pi))
        xy_error = float(np.linalg.norm(cube[:2] - tool[:2]))
        grasp_z = cube[2] - CUBE_HALF_M + _GRASP_HEIGHT_M
        aligned = xy_error < _CLOSE_XY_M and yaw_error < _CLOSE_YAW_RAD and abs(tool[2] - grasp_z) < _CLOSE_Z_M
        if aligned:
            return _Goal(np.array([*cube[:2], grasp_z]), yaw, CLOSED_M)
        clearance = 0.25 * max(0.0, yaw_error - _YAW_TOLERANCE_RAD)
        if state.joint_positions[6] < _OPENED_M:
            clearance = _CLEAR_M
        position = _through_funnel(tool, cube[:2], grasp_z, min(clearance, _CLEAR_M))
        return _Goal(position, yaw, OPEN_M)


def _through_funnel(
    tool: np.ndarray,
    goal_xy: np.ndarray,
    goal_z: float,
    clearance: float,
    top: float = _FUNNEL_TOP_M,
    tolerance: float = _FUNNEL_TOLERANCE_M,
) -> np.ndarray:
    """Next point to aim at: high while far away, lower as the sideways error shrinks, rising first when too low."""
    error = goal_xy - tool[:2]
    distance = float(np.linalg.norm(error))
    height = goal_z + max(clearance, min(top, _FUNNEL_SLOPE * max(0.0, distance - tolerance)))
    too_low = max(0.0, height - tool[2])
    # Sideways motion is held back while the tool is below the funnel, so that it does not push things over.
    sideways = np.exp(-max(0.0, too_low - 0.01) / _SIDEWAYS_SCALE_M)
    return np.array([*(tool[:2] + sideways * error), height])


def yaw_of_tool(state: PrivilegedState) -> float:
    """Heading of the tool in rad."""
    return float(np.arctan2(state.tool_rotation[1, 0], state.tool_rotation[0, 0]))


def _heading(point: np.ndarray) -> float:
    return float(np.arctan2(point[1], point[0]))


def _grasp_yaw(state: PrivilegedState, cube: np.ndarray, rotation: np.ndarray) -> float:
    """The cube's yaw, up to quarter turns, that is nearest to a blend of the tool's yaw and the arm's heading."""
    now = yaw_of_tool(state)
    reference = now + _HEADING_WEIGHT * _wrapped(_heading(cube) - now, 2 * np.pi)
    return reference + _wrapped(yaw_of(rotation) - reference, np.pi / 2)


def _wrapped(angle: float, period: float) -> float:
    return float((angle + period / 2) % period - period / 2)


def _pointing_down(yaw: float) -> np.ndarray:
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix of a rotation vector (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)

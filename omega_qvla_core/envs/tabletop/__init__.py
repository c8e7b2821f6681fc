"""A simulated arm over a table with three coloured cubes and a plate, told in words what to do."""

from __future__ import annotations

from omega_qvla_core.envs.tabletop.env import TabletopEnv, limit_command
from omega_qvla_core.envs.tabletop.monitor import EpisodeStatus
from omega_qvla_core.envs.tabletop.privileged import CameraPose, PrivilegedState
from omega_qvla_core.envs.tabletop.scene import (
    CAMERAS,
    COMMAND_PERIOD_S,
    CONTROL_HZ,
    CONTROL_PERIOD_S,
    HOME,
    HUMAN_CAMERA,
    JOINT_NAMES,
    POSITION_LIMITS,
    TIMESTEP_S,
    VELOCITY_LIMITS,
)
from omega_qvla_core.envs.tabletop.tasks import COLOURS, KINDS, STAGES, TASKS, Task

__all__ = [
    "CAMERAS",
    "COLOURS",
    "COMMAND_PERIOD_S",
    "CONTROL_HZ",
    "CONTROL_PERIOD_S",
    "HOME",
    "HUMAN_CAMERA",
    "JOINT_NAMES",
    "KINDS",
    "POSITION_LIMITS",
    "STAGES",
    "TASKS",
    "TIMESTEP_S",
    "VELOCITY_LIMITS",
    "CameraPose",
    "EpisodeStatus",
    "PrivilegedState",
    "TabletopEnv",
    "Task",
    "limit_command",
]

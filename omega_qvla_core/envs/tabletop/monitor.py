"""Decides how far an episode has come: success, stage reached, and whether a wrong cube was handled."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from omega_qvla_core.envs.tabletop.scene import CUBE_HALF_M, Addresses
from omega_qvla_core.envs.tabletop.tasks import COLOURS, Task

HOLD_PERIODS = 3
"""Control periods for which the goal of lift and place must hold."""

LIFT_HEIGHT_M = 0.08
"""A cube counts as lifted (task ``lift``) when its underside is this far above the table."""

RAISED_HEIGHT_M = 0.03
"""The stage ``lifted`` is reached, and a wrong cube counts as handled, from this height of the underside."""

REACHED_DISTANCE_M = 0.06
"""The stage ``reached``: the tool is this close to the named cube's centre."""

PLACE_RADIUS_M = 0.04
"""A placed cube's centre is this close to the plate's centre."""

PLACE_HEIGHT_M = 0.03
"""A placed cube's centre is lower than this."""

OPEN_GRIPPER_M = 0.025
"""The gripper counts as open from this opening of one finger; it holds a cube at 0.02 m."""

REST_SPEED_M_S = 0.02
"""A cube slower than this is at rest."""


@dataclass(frozen=True)
class EpisodeStatus:
    """Where an episode stands.

    Attributes:
        success: The task was done; stays true for the rest of the episode. Never true once ``wrong_colour`` is.
        stage: The furthest stage reached so far, one of ``task.stages``.
        wrong_colour: A cube that was not named was touched by the hand (touch), or raised, or brought to the plate
            (lift, place), before the task was done.
        steps: Control periods so far.
        time_s: Simulated time since the reset.
        timed_out: ``steps`` has reached ``task.max_steps`` without success.
    """

    success: bool
    stage: str
    wrong_colour: bool
    steps: int
    time_s: float
    timed_out: bool

    @property
    def done(self) -> bool:
        """The episode has ended, well or badly."""
        return self.success or self.timed_out


class EpisodeMonitor:
    """Watches one episode. ``update`` is called once per control period, after its physics."""

    def __init__(self, addresses: Addresses, task: Task) -> None:
        self._addresses = addresses
        self._task = task
        self._steps = 0
        self._held_periods = 0
        self._stage = 0
        self._success = False
        self._wrong = False
        self._touched = np.zeros((2, len(COLOURS)), dtype=bool)
        self._hand_touched = np.zeros(len(COLOURS), dtype=bool)
        self._colour_of_geom = {int(geom): index for index, geom in enumerate(addresses.cube_geom)}

    def observe_contacts(self, data: mujoco.MjData) -> None:
        """Notes which cubes the hand touches; called after every physics step, so that no short touch is missed."""
        if data.ncon == 0:
            return
        for first, second in data.contact.geom:
            index = self._colour_of_geom.get(int(second), self._colour_of_geom.get(int(first)))
            if index is None:
                continue
            other = int(first) if int(second) in self._colour_of_geom else int(second)
            if other in self._addresses.hand_geoms:
                self._hand_touched[index] = True
                if other in self._addresses.finger_geoms:
                    self._touched[self._addresses.finger_geoms.index(other), index] = True

    def update(self, data: mujoco.MjData) -> None:
        """Judges the control period that has just ended."""
        self._steps += 1
        named = self._task.colour_index
        others = [index for index in range(len(COLOURS)) if index != named]
        cubes = data.xpos[self._addresses.cube_body]
        underside = cubes[:, 2] - CUBE_HALF_M
        if not self._success:
            self._wrong = self._wrong or self._handled_wrong(data, others, cubes, underside)
            holds = self._goal_holds(data, named, cubes, underside)
            self._held_periods = self._held_periods + 1 if holds else 0
            needed = 1 if self._task.kind == "touch" else HOLD_PERIODS
            self._success = self._held_periods >= needed and not self._wrong
        self._stage = max(self._stage, self._current_stage(data, named, cubes, underside))
        self._touched[:] = False
        self._hand_touched[:] = False

    def status(self, time_s: float) -> EpisodeStatus:
        """The status after the last update."""
        return EpisodeStatus(
            success=self._success,
            stage=self._task.stages[self._stage],
            wrong_colour=self._wrong,
            steps=self._steps,
            time_s=time_s,
            timed_out=self._steps >= self._task.max_steps and not self._success,
        )

    def _handled_wrong(self, data: mujoco.MjData, others: list[int], cubes: np.ndarray, underside: np.ndarray) -> bool:
        if self._task.kind == "touch":
            return bool(self._hand_touched[others].any())
        if (underside[others] > RAISED_HEIGHT_M).any():
            return True
        return self._task.kind == "place" and any(self._on_plate(data, cubes[index]) for index in others)

    def _goal_holds(self, data: mujoco.MjData, named: int, cubes: np.ndarray, underside: np.ndarray) -> bool:
        if self._task.kind == "touch":
            return bool(self._touched[:, named].any())
        if self._task.kind == "lift":
            return bool(underside[named] > LIFT_HEIGHT_M)
        opening = data.qpos[self._addresses.joint_qpos[6]]
        dof = self._addresses.cube_dof[named]
        at_rest = np.linalg.norm(data.qvel[dof : dof + 3]) < REST_SPEED_M_S
        return bool(self._on_plate(data, cubes[named]) and opening > OPEN_GRIPPER_M and at_rest)

    def _on_plate(self, data: mujoco.MjData, cube: np.ndarray) -> bool:
        plate = data.mocap_pos[self._addresses.plate_mocap]
        return bool(np.linalg.norm(cube[:2] - plate[:2]) < PLACE_RADIUS_M and cube[2] < PLACE_HEIGHT_M)

    def _current_stage(self, data: mujoco.MjData, named: int, cubes: np.ndarray, underside: np.ndarray) -> int:
        stages = self._task.stages
        if self._success:
            return len(stages) - 1
        tool = data.site_xpos[self._addresses.tool_site]
        stage = "none"
        if np.linalg.norm(tool - cubes[named]) < REACHED_DISTANCE_M:
            stage = "reached"
        if self._task.kind == "touch":
            # Touching the right cube after a wrong one is no more than having reached it.
            return stages.index(stage)
        if self._touched[:, named].all():
            stage = "grasped"
        if underside[named] > RAISED_HEIGHT_M:
            stage = "lifted"
        return stages.index(stage)

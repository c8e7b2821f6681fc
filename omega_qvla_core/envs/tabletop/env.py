"""The tabletop environment: joint targets in, camera images and joint positions out."""

from __future__ import annotations

import mujoco
import numpy as np

from omega_qvla_core.envs.rendering import OffscreenRenderer
from omega_qvla_core.envs.tabletop.monitor import EpisodeMonitor, EpisodeStatus
from omega_qvla_core.envs.tabletop.privileged import CameraPose, PrivilegedState
from omega_qvla_core.envs.tabletop.scene import (
    CAMERAS,
    COMMAND_PERIOD_S,
    CONTROL_PERIOD_S,
    HUMAN_CAMERA,
    POSITION_LIMITS,
    TIMESTEP_S,
    VELOCITY_LIMITS,
    Addresses,
    load_model,
    sample_start,
    write_start,
)
from omega_qvla_core.envs.tabletop.tasks import COLOURS, Task
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.images import resize_area

# The picture for humans is drawn twice as large and averaged: the scene has no multisampling.
_HUMAN_SUPERSAMPLING = 2


def limit_command(previous: np.ndarray, target: np.ndarray, duration_s: float) -> np.ndarray:
    """What the arm makes of a target: within position limits, and no further than the velocity limits allow.

    Args:
        previous: float64 ``[7]``, the command before.
        target: float64 ``[7]``, the command to be reached after ``duration_s``.
        duration_s: Time for the move.

    Returns:
        float64 ``[7]``.
    """
    bounded = np.clip(target, POSITION_LIMITS[:, 0], POSITION_LIMITS[:, 1])
    reach = VELOCITY_LIMITS * duration_s
    return previous + np.clip(bounded - previous, -reach, reach)


class TabletopEnv:
    """A 6-DoF arm, three cubes and a plate, controlled by absolute joint targets at 20 Hz.

    Nothing is random but the start state, which follows from the seed of ``reset``. The object belongs to one thread
    once it has rendered (an OpenGL context cannot be shared).

    ``step(action)`` is exactly: ``begin_period(action)``, then for each of its five commands ``set_command`` and
    ``advance(0.01)``, then ``update_status``. Whoever interpolates the same way outside gets the same motion.

    Args:
        image_size: Height and width in pixels of the images of ``render`` unless told otherwise.
    """

    def __init__(self, image_size: int = 128) -> None:
        self._model = load_model()
        self._data = mujoco.MjData(self._model)
        self._addresses = Addresses.of(self._model)
        self._renderer: OffscreenRenderer | None = None
        self._image_size = image_size
        self.reset(0, Task("touch", "red"))

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled model, for MuJoCo's viewer."""
        return self._model

    @property
    def data(self) -> mujoco.MjData:
        """The simulator's state, for MuJoCo's viewer. Read only: writing it is outside of what an episode counts."""
        return self._data

    @property
    def task(self) -> Task:
        """The task of the running episode."""
        return self._task

    @property
    def time_s(self) -> float:
        """Simulated time since the reset."""
        return float(self._data.time)

    def reset(self, seed: int, task: Task) -> None:
        """Starts an episode. The start poses follow from the seed alone, so tasks can be compared on one scene.

        Args:
            seed: Non-negative seed; see ``seeds`` for which range serves what.
            task: What counts as success.

        Raises:
            ConfigError: The seed is negative.
        """
        if seed < 0:
            raise ConfigError(f"seed {seed} is negative; use 0 or more")
        self._task = task
        start = sample_start(np.random.default_rng(seed))
        write_start(self._model, self._data, self._addresses, start)
        self._command = start.joints.copy()
        self._monitor = EpisodeMonitor(self._addresses, task)

    def step(self, action: np.ndarray) -> EpisodeStatus:
        """Runs one control period of 50 ms.

        Args:
            action: float ``[7]``, absolute target for the end of this period in rad and m, in the order of
                ``JOINT_NAMES``.

        Returns:
            The status after the period.

        Raises:
            ConfigError: The action has another shape or holds a value that is not finite.
        """
        for command in self.begin_period(action):
            self.set_command(command)
            self.advance(COMMAND_PERIOD_S)
        return self.update_status()

    def begin_period(self, action: np.ndarray) -> np.ndarray:
        """Plans one control period: the commands on the line from the last command to the limited target.

        Returns:
            float64 ``[5, 7]``, one command per 10 ms, each to be set at the beginning of its 10 ms.
        """
        start = self._command
        end = limit_command(start, _checked(action), CONTROL_PERIOD_S)
        count = round(CONTROL_PERIOD_S / COMMAND_PERIOD_S)
        fractions = np.arange(1, count + 1)[:, None] / count
        return start + fractions * (end - start)

    def set_command(self, positions: np.ndarray) -> None:
        """Sets the position command from now on. Clipped to the position limits; the caller interpolates.

        Args:
            positions: float ``[7]``, rad and m.

        Raises:
            ConfigError: Wrong shape, or a value that is not finite.
        """
        self._command = np.clip(_checked(positions), POSITION_LIMITS[:, 0], POSITION_LIMITS[:, 1])
        self._data.ctrl[self._addresses.actuator] = self._command

    def command(self) -> np.ndarray:
        """float64 ``[7]``, the position command in force."""
        return self._command.copy()

    def advance(self, duration_s: float) -> None:
        """Runs the physics.

        Args:
            duration_s: A multiple of ``TIMESTEP_S``.

        Raises:
            ConfigError: The duration is not a positive multiple of the time step.
        """
        count = round(duration_s / TIMESTEP_S)
        if count < 1 or abs(count * TIMESTEP_S - duration_s) > 1e-9:
            raise ConfigError(f"duration {duration_s} s: use a positive multiple of {TIMESTEP_S} s")
        for _ in range(count):
            mujoco.mj_step(self._model, self._data)
            self._monitor.observe_contacts(self._data)
        # Positions moved at the end of the last step: bring poses of bodies, sites and cameras up to date with them.
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def update_status(self) -> EpisodeStatus:
        """Judges the control period that has just ended; to be called once per 50 ms."""
        self._monitor.update(self._data)
        return self.status()

    def status(self) -> EpisodeStatus:
        """The status after the last ``update_status``."""
        return self._monitor.status(self.time_s)

    def joint_positions(self) -> np.ndarray:
        """float64 ``[7]``, measured, rad and m."""
        return self._data.qpos[self._addresses.joint_qpos].copy()

    def joint_velocities(self) -> np.ndarray:
        """float64 ``[7]``, measured, rad/s and m/s."""
        return self._data.qvel[self._addresses.joint_dof].copy()

    def render(self, camera: str, height: int | None = None, width: int | None = None) -> np.ndarray:
        """Renders ``front``, ``wrist`` or ``overview``.

        Returns:
            uint8 ``[height, width, 3]`` RGB.

        Raises:
            ConfigError: Unknown camera, or a size that the off-screen buffer cannot hold.
        """
        if camera not in self._addresses.cameras:
            raise ConfigError(f"camera '{camera}' is unknown; choose one of {', '.join(self._addresses.cameras)}")
        height = self._image_size if height is None else height
        width = self._image_size if width is None else width
        if self._renderer is None:
            self._renderer = OffscreenRenderer(self._model)
        camera_id = self._addresses.cameras[camera]
        if camera != HUMAN_CAMERA:
            return self._renderer.render(self._data, camera_id, height, width)
        scale = _HUMAN_SUPERSAMPLING
        return resize_area(self._renderer.render(self._data, camera_id, height * scale, width * scale), height, width)

    def privileged(self) -> PrivilegedState:
        """Poses of everything, copied; for the expert and for training labels, never for a policy's input."""
        data, addresses = self._data, self._addresses
        cameras = {}
        for name in CAMERAS:
            index = addresses.cameras[name]
            cameras[name] = CameraPose(
                position=data.cam_xpos[index].copy(),
                rotation=data.cam_xmat[index].reshape(3, 3).copy(),
                fovy_rad=float(np.deg2rad(self._model.cam_fovy[index])),
            )
        return PrivilegedState(
            joint_positions=self.joint_positions(),
            cube_positions=data.xpos[addresses.cube_body].copy(),
            cube_rotations=data.xmat[addresses.cube_body].reshape(-1, 3, 3).copy(),
            plate_position=data.mocap_pos[addresses.plate_mocap].copy(),
            tool_position=data.site_xpos[addresses.tool_site].copy(),
            tool_rotation=data.site_xmat[addresses.tool_site].reshape(3, 3).copy(),
            cameras=cameras,
        )

    def line_of_sight(self, camera: str) -> np.ndarray:
        """Which cube centres and the plate's centre a camera sees past everything else; a training label.

        Returns:
            bool ``[4]``: red, green, blue cube, plate. Says nothing about the image's borders.
        """
        data, addresses = self._data, self._addresses
        origin = data.cam_xpos[addresses.cameras[camera]]
        bodies = (*addresses.cube_body, addresses.plate_body)
        centres = [*data.xpos[addresses.cube_body], data.mocap_pos[addresses.plate_mocap]]
        hit = np.zeros(1, dtype=np.int32)
        seen = np.zeros(len(bodies), dtype=bool)
        for index, (body, centre) in enumerate(zip(bodies, centres, strict=True)):
            mujoco.mj_ray(self._model, data, origin, centre - origin, None, 1, -1, hit)
            seen[index] = hit[0] >= 0 and self._model.geom_bodyid[hit[0]] == body
        return seen

    def move_cube(self, colour: str, position: np.ndarray) -> None:
        """Puts a cube somewhere else, level and at rest. For tests and for staging a scene.

        Args:
            colour: Which cube.
            position: float ``[3]`` m, of its centre.
        """
        index = COLOURS.index(colour)
        address, dof = self._addresses.cube_qpos[index], self._addresses.cube_dof[index]
        self._data.qpos[address : address + 3] = position
        self._data.qpos[address + 3 : address + 7] = (1.0, 0.0, 0.0, 0.0)
        self._data.qvel[dof : dof + 6] = 0.0
        mujoco.mj_forward(self._model, self._data)

    def close(self) -> None:
        """Frees the OpenGL context, if any. Safe to call twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _checked(action: np.ndarray) -> np.ndarray:
    values = np.asarray(action, dtype=np.float64)
    if values.shape != (len(POSITION_LIMITS),):
        raise ConfigError(f"action has shape {values.shape}; give {len(POSITION_LIMITS)} joint targets")
    if not np.isfinite(values).all():
        raise ConfigError(f"action {values.tolist()} holds a value that is not finite; nothing was moved")
    return values

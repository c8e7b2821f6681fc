"""What the processors of all public checkpoints share: cameras, state, action meanings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omega_qvla_core.errors import InstructionError, ObservationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.processing.resize_with_pad import check_image
from omega_qvla_core.processing.robot_setup import CameraBinding, RobotSetup
from omega_qvla_core.processing.robots import (
    aloha_actions_to_model,
    aloha_actions_to_robot,
    aloha_state_to_model,
    gripper_command,
    gripper_value,
)
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer


class FoundationProcessor:
    """Checks and the way back from predictions to targets.

    Args:
        setup: Cameras, vectors and rates; modes and names filled in.
        state: Statistics of the proprioception.
        actions: Statistics of what the model predicts.
    """

    def __init__(self, setup: RobotSetup, state: VectorNormalizer, actions: VectorNormalizer) -> None:
        self.setup = setup
        self.state = state
        self.actions = actions
        modes = setup.action_modes
        self._is_delta = np.array([mode == "delta" for mode in modes], dtype=np.float64)
        self._reference = np.array([index if mode == "delta" else 0 for index, mode in enumerate(modes)], dtype=np.intp)
        self._grippers = [actions.names.index(name) for name in setup.gripper_names]

    def check_state(self, state: np.ndarray) -> np.ndarray:
        """``state`` as float64 ``[state]``; ObservationError for a wrong width or values that are not finite."""
        names = self.state.names
        try:
            values = np.asarray(state, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ObservationError(f"the state is not an array of numbers ({error})") from error
        if values.shape != (len(names),):
            raise ObservationError(
                f"the state has shape {values.shape}; the policy needs {len(names)} values: {', '.join(names)}"
            )
        bad = [f"{name} = {value}" for name, value in zip(names, values) if not np.isfinite(value)]
        if bad:
            raise ObservationError(f"the state is not finite: {', '.join(bad)}; check the joint state source")
        return values

    def check_instruction(self, instruction: str) -> str:
        """InstructionError for anything but a text with something in it."""
        if not isinstance(instruction, str) or not instruction.strip():
            raise InstructionError(f"the instruction {instruction!r} is empty; tell the arm what to do in words")
        return instruction

    def camera_image(self, observation: Observation, camera: CameraBinding, min_size: int) -> np.ndarray:
        """One camera's image, turned as the checkpoint wants it, uint8 ``[H, W, 3]``.

        Raises:
            ObservationError: The camera is missing, or its image has another type, or is so small on both sides that
                the network would see invented pixels.
        """
        if camera.key not in observation.images:
            wanted = ", ".join(spec.key for spec in self.setup.cameras)
            found = ", ".join(observation.images) or "none"
            raise ObservationError(f"camera {camera.key!r} is missing: the policy needs {wanted}; there are {found}")
        image = np.asarray(observation.images[camera.key])
        try:
            check_image(image)
        except ObservationError as error:
            raise ObservationError(f"camera {camera.key!r}: {error}") from error
        if max(image.shape[:2]) < min_size:
            raise ObservationError(
                f"camera {camera.key!r} gives {image.shape[0]} x {image.shape[1]} pixels, the policy sees "
                f"{min_size} x {min_size}; publish a larger image"
            )
        return np.ascontiguousarray(image[::-1, ::-1]) if self.setup.rotate_images else image

    def model_state(self, measured: np.ndarray) -> np.ndarray:
        """Measured proprioception ``[..., state]`` in the space that the statistics are in."""
        return aloha_state_to_model(measured) if self.setup.aloha_space else measured

    def targets(self, predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """What the model predicts -> what the robot is told.

        Args:
            predicted: float ``[B, horizon, model's action width]``; entries past the action names are padding.
            measured: float64 ``[B, state]``, the state at the observation.

        Returns:
            float64 ``[B, horizon, actions]`` in physical units. NaN stays NaN: the guard of the robot is to see it.
        """
        actions = self.actions.unnormalize(np.asarray(predicted)[..., : self.actions.width]).astype(np.float64)
        state = np.asarray(self.model_state(measured), dtype=np.float64)
        actions = actions + (state[..., self._reference] * self._is_delta)[..., None, :]
        if self.setup.aloha_space:
            actions = aloha_actions_to_robot(actions)
        for index in self._grippers:
            actions[..., index] = gripper_command(actions[..., index], self.setup.gripper)
        if self.setup.clip_actions is not None:
            actions = np.clip(actions, -self.setup.clip_actions, self.setup.clip_actions)
        return actions

    def predictions(self, targets: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """The inverse of ``targets``, clipping apart: what the model would have predicted.

        Args:
            targets: float ``[K, actions]`` in physical units.
            measured: float64 ``[state]``, the state at the observation of the chunk.

        Returns:
            float64 ``[K, actions]``.
        """
        actions = np.array(targets, dtype=np.float64)
        for index in self._grippers:
            actions[..., index] = gripper_value(actions[..., index], self.setup.gripper)
        if self.setup.aloha_space:
            actions = aloha_actions_to_model(actions)
        state = np.asarray(self.model_state(measured), dtype=np.float64)
        actions = actions - (state[..., self._reference] * self._is_delta)[..., None, :]
        return np.asarray(self.actions.normalize(actions), dtype=np.float64)

    def _measured(self, observations: Sequence[Observation]) -> np.ndarray:
        if not observations:
            raise ValueError("there are no observations to prepare")
        return np.stack([self.check_state(observation.state) for observation in observations])

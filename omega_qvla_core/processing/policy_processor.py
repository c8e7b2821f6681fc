"""Observation -> tensors of the model, and the model's actions -> absolute targets of the robot.

Training data goes through the same pieces (``resize``, ``encode_text``, ``normalize_state``, ``normalize_actions``),
so that a policy sees at run time what it saw in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.errors import ConfigError, InstructionError, ObservationError
from omega_qvla_core.policy_types import CameraSpec, Observation
from omega_qvla_core.processing.image_tensors import image_tensor
from omega_qvla_core.processing.images import resize_area
from omega_qvla_core.processing.normalization import NormStats
from omega_qvla_core.processing.policy_config import PolicyConfig
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer, state_tokens

# A camera whose sides are in another ratio than the network's would be squeezed, and with it every distance the policy
# has learned. 1 % allows for rounded sizes (such as 227 x 226).
MAX_ASPECT_ERROR = 0.01


@dataclass(frozen=True)
class ModelInputs:
    """A batch of B observations for ``embed_prefix`` of any family.

    Attributes:
        images: Per camera float32 ``[B, 3, H, W]`` in [-1, 1].
        image_masks: Per camera bool ``[B]``.
        tokens: int64 ``[B, L]``.
        token_mask: bool ``[B, L]``.
        state: float32 ``[B, state]``, normalised.
        measured: float64 ``[B, state]`` in physical units, for ``PolicyProcessor.targets``. Stays on the CPU.
        embodiment: Projector index per row, for families with several embodiments. None for the others.
    """

    images: list[Tensor]
    image_masks: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    measured: np.ndarray
    embodiment: tuple[int, ...] | None = None

    def embed(self, model: Any) -> Any:
        """The model's prefix of these observations: ``model.embed_prefix`` with everything that its family reads."""
        extra = {} if self.embodiment is None else {"embodiment": self.embodiment}
        return model.embed_prefix(self.images, self.image_masks, self.tokens, self.token_mask, self.state, **extra)


class PolicyProcessor:
    """Both directions for one policy.

    Args:
        config: Cameras, names and modes.
        stats: Normalization statistics.
        tokenizer: Of the prompt.
        max_tokens: Length of the padded prompt.
        horizon: Steps of a chunk.

    Raises:
        ConfigError: If the parts do not fit together.
    """

    def __init__(
        self, config: PolicyConfig, stats: NormStats, tokenizer: WordTokenizer, max_tokens: int, horizon: int
    ) -> None:
        stats.check(config.state_names, config.action_names, horizon)
        if config.state_in_prompt and not tokenizer.has_state_bins:
            raise ConfigError("policy.state_in_prompt is true, but tokenizer.json has no state bins <s0>..<s255>")
        if config.state_in_prompt and max_tokens < len(config.state_names) + 2:
            raise ConfigError(
                f"model.max_token_len is {max_tokens}; the state's {len(config.state_names)} tokens "
                "leave no room for words"
            )
        self.config = config
        self.stats = stats
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.horizon = horizon
        # Per action: index of the measured value that a delta is added to, and 1 or 0 for whether it is.
        self._reference = np.array(
            [config.state_names.index(name) if name in config.state_names else 0 for name in config.action_names]
        )
        self._is_delta = np.array([mode == "delta" for mode in config.action_modes], dtype=np.float64)

    def prepare(self, observations: Sequence[Observation], device: torch.device | str = "cpu") -> ModelInputs:
        """Check and convert observations.

        Raises:
            ObservationError: For a missing camera, a wrong dtype, shape or size, or a state that is not finite.
            InstructionError: For an instruction that is empty, unknown or too long.
            ValueError: If there are no observations.
        """
        if not observations:
            raise ValueError("there are no observations to prepare")
        measured = np.stack([self.check_state(observation.state) for observation in observations])
        normalized = self.normalize_state(measured)
        prompts = [
            self.encode_text(observation.instruction, state)
            for observation, state in zip(observations, normalized, strict=True)
        ]
        images = [
            image_tensor(np.stack([self.camera_image(observation, camera) for observation in observations])).to(device)
            for camera in self.config.cameras
        ]
        present = torch.ones(len(observations), dtype=torch.bool, device=device)
        return ModelInputs(
            images=images,
            image_masks=[present for _ in images],
            tokens=torch.from_numpy(np.stack([ids for ids, _ in prompts])).to(device),
            token_mask=torch.from_numpy(np.stack([mask for _, mask in prompts])).to(device),
            state=torch.from_numpy(normalized.astype(np.float32)).to(device),
            measured=measured,
        )

    def camera_image(self, observation: Observation, camera: CameraSpec) -> np.ndarray:
        """The image of one camera at the network's size, uint8 ``[height, width, 3]``."""
        if camera.key not in observation.images:
            wanted = ", ".join(spec.key for spec in self.config.cameras)
            found = ", ".join(observation.images) or "none"
            raise ObservationError(f"camera {camera.key!r} is missing: the policy needs {wanted}; there are {found}")
        try:
            return resize(np.asarray(observation.images[camera.key]), camera)
        except ObservationError as error:
            raise ObservationError(f"camera {camera.key!r}: {error}") from error

    def check_state(self, state: np.ndarray) -> np.ndarray:
        """``state`` as float64 ``[state]``; ObservationError for a wrong width or values that are not finite."""
        names = self.config.state_names
        try:
            values = np.asarray(state, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ObservationError(f"the state is not an array of numbers ({error})") from error
        if values.shape != (len(names),):
            raise ObservationError(
                f"the state has shape {values.shape}; the policy needs {len(names)} values: {', '.join(names)}"
            )
        bad = [f"{name} = {value}" for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        if bad:
            raise ObservationError(f"the state is not finite: {', '.join(bad)}; check the joint state source")
        return values

    def encode_text(self, instruction: str, normalized_state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 ``[max_tokens]`` and mask of an instruction (and of the state, if the prompt holds it)."""
        if not isinstance(instruction, str):
            raise InstructionError(f"the instruction is of type {type(instruction).__name__}; give text")
        suffix = state_tokens(normalized_state) if self.config.state_in_prompt else ()
        return self.tokenizer.encode(instruction, self.max_tokens, suffix)

    def normalize_state(self, state: np.ndarray) -> np.ndarray:
        """Physical ``[..., state]`` -> normalised, float64."""
        return self.stats.state.normalize(state)

    def normalize_actions(self, targets: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Absolute targets -> what the model predicts; the inverse of ``targets``.

        Args:
            targets: float ``[..., horizon, actions]``, absolute, rad and m.
            measured: float ``[..., state]``, the state at the observation.

        Returns:
            float64 ``[..., horizon, actions]``.
        """
        return self.stats.actions.normalize(np.asarray(targets, dtype=np.float64) - self._offset(measured))

    def targets(self, predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """What the model predicts -> absolute targets.

        Args:
            predicted: float ``[..., horizon, model's action width]``; entries past the action names are padding.
            measured: float ``[..., state]``, the state at the observation.

        Returns:
            float64 ``[..., horizon, actions]`` in rad and m. NaN stays NaN: the guard of the robot is to see it.
        """
        actions = np.asarray(predicted, dtype=np.float64)[..., : len(self.config.action_names)]
        return self.stats.actions.unnormalize(actions) + self._offset(measured)

    def predictions(self, targets: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """The inverse of ``targets`` for the first steps of a chunk: what the model would have predicted.

        Args:
            targets: float ``[K, actions]``, absolute, rad and m; K at most the horizon.
            measured: float ``[state]``, the state at the observation of the chunk.

        Returns:
            float64 ``[K, actions]``.
        """
        steps = len(targets)
        whole = np.concatenate([targets, np.repeat(targets[-1:], self.horizon - steps, axis=0)])
        return self.normalize_actions(whole, measured)[:steps]

    def _offset(self, measured: np.ndarray) -> np.ndarray:
        """``[..., 1, actions]``: the measured value where the action is a delta, else 0."""
        return (np.asarray(measured, dtype=np.float64)[..., self._reference] * self._is_delta)[..., None, :]


def resize(image: np.ndarray, camera: CameraSpec) -> np.ndarray:
    """A camera image at the network's size, uint8 ``[height, width, 3]``.

    Raises:
        ObservationError: For a wrong dtype or shape, an image smaller than the network's, or another aspect ratio.
    """
    if image.dtype == np.uint8 and image.ndim == 3:
        ratio = (image.shape[1] * camera.height) / max(1, image.shape[0] * camera.width)
        if abs(ratio - 1.0) > MAX_ASPECT_ERROR:
            raise ObservationError(
                f"image is {image.shape[0]} x {image.shape[1]} pixels (height x width), the policy sees "
                f"{camera.height} x {camera.width}; crop it to the same ratio of sides"
            )
    return resize_area(image, camera.height, camera.width)

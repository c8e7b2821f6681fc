"""Observations -> tensors of Pi 0.5 for checkpoints of openpi and LeRobot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.errors import ConfigError, InstructionError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.processing.foundation_base import FoundationProcessor
from omega_qvla_core.processing.image_tensors import image_tensor
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.processing.prompt.pi05_prompt import prompt_parts
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.resize_with_pad import interpolate_with_pad, resize_with_pad
from omega_qvla_core.processing.robot_setup import OPENPI_SLOTS, CameraBinding, RobotSetup
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer

BEGIN = "<bos>"


class Pi05Processor(FoundationProcessor):
    """Both directions for one checkpoint.

    Args:
        setup: Cameras, vectors and rates.
        state: Statistics of the proprioception.
        actions: Statistics of the actions.
        tokenizer: PaliGemma's.
        max_tokens: Length of the padded prompt.
        image_size: Edge of the network's square image, pixels.
        slots: The network's cameras in order, by source name. One without a binding is absent (masked).

    Raises:
        ConfigError: A camera is bound to a slot that there is not, or the tokenizer is of another model.
    """

    def __init__(
        self,
        setup: RobotSetup,
        state: VectorNormalizer,
        actions: VectorNormalizer,
        tokenizer: TextTokenizer,
        max_tokens: int,
        image_size: int,
        slots: tuple[str, ...] = OPENPI_SLOTS,
    ) -> None:
        super().__init__(setup, state, actions)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.image_size = image_size
        self._begin = tokenizer.token_id(BEGIN)
        by_source = {camera.source: camera for camera in setup.cameras}
        unknown = [source for source in by_source if source not in slots]
        if unknown:
            raise ConfigError(f"robot.cameras: source {unknown[0]!r} is not one of the checkpoint's {', '.join(slots)}")
        self._slots: list[CameraBinding | None] = [by_source.get(slot) for slot in slots]
        if setup.framework == "lerobot":
            # LeRobot puts present cameras first, whatever the order of the features.
            self._slots.sort(key=lambda camera: camera is None)

    def prepare(self, observations: Sequence[Observation], device: torch.device | str = "cpu") -> ModelInputs:
        """Check and convert observations.

        Raises:
            ObservationError: For a missing camera, a wrong dtype, shape or size, or a state that is not finite.
            InstructionError: For an instruction that is empty, or whose prompt is longer than the checkpoint's.
            ValueError: If there are no observations.
        """
        measured = self._measured(observations)
        normalized = self.state.normalize(self.model_state(measured))
        prompts = [self.encode_prompt(one.instruction, state) for one, state in zip(observations, normalized)]
        images, masks = [], []
        for camera in self._slots:
            images.append(self._camera_batch(observations, camera).to(device))
            masks.append(torch.full((len(observations),), camera is not None, dtype=torch.bool, device=device))
        return ModelInputs(
            images=images,
            image_masks=masks,
            tokens=torch.from_numpy(np.stack([ids for ids, _ in prompts])).to(device),
            token_mask=torch.from_numpy(np.stack([mask for _, mask in prompts])).to(device),
            state=torch.from_numpy(normalized.astype(np.float32)).to(device),
            measured=measured,
        )

    def encode_prompt(self, instruction: str, normalized_state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 ``[max_tokens]``, padded with 0 on the right, and their mask."""
        self.check_instruction(instruction)
        parts = prompt_parts(instruction, normalized_state if self.setup.state_in_prompt else None)
        ids = [self._begin, *(token for part in parts for token in self.tokenizer.encode(part))]
        if len(ids) > self.max_tokens:
            raise InstructionError(
                f"the prompt has {len(ids)} tokens, the checkpoint's max_token_len is {self.max_tokens}; shorten the "
                f"instruction {instruction!r}"
            )
        tokens = np.zeros(self.max_tokens, dtype=np.int64)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.max_tokens) < len(ids)

    def _camera_batch(self, observations: Sequence[Observation], camera: CameraBinding | None) -> Tensor:
        size = self.image_size
        if camera is None:
            return torch.full((len(observations), 3, size, size), -1.0)
        images = [self.camera_image(observation, camera, size) for observation in observations]
        if self.setup.framework == "openpi":
            return image_tensor(np.stack([resize_with_pad(image, size, size) for image in images]))
        floats = [torch.from_numpy(image).permute(2, 0, 1).to(torch.float32) / 255.0 for image in images]
        return torch.stack([interpolate_with_pad(image, size, size, 0.0, 1.0) * 2.0 - 1.0 for image in floats])

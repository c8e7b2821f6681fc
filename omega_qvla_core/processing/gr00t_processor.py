"""Observations -> tensors of GR00T N1.5, as NVIDIA's policy prepares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from omega_qvla_core.errors import ConfigError, InstructionError, ObservationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.processing.foundation_base import FoundationProcessor
from omega_qvla_core.processing.policy_processor import MAX_ASPECT_ERROR, ModelInputs
from omega_qvla_core.processing.prompt.eagle_prompt import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    PAD_TOKEN,
    expanded_chat,
    instruction_text,
)
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.resize_with_pad import centre_crop_resize, eagle_pixels
from omega_qvla_core.processing.robot_setup import CameraBinding, RobotSetup
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer

MAX_PROMPT_TOKENS = 512
"""Longest text, image tokens not counted. NVIDIA's transform names this limit and never applies it; a longer
instruction is far outside of what the model was trained on."""

EMBODIMENT_IDS = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}
"""Embodiment tag -> projector index of the released model."""


@dataclass(frozen=True)
class Gr00tSizes:
    """What the processing needs to know of the network.

    Attributes:
        image_size: Edge of a tile, pixels.
        tokens_per_image: Image tokens of one tile.
        image_token_id: Id that marks an image token.
        max_state_dim: Width of the padded state.
        num_embodiments: Number of projectors.
    """

    image_size: int
    tokens_per_image: int
    image_token_id: int
    max_state_dim: int
    num_embodiments: int


def embodiment_index(setup: RobotSetup, num_embodiments: int) -> int:
    """Projector index of a setup.

    Raises:
        ConfigError: The tag is unknown and the setup gives no index, or the model has no such projector.
    """
    index = EMBODIMENT_IDS.get(setup.embodiment_tag or "") if setup.embodiment_id is None else setup.embodiment_id
    if index is None:
        raise ConfigError(
            f"robot.embodiment_tag {setup.embodiment_tag!r} is not one of {', '.join(EMBODIMENT_IDS)}; "
            "set robot.embodiment_id to the projector that the checkpoint was trained with"
        )
    if not 0 <= index < num_embodiments:
        raise ConfigError(
            f"robot.embodiment_id {index} ({setup.embodiment_tag}): the checkpoint has {num_embodiments} projectors"
        )
    return index


class Gr00tProcessor(FoundationProcessor):
    """Both directions for one checkpoint.

    Args:
        setup: Cameras, vectors and rates.
        state: Statistics of the proprioception.
        actions: Statistics of the actions.
        tokenizer: Qwen's with Eagle's image tokens.
        sizes: Of the network.
        resolutions: Camera source -> height and width of the training videos, as far as the checkpoint says. The resize
            squeezes, so an image of another aspect ratio would show everything in other proportions.

    Raises:
        ConfigError: The state is wider than the network's, the embodiment is unknown, or the tokenizer is of another
            model.
    """

    def __init__(
        self,
        setup: RobotSetup,
        state: VectorNormalizer,
        actions: VectorNormalizer,
        tokenizer: TextTokenizer,
        sizes: Gr00tSizes,
        resolutions: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(setup, state, actions)
        self.resolutions = dict(resolutions or {})
        if state.out_width > sizes.max_state_dim:
            raise ConfigError(
                f"the state has {state.out_width} entries, the network's max_state_dim {sizes.max_state_dim}"
            )
        self.tokenizer = tokenizer
        self.sizes = sizes
        self.embodiment_id = embodiment_index(setup, sizes.num_embodiments)
        self._pad = tokenizer.token_id(PAD_TOKEN)
        for token in (IMAGE_START, IMAGE_END):
            tokenizer.token_id(token)
        if tokenizer.token_id(IMAGE_TOKEN) != sizes.image_token_id:
            raise ConfigError(
                f"the tokenizer's {IMAGE_TOKEN} is {tokenizer.token_id(IMAGE_TOKEN)}, the network's image_token_index "
                f"{sizes.image_token_id}; use the tokenizer of this checkpoint"
            )

    def prepare(self, observations: Sequence[Observation], device: torch.device | str = "cpu") -> ModelInputs:
        """Check and convert observations. Prompts are padded on the left, as the model was trained.

        Raises:
            ObservationError: For a missing camera, a wrong dtype, shape or size, or a state that is not finite.
            InstructionError: For an instruction that is empty or longer than 512 tokens.
            ValueError: If there are no observations.
        """
        measured = self._measured(observations)
        rows = [self.encode_prompt(observation.instruction) for observation in observations]
        length = max(len(row) for row in rows)
        ids = np.array([[self._pad] * (length - len(row)) + row for row in rows], dtype=np.int64)
        mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
        size, scale = self.sizes.image_size, self.setup.crop_scale
        images = [
            torch.stack(
                [
                    eagle_pixels(centre_crop_resize(self.camera_view(observation, camera), size, scale))
                    for observation in observations
                ]
            ).to(device)
            for camera in self.setup.cameras
        ]
        present = torch.ones(len(observations), dtype=torch.bool, device=device)
        return ModelInputs(
            images=images,
            image_masks=[present for _ in images],
            tokens=torch.from_numpy(ids).to(device),
            token_mask=torch.from_numpy(mask).to(device),
            state=torch.from_numpy(self.padded_state(measured).astype(np.float32)).to(device),
            measured=measured,
            embodiment=(self.embodiment_id,) * len(observations),
        )

    def camera_view(self, observation: Observation, camera: CameraBinding) -> np.ndarray:
        """One camera's image, checked against the training videos' aspect ratio."""
        image = self.camera_image(observation, camera, self.sizes.image_size)
        height, width = self.resolutions.get(camera.source, image.shape[:2])
        if abs(image.shape[1] * height / (image.shape[0] * width) - 1.0) > MAX_ASPECT_ERROR:
            raise ObservationError(
                f"camera {camera.key!r} gives {image.shape[0]} x {image.shape[1]} pixels (height x width), the "
                f"checkpoint was trained on {height} x {width}; crop it to the same ratio of sides"
            )
        return image

    def padded_state(self, measured: np.ndarray) -> np.ndarray:
        """Normalised state with zeros up to the network's width, float64 ``[B, max_state_dim]``."""
        normalized = self.state.normalize(measured)
        return np.pad(normalized, ((0, 0), (0, self.sizes.max_state_dim - normalized.shape[-1])))

    def encode_prompt(self, instruction: str) -> list[int]:
        """Token ids of one observation's chat, image tokens included."""
        self.check_instruction(instruction)
        text = instruction_text(instruction, self.setup.bracketed_prompt)
        for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END, "<|"):
            if token in text:
                raise InstructionError(f"the instruction {instruction!r} holds {token!r}, which the prompt reserves")
        cameras = len(self.setup.cameras)
        ids = self.tokenizer.encode(expanded_chat(text, cameras, self.sizes.tokens_per_image))
        images = sum(token == self.sizes.image_token_id for token in ids)
        if images != cameras * self.sizes.tokens_per_image:
            raise ConfigError(
                f"the tokenizer makes {images} image tokens of {cameras} images with {self.sizes.tokens_per_image} "
                "each; use the tokenizer of this checkpoint"
            )
        if len(ids) - images > MAX_PROMPT_TOKENS:
            raise InstructionError(
                f"the prompt has {len(ids) - images} text tokens, the limit is {MAX_PROMPT_TOKENS}; shorten the "
                f"instruction {instruction[:80]!r}..."
            )
        return ids

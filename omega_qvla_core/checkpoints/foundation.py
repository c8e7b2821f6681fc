"""Description of a public checkpoint, whatever layout it came in, and how it is kept in our own folders and packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla_core.checkpoints.families import model_config
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.policy_types import CameraSpec, Observation, PolicySpec
from omega_qvla_core.processing.foundation_base import FoundationProcessor
from omega_qvla_core.processing.gr00t_processor import MAX_PROMPT_TOKENS, Gr00tProcessor, Gr00tSizes
from omega_qvla_core.processing.pi05_processor import Pi05Processor
from omega_qvla_core.processing.prompt.text_tokenizer import TOKENIZER_FILE, TextTokenizer
from omega_qvla_core.processing.robot_setup import OPENPI_SLOTS, RobotSetup, emitted_modes
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer
from omega_qvla_core.strict_json import check_keys, read_json, write_json

FORMAT_VERSION = 1
STATS_VERSION = 2
CONFIG_FILE = "config.json"
STATS_FILE = "norm_stats.json"

_BLANK_INSTRUCTION = "stay where you are"


@dataclass(frozen=True)
class FoundationDescription:
    """What a public checkpoint is, without its weights.

    Attributes:
        name: Of the checkpoint.
        family: ``pi05`` or ``gr00t_n15``.
        model: Sizes of the network.
        policy: The robot setup, with names, modes and number of steps filled in.
        state: Statistics of the proprioception.
        actions: Statistics of what the model predicts.
        tokenizer: Of the prompt.
        slots: Sources of the network's cameras in order (Pi 0.5).
        resolutions: Camera source -> height and width of the training videos, as far as the checkpoint says.

    Raises:
        ConfigError: If the parts do not fit together, or statistics are degenerate.
    """

    name: str
    family: str
    model: Pi05Config | Gr00tConfig
    policy: RobotSetup
    state: VectorNormalizer
    actions: VectorNormalizer
    tokenizer: TextTokenizer
    slots: tuple[str, ...] = OPENPI_SLOTS
    resolutions: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        policy = self.policy
        if policy.num_steps is None or not policy.state_names or not policy.action_names:
            raise ConfigError("robot.num_steps, robot.state_names and robot.action_names must be filled in")
        if len(policy.action_modes) != len(policy.action_names):
            raise ConfigError(
                f"robot.action_modes has {len(policy.action_modes)} entries for {len(policy.action_names)} "
                f"actions ({', '.join(policy.action_names)}); say of each whether it is absolute, delta, relative or "
                "velocity"
            )
        if self.actions.width > self.model.action_dim:
            raise ConfigError(
                f"the robot has {self.actions.width} actions, the network's action_dim is {self.model.action_dim}"
            )
        if self.tokenizer.largest_id >= self.vocab_size:
            raise ConfigError(
                f"the tokenizer gives ids up to {self.tokenizer.largest_id}, the network's vocab_size is "
                f"{self.vocab_size}; use the tokenizer of this checkpoint"
            )
        self.state.require_moving()
        self.actions.require_moving()
        self.processor()

    @property
    def vocab_size(self) -> int:
        """Rows of the token table."""
        return self.model.language.vocab_size if isinstance(self.model, Gr00tConfig) else self.model.vocab_size

    @property
    def image_size(self) -> int:
        """Edge of the network's square images, pixels."""
        return self.model.vision.image_size

    def processor(self) -> FoundationProcessor:
        """Converts observations and actions for this checkpoint."""
        if isinstance(self.model, Gr00tConfig):
            sizes = gr00t_sizes(self.model)
            return Gr00tProcessor(self.policy, self.state, self.actions, self.tokenizer, sizes, self.resolutions)
        return Pi05Processor(
            self.policy,
            self.state,
            self.actions,
            self.tokenizer,
            self.model.max_token_len,
            self.image_size,
            self.slots,
        )

    def spec(self, quantization: str = "none") -> PolicySpec:
        """The public description, with the name of the recipe that the weights were quantized by."""
        size, policy = self.image_size, self.policy
        max_tokens = self.model.max_token_len if isinstance(self.model, Pi05Config) else 0
        return PolicySpec(
            name=self.name,
            family=self.family,
            cameras=tuple(CameraSpec(camera.key, size, size) for camera in policy.cameras),
            state_names=policy.state_names,
            action_names=policy.action_names,
            horizon=self.model.action_horizon,
            control_hz=policy.control_hz,
            first_action_delay_s=policy.delay_s,
            num_steps=policy.num_steps or 0,
            max_tokens=max_tokens or _gr00t_tokens(policy, self.model),
            quantization=quantization,
            action_modes=emitted_modes(policy.action_modes),
        )

    def blank_observation(self) -> Observation:
        """An observation that every check accepts: grey images, the statistics' centre."""
        images = {}
        for camera in self.policy.cameras:
            height, width = self.resolutions.get(camera.source, (self.image_size, self.image_size))
            scale = max(1.0, self.image_size / min(height, width))
            images[camera.key] = np.full((round(height * scale), round(width * scale), 3), 127, np.uint8)
        return Observation(images, self.state.centre, _BLANK_INSTRUCTION)

    def write(self, folder: Path) -> None:
        """Write the three files of our own layout into an existing folder."""
        config = {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "name": self.name,
            "model": self.model.to_json(),
            "robot": self.policy.to_json(),
            "slots": list(self.slots),
            "resolutions": {source: list(size) for source, size in self.resolutions.items()},
        }
        write_json(folder / CONFIG_FILE, config)
        stats = {"schema_version": STATS_VERSION, "state": self.state.to_json(), "actions": self.actions.to_json()}
        write_json(folder / STATS_FILE, stats)
        (folder / TOKENIZER_FILE).write_text(self.tokenizer.to_text(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> FoundationDescription:
        """Read what ``write`` wrote; ``config`` is the decoded ``config.json``.

        Raises:
            ConfigError: If a file's content is not valid.
            CheckpointError: If a file is missing or not JSON.
        """
        keys = ("format_version", "family", "name", "model", "robot", "slots", "resolutions")
        values = check_keys(config, keys, (), CONFIG_FILE)
        if values["format_version"] != FORMAT_VERSION:
            raise ConfigError(f"{CONFIG_FILE}: format_version is {values['format_version']!r}; this release reads 1")
        slots = values["slots"]
        if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
            raise ConfigError(f"{CONFIG_FILE}: slots is {slots!r}; it must be a list of names")
        robot = RobotSetup.from_json(values["robot"], f"{CONFIG_FILE}: robot")
        stats = check_keys(
            read_json(folder / STATS_FILE, "the normalization"), ("schema_version", "state", "actions"), (), STATS_FILE
        )
        if stats["schema_version"] != STATS_VERSION:
            raise ConfigError(f"{STATS_FILE}: schema_version is {stats['schema_version']!r}; must be {STATS_VERSION}")
        return cls(
            name=str(values["name"]),
            family=str(values["family"]),
            model=model_config(values["family"], values["model"], f"{CONFIG_FILE}: model"),
            policy=robot,
            state=VectorNormalizer.from_json(stats["state"], robot.state_names, f"{STATS_FILE}: state"),
            actions=VectorNormalizer.from_json(stats["actions"], robot.action_names, f"{STATS_FILE}: actions"),
            tokenizer=TextTokenizer.load(folder, str(values["family"])),
            slots=tuple(slots),
            resolutions=_resolutions(values["resolutions"]),
        )


def gr00t_sizes(model: Gr00tConfig) -> Gr00tSizes:
    """What the processing reads of the network's sizes."""
    return Gr00tSizes(
        image_size=model.vision.image_size,
        tokens_per_image=model.vision.num_patches,
        image_token_id=model.language.image_token_id,
        max_state_dim=model.state_dim,
        num_embodiments=model.num_embodiments,
    )


def with_steps(setup: RobotSetup, num_steps: int) -> RobotSetup:
    """The setup with the checkpoint's own number of denoise steps where it gives none."""
    return setup if setup.num_steps is not None else replace(setup, num_steps=num_steps)


def _gr00t_tokens(policy: RobotSetup, model: Any) -> int:
    return MAX_PROMPT_TOKENS + len(policy.cameras) * model.vision.num_patches


def _resolutions(data: object) -> dict[str, tuple[int, int]]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{CONFIG_FILE}: resolutions must be an object, found {type(data).__name__}")
    found = {}
    for source, size in data.items():
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size)):
            raise ConfigError(f"{CONFIG_FILE}: resolutions.{source} is {size!r}; it must be a list of height and width")
        found[source] = (size[0], size[1])
    return found

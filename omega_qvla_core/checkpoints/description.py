"""Everything about a policy but its weights: ``config.json``, ``norm_stats.json``, ``tokenizer.json``.

A checkpoint and a 4-bit pack share these three files; only the file with the tensors differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omega_qvla_core.checkpoints.foundation import FoundationDescription
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.policy_types import Observation, PolicySpec
from omega_qvla_core.processing.normalization import NormStats
from omega_qvla_core.processing.policy_config import PolicyConfig
from omega_qvla_core.processing.policy_processor import PolicyProcessor
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer
from omega_qvla_core.processing.robot_setup import emitted_modes
from omega_qvla_core.strict_json import check_keys, read_json, write_json

FORMAT_VERSION = 1
FAMILY = "pi05"
CONFIG_FILE = "config.json"
STATS_FILE = "norm_stats.json"
TOKENIZER_FILE = "tokenizer.json"
DESCRIPTION_FILES = (CONFIG_FILE, STATS_FILE, TOKENIZER_FILE)


@dataclass(frozen=True)
class PolicyDescription:
    """What a policy is, without its weights.

    Attributes:
        name: Name of the checkpoint.
        model: Sizes of the network.
        policy: Cameras, joints, units and rates.
        stats: Normalization statistics.
        tokenizer: Of the prompt.

    Raises:
        ConfigError: If the parts do not fit together.
    """

    name: str
    model: Pi05Config
    policy: PolicyConfig
    stats: NormStats
    tokenizer: WordTokenizer

    def __post_init__(self) -> None:
        model, policy = self.model, self.policy
        if len(policy.action_names) > model.action_dim:
            raise ConfigError(
                f"policy.action_names lists {len(policy.action_names)} actions, model.action_dim is {model.action_dim}"
            )
        if len(self.tokenizer.vocabulary) > model.vocab_size:
            raise ConfigError(
                f"tokenizer.json has {len(self.tokenizer.vocabulary)} tokens, model.vocab_size is {model.vocab_size}"
            )
        size = model.vision.image_size
        for camera in policy.cameras:
            if (camera.height, camera.width) != (size, size):
                raise ConfigError(
                    f"policy.cameras: {camera.key!r} is {camera.height} x {camera.width}, "
                    f"model.vision.image_size is {size}"
                )
        if isinstance(model.vision, KeypointConfig):
            self._check_keypoint(model.vision)
        self.processor()

    def _check_keypoint(self, vision: KeypointConfig) -> None:
        pairs = (
            ("num_cameras", vision.num_cameras, "cameras", len(self.policy.cameras)),
            ("state_dim", vision.state_dim, "state_names", len(self.policy.state_names)),
        )
        for field, wanted, other, found in pairs:
            if wanted != found:
                raise ConfigError(f"model.vision.{field} is {wanted}, but policy.{other} lists {found}")

    def processor(self) -> PolicyProcessor:
        """Converts observations and actions for this policy."""
        model = self.model
        return PolicyProcessor(self.policy, self.stats, self.tokenizer, model.max_token_len, model.action_horizon)

    def spec(self, quantization: str = "none") -> PolicySpec:
        """The public description, with the name of the recipe that the weights were quantized by."""
        return PolicySpec(
            name=self.name,
            family=FAMILY,
            cameras=self.policy.cameras,
            state_names=self.policy.state_names,
            action_names=self.policy.action_names,
            horizon=self.model.action_horizon,
            control_hz=self.policy.control_hz,
            first_action_delay_s=self.policy.first_action_delay_s,
            num_steps=self.policy.num_steps,
            max_tokens=self.model.max_token_len,
            quantization=quantization,
            action_modes=emitted_modes(self.policy.action_modes),
        )

    def blank_observation(self) -> Observation:
        """An observation that every check accepts: grey images, the statistics' centre."""
        images = {
            camera.key: np.full((camera.height, camera.width, 3), 127, np.uint8) for camera in self.policy.cameras
        }
        return Observation(images, self.stats.state.centre, self.tokenizer.words[0])


def read_description(folder: Path) -> PolicyDescription | FoundationDescription:
    """Read the three files of a checkpoint or pack folder.

    Raises:
        CheckpointError: If a file is missing, too large or not JSON.
        ConfigError: If a file's content is not valid, or the files do not fit together; the message names the folder.
    """
    config_path = folder / CONFIG_FILE
    config = read_json(config_path, "the policy's configuration")
    keys = ("format_version", "family", "name", "model", "policy")
    try:
        if isinstance(config, dict) and "robot" in config:
            # A public checkpoint that was saved in our own layout.
            return FoundationDescription.read(folder, config)
        config = check_keys(config, keys, (), CONFIG_FILE)
        for key, known in (("format_version", FORMAT_VERSION), ("family", FAMILY)):
            if config[key] != known:
                raise ConfigError(f"{CONFIG_FILE}: {key} is {config[key]!r}; this release reads {known!r}")
        if not isinstance(config["name"], str) or not config["name"]:
            raise ConfigError(f"{CONFIG_FILE}: name is {config['name']!r}; it must be a text")
        return PolicyDescription(
            name=config["name"],
            model=Pi05Config.from_json(config["model"], f"{CONFIG_FILE}: model"),
            policy=PolicyConfig.from_json(config["policy"], f"{CONFIG_FILE}: policy"),
            stats=NormStats.from_json(read_json(folder / STATS_FILE, "the normalization"), STATS_FILE),
            tokenizer=WordTokenizer.from_json(read_json(folder / TOKENIZER_FILE, "the vocabulary"), TOKENIZER_FILE),
        )
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def write_description(description: PolicyDescription | FoundationDescription, folder: Path) -> None:
    """Write the three files into an existing folder."""
    if isinstance(description, FoundationDescription):
        description.write(folder)
        return
    config = {
        "format_version": FORMAT_VERSION,
        "family": FAMILY,
        "name": description.name,
        "model": description.model.to_json(),
        "policy": description.policy.to_json(),
    }
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / STATS_FILE, description.stats.to_json())
    write_json(folder / TOKENIZER_FILE, description.tokenizer.to_json())

"""Demonstrations as tensors on the training device, and random batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.envs.tabletop import CAMERAS, COLOURS, KINDS, Task
from omega_qvla_core.envs.tabletop.demonstrations import Episode, load_shard
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.image_tensors import image_tensor
from omega_qvla_core.processing.normalization import AxisStats, NormStats
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer
from omega_qvla_core.train.config import HORIZON, TrainConfig
from omega_qvla_core.train.losses import readout_targets

ARM_JOINTS = 6
"""The first joints are predicted as deltas to their measured position; the gripper after them is absolute."""
MIN_ACTION_STD = 0.01
"""Floor of the action scale in rad and m: finer motion than this is not worth the levels of a 4-bit network."""
MIN_STATE_STD = 0.005
"""Floor of the proprioception scale in rad and m."""


@dataclass(frozen=True)
class Batch:
    """One training batch of B observations.

    Attributes:
        images: Per camera float32 ``[B, 3, H, W]`` in [-1, 1].
        tokens: int64 ``[B, L]``.
        token_mask: bool ``[B, L]``.
        state: float32 ``[B, 7]`` normalised.
        actions: float32 ``[B, horizon, 7]`` normalised.
        action_mask: float32 ``[B, horizon]``, 0 where a step is not to be imitated.
        readout: float32 ``[B, READOUT_DIM]``.
        pixels: Per camera ``[B, 2, 2]``: image coordinates of the named cube and of the plate in [0, 1].
        visible: Per camera float ``[B, 2]``.
    """

    images: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    state: Tensor
    actions: Tensor
    action_mask: Tensor
    readout: Tensor
    pixels: list[Tensor]
    visible: list[Tensor]


def tabletop_tokenizer() -> WordTokenizer:
    """The vocabulary of all wordings."""
    return WordTokenizer.from_texts(w for kind in KINDS for colour in COLOURS for w in Task(kind, colour).wordings)


def prompt_table(tokenizer: WordTokenizer, max_len: int) -> tuple[Tensor, Tensor]:
    """Tokens of every wording: int64 ``[kinds, colours, wordings, L]`` and their bool mask."""
    rows = [
        [[tokenizer.encode(text, max_len) for text in Task(kind, colour).wordings] for colour in COLOURS]
        for kind in KINDS
    ]
    counts = {len(wordings) for kind in rows for wordings in kind}
    if len(counts) != 1:
        raise ConfigError(f"tasks have different numbers of wordings {sorted(counts)}; give every kind as many")
    tokens, masks = (np.array([[[w[i] for w in ws] for ws in kind] for kind in rows]) for i in (0, 1))
    return torch.from_numpy(tokens), torch.from_numpy(masks)


class Demonstrations:
    """All frames of a folder of shards.

    Args:
        folder: Shards as ``envs.tabletop.demonstrations.generate`` writes them.
        device: Where the tensors live and batches are made.
        stats: Normalization; computed from these demonstrations if None.

    Raises:
        ConfigError: The folder holds no episode.
    """

    def __init__(self, folder: Path, device: torch.device | str, stats: NormStats | None = None) -> None:
        self.device = torch.device(device)
        episodes = [e for shard in sorted(folder.glob("shard_*.safetensors")) for e in load_shard(shard)]
        if not episodes:
            raise ConfigError(f"{folder} holds no demonstrations; record some with `omega-qvla tabletop demos`")
        self.episodes = len(episodes)
        self._join(episodes)
        self.stats = stats or self._statistics()
        self._scales = {name: self._on_device(getattr(self.stats, name)) for name in ("state", "actions")}
        self.tokenizer = tabletop_tokenizer()
        self.max_tokens = 16
        self._prompts, self._prompt_masks = (t.to(self.device) for t in prompt_table(self.tokenizer, self.max_tokens))
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state)

    def _join(self, episodes: list[Episode]) -> None:
        def joined(name: str, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.concatenate([e.steps[name] for e in episodes])).to(self.device, dtype)

        lengths = np.array([len(e) for e in episodes])
        ends = torch.from_numpy(np.repeat(np.cumsum(lengths), lengths))

        def per_episode(values: list[int]) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(values), lengths)).to(self.device)

        self.last = (ends - 1).to(self.device)
        self.kind = per_episode([KINDS.index(e.task.kind) for e in episodes])
        self.colour = per_episode([e.task.colour_index for e in episodes])
        self.images = [joined(camera, torch.uint8) for camera in CAMERAS]
        self.state = joined("state", torch.float32)
        self.targets = joined("action", torch.float32)
        self.burst = joined("burst", torch.bool)
        self.cubes = joined("cube_position", torch.float32)
        self.yaws = joined("cube_yaw", torch.float32)
        self.plate = joined("plate_position", torch.float32)
        self.tool_position = joined("tool_position", torch.float32)
        self.tool_rotation = joined("tool_rotation", torch.float32)
        self.pixels = [joined(f"{camera}_uv", torch.float32) for camera in CAMERAS]
        self.visible = [joined(f"{camera}_visible", torch.float32) for camera in CAMERAS]

    def _chunks(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Absolute-minus-reference actions ``[B, horizon, 7]`` and mask ``[B, horizon]`` of the frames ``index``.

        Past the end of an episode the last target is repeated (the arm stays). From the start of a disturbance on,
        steps are masked: the expert's later targets answer a push that the policy could not foresee.
        """
        steps = torch.minimum(index[:, None] + torch.arange(HORIZON, device=self.device), self.last[index][:, None])
        reference = self.state[index].clone()
        reference[:, ARM_JOINTS:] = 0.0
        undisturbed = (~self.burst[steps]).float().cumprod(dim=1)
        return self.targets[steps] - reference[:, None], undisturbed

    def _statistics(self) -> NormStats:
        usable = torch.nonzero(~self.burst).squeeze(1)
        index = usable[:: max(1, len(usable) // 50_000)]
        actions, mask = (t.double().cpu().numpy() for t in self._chunks(index))
        actions = np.where(mask[..., None] > 0, actions, np.nan)
        return NormStats(
            AxisStats.from_samples("mean_std", self.state.cpu().numpy(), MIN_STATE_STD, "norm_stats.state"),
            AxisStats.from_samples("mean_std", actions, MIN_ACTION_STD, "norm_stats.actions"),
        )

    def _frame_weights(self, config: TrainConfig) -> Tensor:
        """Cumulative sampling weights ``[N]`` (float64): disturbed frames never, far frames more often."""
        if self._weights is None:
            named = self.cubes[torch.arange(len(self), device=self.device), self.colour]
            far = (named - self.tool_position).norm(dim=1) > config.far_distance_m
            weights = torch.where(far, config.far_weight, 1.0) * (~self.burst)
            self._weights = weights.double().cumsum(0)
        return self._weights

    def sample(
        self, config: TrainConfig, generator: torch.Generator, size: int | None = None, augment: bool = True
    ) -> Batch:
        """Draw a batch.

        Args:
            config: Batch size, weights and augmentation.
            generator: On ``device``; the same state gives the same batch.
            size: Batch size, ``config.batch`` if None.
            augment: Whether to jitter images, add proprioception noise and give counterfactual instructions.
        """
        size = size or config.batch
        weights = self._frame_weights(config)
        draw = torch.rand(size, generator=generator, device=self.device, dtype=torch.float64) * weights[-1]
        index = torch.searchsorted(weights, draw).clamp(max=len(self) - 1)
        colour, imitate = self._instructed_colour(index, config, generator, augment)
        wording = torch.randint(self._prompts.shape[2], (size,), generator=generator, device=self.device)
        kind = self.kind[index]
        actions, mask = self._chunks(index)
        points = torch.stack([colour, torch.full_like(colour, len(COLOURS))], dim=1)
        rows = torch.arange(size, device=self.device)[:, None]
        state_noise = config.state_noise if augment else 0.0
        return Batch(
            images=[self._image(images[index], config.jitter if augment else 0.0, generator) for images in self.images],
            tokens=self._prompts[kind, colour, wording],
            token_mask=self._prompt_masks[kind, colour, wording],
            state=self._normalized(self.state[index], "state")
            + state_noise * torch.randn(self.state[index].shape, generator=generator, device=self.device),
            actions=self._normalized(actions, "actions"),
            action_mask=mask * imitate[:, None],
            readout=readout_targets(
                self.cubes[index],
                self.yaws[index],
                self.plate[index],
                self.tool_position[index],
                self.tool_rotation[index],
                colour,
            ),
            pixels=[pixels[index][rows, points] for pixels in self.pixels],
            visible=[visible[index][rows, points] for visible in self.visible],
        )

    def _instructed_colour(
        self, index: Tensor, config: TrainConfig, generator: torch.Generator, augment: bool
    ) -> tuple[Tensor, Tensor]:
        """Colour that the text names, and 1 where the demonstration shows just that."""
        colour = self.colour[index]
        if not augment or config.counterfactual == 0:
            return colour, torch.ones(len(index), device=self.device)
        swap = torch.rand(len(index), generator=generator, device=self.device) < config.counterfactual
        other = torch.randint(len(COLOURS), (len(index),), generator=generator, device=self.device)
        told = torch.where(swap, other, colour)
        return told, (told == colour).float()

    def _image(self, image: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
        """uint8 ``[B, H, W, 3]`` -> float ``[B, 3, H, W]``, with brightness and contrast changed per image.

        No shifts: a pixel of the front camera is a centimetre on the table.
        """
        tensor = image_tensor(image)
        if jitter == 0:
            return tensor
        change = torch.rand(2, len(tensor), 1, 1, 1, generator=generator, device=self.device) * 2 - 1
        return (tensor * (1 + jitter * change[0]) + jitter * change[1]).clamp(-1, 1)

    def _on_device(self, stats: AxisStats) -> tuple[Tensor, Tensor]:
        centre, scale = (torch.as_tensor(v, dtype=torch.float32) for v in (stats.centre, stats.scale))
        return centre.to(self.device), scale.to(self.device)

    def _normalized(self, values: Tensor, name: str) -> Tensor:
        centre, scale = self._scales[name]
        return (values - centre) / scale

"""Pi 0.5 in plain PyTorch: a vision encoder and a language tower over the prefix, an action expert that denoises.

The prefix (camera tokens, then the prompt) runs once through the language tower, whose keys and values of every layer
are kept. The action expert then evaluates the velocity of the action chunk a few times, attending layer by layer to
those keys and values, and an Euler loop integrates from noise (time 1) to actions (time 0).

State dict keys and shapes are those of the official openpi PyTorch checkpoints. Shapes: B batch, P prefix tokens, H
action horizon, A action width. Source of the computation: openpi's PI0Pytorch with ``pi05=True``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.models.layers import AdaRMSNorm, Block, RMSNorm, Rotary, rotary_angles
from omega_qvla_core.models.pi05_config import Pi05Config, build_vision
from omega_qvla_core.models.step_context import denoise_step

__all__ = ["TIED_KEYS", "UNUSED_KEYS", "Pi05", "Pi05Config", "Prefix", "PrefixCache", "canonical_state_dict"]

TIED_KEYS = {
    "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight": (
        "paligemma_with_expert.paligemma.lm_head.weight"
    ),
}
"""Other name of a tensor in files -> its name here. Files hold the token table under one of the two or both."""

UNUSED_KEYS = ("paligemma_with_expert.gemma_expert.lm_head.weight",)
"""Tensors of official files that nothing reads (263 M numbers at full size); accepted in files, never allocated."""


@dataclass(frozen=True)
class Prefix:
    """What the language tower reads.

    Attributes:
        embeddings: ``[B, P, lm_width]``: tokens of all cameras, then the prompt.
        pad_mask: bool ``[B, P]``; False for absent cameras and padding. At least one True in each row.
    """

    embeddings: Tensor
    pad_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[B, P]``: masked tokens take up no position (leading ones get -1, which is never read)."""
        return self.pad_mask.long().cumsum(dim=1) - 1


@dataclass(frozen=True)
class PrefixCache:
    """What the action expert reads of the prefix.

    Attributes:
        keys: Per layer ``[B, num_kv_heads, P, head_dim]``, rotated.
        values: Per layer, same shape.
        pad_mask: bool ``[B, P]``.
        last_hidden: ``[B, P, lm_width]`` after the final norm; no action depends on it. None if it was not asked for.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pad_mask: Tensor
    last_hidden: Tensor | None

    def repeat(self, times: int) -> PrefixCache:
        """The cache with every row repeated ``times`` times in a row (several noises per observation)."""
        if times == 1:
            return self
        return replace(
            self,
            keys=tuple(key.repeat_interleave(times, dim=0) for key in self.keys),
            values=tuple(value.repeat_interleave(times, dim=0) for value in self.values),
            pad_mask=self.pad_mask.repeat_interleave(times, dim=0),
            last_hidden=None if self.last_hidden is None else self.last_hidden.repeat_interleave(times, dim=0),
        )


class Pi05(nn.Module):
    """Pi 0.5: see the module's docstring.

    Args:
        config: Sizes. Weights start random, as for training; ``load_state_dict`` takes a checkpoint's.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        self.paligemma_with_expert = _PaliGemmaWithExpert(config)
        self.action_in_proj = nn.Linear(config.action_dim, config.expert_width)
        self.action_out_proj = nn.Linear(config.expert_width, config.action_dim)
        self.time_mlp_in = nn.Linear(config.expert_width, config.expert_width)
        self.time_mlp_out = nn.Linear(config.expert_width, config.expert_width)

    @property
    def vision(self) -> nn.Module:
        """The vision encoder."""
        return self.paligemma_with_expert.paligemma.model.vision_tower

    @property
    def language_model(self) -> nn.Module:
        """The language tower: ``layers`` and ``norm``."""
        return self.paligemma_with_expert.paligemma.model.language_model

    @property
    def expert(self) -> nn.Module:
        """The action expert: ``layers`` and ``norm``."""
        return self.paligemma_with_expert.gemma_expert.model

    def embed_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None = None,
    ) -> Prefix:
        """Embed cameras and prompt.

        Args:
            images: One float ``[B, 3, height, width]`` in [-1, 1] per camera, in checkpoint order.
            image_masks: One bool ``[B]`` per camera; the content of a masked camera has no effect.
            tokens: int64 ``[B, L]``.
            token_mask: bool ``[B, L]``; False for padding.
            state: float ``[B, state_dim]``, normalised, for vision encoders that read proprioception. Others ignore it.
        """
        paligemma = self.paligemma_with_expert.paligemma
        text = paligemma.lm_head(tokens) * math.sqrt(self.config.lm_width)
        seen, seen_mask = paligemma.model.embed_cameras(images, image_masks, text, token_mask, state)
        return Prefix(
            torch.cat((seen.to(text.dtype), text), dim=1),
            torch.cat((seen_mask, token_mask), dim=1),
        )

    def encode_prefix(self, prefix: Prefix, last_hidden: bool = True) -> PrefixCache:
        """Run the language tower.

        Args:
            prefix: From ``embed_prefix``.
            last_hidden: Whether to compute the tower's output too. Without it the last layer stops at its keys and
                values, which is all that actions depend on.
        """
        tower = self.language_model
        rotary = self._rotary(prefix.position_ids)
        x, keys, values = prefix.embeddings, [], []
        for index, layer in enumerate(tower.layers):
            if index == len(tower.layers) - 1 and not last_hidden:
                key, value = layer.keys_values(x, rotary)
            else:
                x, key, value = layer(x, rotary, prefix.pad_mask)
            keys.append(key)
            values.append(value)
        hidden = tower.norm(x)[0] if last_hidden else None
        return PrefixCache(tuple(keys), tuple(values), prefix.pad_mask, hidden)

    def time_embedding(self, time: Tensor) -> Tensor:
        """Sines and cosines of the flow-matching time.

        Args:
            time: float32 ``[B]`` in [0, 1].

        Returns:
            float32 ``[B, expert_width]``. Computed in float64: the highest angular rate is 1571 rad per unit time, so
            float32 angles would cost 1e-4 of the actions.
        """
        config = self.config
        fraction = torch.linspace(0, 1, config.expert_width // 2, dtype=torch.float64, device=time.device)
        period = config.time_min_period * (config.time_max_period / config.time_min_period) ** fraction
        angle = time.double()[:, None] * (2 * math.pi / period)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).float()

    def time_condition(self, time: Tensor) -> Tensor:
        """Condition ``[B, expert_width]`` of the adaptive norms for times ``[B]``."""
        embedding = self.time_embedding(time).to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))

    def expert_hidden(self, x_t: Tensor, cond: Tensor, cache: PrefixCache) -> Tensor:
        """The action expert's output after its final norm, ``[B, H, expert_width]``.

        Args:
            x_t: ``[B, H, action_dim]``, the noisy chunk.
            cond: ``[B, expert_width]`` from ``time_condition``.
            cache: From ``encode_prefix``.
        """
        x = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))
        rotary = self._rotary(suffix_position_ids(cache.pad_mask, x_t.shape[1]))
        key_mask = F.pad(cache.pad_mask, (0, x_t.shape[1]), value=True)
        for layer, key, value in zip(self.expert.layers, cache.keys, cache.values, strict=True):
            x, _, _ = layer(x, rotary, key_mask, cond, past=(key, value))
        return self.expert.norm(x, cond)[0]

    def velocity(self, x_t: Tensor, time: Tensor, cache: PrefixCache) -> Tensor:
        """One evaluation of the action expert.

        Args:
            x_t: float32 ``[B, H, action_dim]``: ``time * noise + (1 - time) * actions``.
            time: float32 ``[B]``, 1 for noise to 0 for actions.
            cache: From ``encode_prefix``.

        Returns:
            float32 ``[B, H, action_dim]``; the training target is ``noise - actions``.
        """
        hidden = self.expert_hidden(x_t, self.time_condition(time), cache)
        return self.action_out_proj(hidden.to(self.action_out_proj.weight.dtype)).float()

    def training_velocity(self, prefix: Prefix, x_t: Tensor, time: Tensor) -> Tensor:
        """Velocity with gradients through both towers.

        Args:
            prefix: From ``embed_prefix``, B rows.
            x_t: ``[B * K, H, action_dim]``: K noisy chunks in a row per observation.
            time: float32 ``[B * K]``.

        Returns:
            float32 ``[B * K, H, action_dim]``.
        """
        cache = self.encode_prefix(prefix, last_hidden=False)
        return self.velocity(x_t, time, cache.repeat(x_t.shape[0] // cache.pad_mask.shape[0]))

    def sample_actions(self, prefix: Prefix | PrefixCache, noise: Tensor, num_steps: int) -> Tensor:
        """Integrate from noise to actions.

        Args:
            prefix: From ``embed_prefix`` or ``encode_prefix``.
            noise: float32 ``[B, H, action_dim]``.
            num_steps: Euler steps. Each velocity runs inside ``denoise_step(index, num_steps)``.

        Returns:
            float32 ``[B, H, action_dim]``, not clipped.

        Raises:
            ValueError: If the noise does not fit the model, or ``num_steps`` is not positive.
        """
        batch = prefix.pad_mask.shape[0]
        expected = (batch, self.config.action_horizon, self.config.action_dim)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; this model and batch need {expected}")
        times = euler_times(num_steps)
        step = float(np.float32(-1.0 / num_steps))
        cache = self.encode_prefix(prefix) if isinstance(prefix, Prefix) else prefix
        x = noise.float()
        for index, time in enumerate(times):
            with denoise_step(index, num_steps):
                x = x + step * self.velocity(x, x.new_full((batch,), time), cache)
        return x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """``nn.Module.load_state_dict`` that also takes the key list of official files (see TIED_KEYS, UNUSED_KEYS)."""
        return super().load_state_dict(canonical_state_dict(state_dict), strict=strict, assign=assign)

    def _rotary(self, position_ids: Tensor) -> Rotary:
        return rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)


def canonical_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an official file under the names used here: the tied table once, unused tensors dropped.

    Where a file holds both names of the tied table, the embedding's counts: it is the one that is read.
    """
    kept = {key: value for key, value in state_dict.items() if key not in UNUSED_KEYS}
    for other, name in TIED_KEYS.items():
        if other in kept:
            kept[name] = kept.pop(other)
    return kept


def euler_times(num_steps: int) -> list[float]:
    """Times at which the velocity is evaluated: accumulated in float32 from 1 downwards, as the reference does.

    The rounding counts: exact times would move the actions by 1e-4 (the time embedding is that steep).

    Raises:
        ValueError: If ``num_steps`` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    step, time, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    for _ in range(num_steps):
        times.append(float(time))
        time = time + step
    return times


def suffix_position_ids(pad_mask: Tensor, horizon: int) -> Tensor:
    """int64 ``[B, horizon]``: the chunk's positions come after the valid tokens of the prefix."""
    return pad_mask.long().sum(dim=1, keepdim=True) + torch.arange(horizon, device=pad_mask.device)


class _PaliGemmaWithExpert(nn.Module):
    """Holds the two towers under the official names."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.paligemma = nn.Module()
        self.paligemma.model = _PaliGemmaModel(config)
        # The official files name the token table after the output head that it is tied to; the head is not needed.
        self.paligemma.lm_head = nn.Embedding(config.vocab_size, config.lm_width)
        # With the factor sqrt(lm_width) of embed_prefix, embedded tokens start with unit variance.
        nn.init.normal_(self.paligemma.lm_head.weight, std=config.lm_width**-0.5)
        self.gemma_expert = nn.Module()
        self.gemma_expert.model = _tower(config, config.expert_width, config.expert_mlp_dim, adaptive=True)


class _PaliGemmaModel(nn.Module):
    """Vision encoder, projector (for encoders with a width of their own) and language tower."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.vision_tower = build_vision(config)
        out_width = getattr(self.vision_tower, "out_width", None)
        self.multi_modal_projector = None
        if out_width is not None:
            self.multi_modal_projector = nn.Module()
            self.multi_modal_projector.linear = nn.Linear(out_width, config.lm_width)
        self.language_model = _tower(config, config.lm_width, config.lm_mlp_dim, adaptive=False)

    def embed_cameras(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        text: Tensor,
        text_mask: Tensor,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N, lm_width]`` of all cameras and their mask ``[B, N]``."""
        tokens, mask = self.vision_tower(images, image_masks, text, text_mask, state)
        if self.multi_modal_projector is not None:
            tokens = self.multi_modal_projector.linear(tokens)
        return tokens, mask


def _tower(config: Pi05Config, width: int, mlp_dim: int, adaptive: bool) -> nn.Module:
    """``layers`` and final ``norm`` of one tower."""
    tower = nn.Module()
    tower.layers = nn.ModuleList(
        Block(width, mlp_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps, adaptive)
        for _ in range(config.lm_depth)
    )
    tower.norm = (AdaRMSNorm if adaptive else RMSNorm)(width, config.rms_norm_eps)
    return tower

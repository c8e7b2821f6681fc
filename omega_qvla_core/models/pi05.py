"""Pi 0.5 in plain PyTorch: a vision encoder and a language tower over the prefix, an action expert that denoises.

The prefix (camera tokens, then the prompt) runs once through the language tower, whose keys and values of every layer
are kept. The action expert then evaluates the velocity of the action chunk a few times, attending layer by layer to
those keys and values, and an Euler loop integrates from noise (time 1) to actions (time 0).

State dict keys and shapes are those of the official openpi PyTorch checkpoints. Shapes: B batch, P prefix tokens, H
action horizon, A action width. Source of the computation: openpi's PI0Pytorch with ``pi05=True``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.models.flow import EulerStep, VelocityGuide, check_sampling, integrate
from omega_qvla_core.models.layers import AdaRMSNorm, Block, RMSNorm, Rotary, rotary_angles
from omega_qvla_core.models.pi05_config import Pi05Config, build_vision
from omega_qvla_core.models.pi05_prefix import Prefix, PrefixCache, StepCondition, euler_times, suffix_position_ids
from omega_qvla_core.models.prefix_masks import drop_columns, host_all
from omega_qvla_core.models.siglip import SiglipVision
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.models.step_tables import StepTables

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
class _Suffix:
    """What the positions of the chunk's tokens give: rotary angles, and the mask of prefix and chunk (None: all)."""

    rotary: Rotary
    mask: Tensor | None


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
        self._tables: StepTables[tuple[StepCondition, ...]] = StepTables()

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
        drop_masked: bool = True,
    ) -> Prefix:
        """Embed cameras and prompt.

        Args:
            images: One float ``[B, 3, height, width]`` in [-1, 1] per camera, in checkpoint order.
            image_masks: One bool ``[B]`` per camera; the content of a masked camera has no effect.
            tokens: int64 ``[B, L]``.
            token_mask: bool ``[B, L]``; False for padding.
            state: float ``[B, state_dim]``, normalised, for vision encoders that read proprioception. Others ignore it.
            drop_masked: Leave out what no row of the batch has (absent cameras, padding), and do not run the vision
                tower over absent cameras. Actions are the same; the layout of the prefix depends on the masks.
        """
        paligemma = self.paligemma_with_expert.paligemma
        if drop_masked:
            tokens, token_mask = drop_columns(tokens, token_mask)
        text = paligemma.lm_head(tokens) * math.sqrt(self.config.lm_width)
        seen, seen_mask = paligemma.model.embed_cameras(images, image_masks, text, token_mask, state, drop_masked)
        embeddings = torch.cat((seen.to(text.dtype), text), dim=1)
        pad_mask = torch.cat((seen_mask, token_mask), dim=1)
        if not drop_masked:
            return Prefix(embeddings, pad_mask)
        embeddings, pad_mask = drop_columns(embeddings, pad_mask)
        return Prefix(embeddings, pad_mask, complete=host_all(pad_mask))

    def encode_prefix(self, prefix: Prefix, last_hidden: bool = True) -> PrefixCache:
        """Run the language tower.

        Args:
            prefix: From ``embed_prefix``.
            last_hidden: Whether to compute the tower's output too. Without it the last layer stops at its keys and
                values, which is all that actions depend on; calibration needs it, to see every linear.
        """
        tower, mask = self.language_model, None if prefix.complete else prefix.pad_mask
        rotary = self._rotary(prefix.position_ids)
        x, keys, values = prefix.embeddings, [], []
        for index, layer in enumerate(tower.layers):
            if index == len(tower.layers) - 1 and not last_hidden:
                key, value = layer.keys_values(x, rotary)
            else:
                x, key, value = layer(x, rotary, mask)
            keys.append(key)
            values.append(value)
        hidden = tower.norm(x)[0] if last_hidden else None
        return PrefixCache(tuple(keys), tuple(values), prefix.pad_mask, hidden, prefix.complete)

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

    def condition(self, time: Tensor) -> StepCondition:
        """What the action expert reads of times float32 ``[B]`` (or ``[1]`` for a whole batch)."""
        cond = self.time_condition(time)
        layers = tuple(layer.modulation(cond) for layer in self.expert.layers)
        return StepCondition(layers, self.expert.norm.modulation(cond))

    def expert_hidden(self, x_t: Tensor, time: Tensor, cache: PrefixCache) -> Tensor:
        """The action expert's output after its final norm, ``[B, H, expert_width]``.

        Args:
            x_t: ``[B, H, action_dim]``, the noisy chunk.
            time: float32 ``[B]``.
            cache: From ``encode_prefix``.
        """
        return self._expert(x_t, self.condition(time), cache, self._suffix(cache, x_t.shape[1]))

    def velocity(self, x_t: Tensor, time: Tensor, cache: PrefixCache) -> Tensor:
        """One evaluation of the action expert.

        Args:
            x_t: float32 ``[B, H, action_dim]``: ``time * noise + (1 - time) * actions``.
            time: float32 ``[B]``, 1 for noise to 0 for actions.
            cache: From ``encode_prefix``.

        Returns:
            float32 ``[B, H, action_dim]``; the training target is ``noise - actions``.
        """
        if torch.is_grad_enabled():
            # Training is under way, and not every optimizer counts its writes in the tensors' versions.
            self.forget_step_tables()
        return self._velocity(x_t, self.condition(time), cache, self._suffix(cache, x_t.shape[1]))

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

    def sample_actions(
        self, prefix: Prefix | PrefixCache, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Tensor:
        """Integrate from noise to actions.

        Args:
            prefix: From ``embed_prefix`` or ``encode_prefix``.
            noise: float32 ``[B, H, action_dim]``.
            num_steps: Euler steps. Each velocity runs inside ``denoise_step(index, num_steps)``.
            guide: Corrects every velocity, see ``models.flow.VelocityGuide``.

        Returns:
            float32 ``[B, H, action_dim]``, not clipped.

        Raises:
            ValueError: If the noise does not fit the model, or ``num_steps`` is not positive.
        """
        expected = (prefix.pad_mask.shape[0], self.config.action_horizon, self.config.action_dim)
        check_sampling(noise, expected, num_steps)
        cache = self.encode_prefix(prefix, last_hidden=False) if isinstance(prefix, Prefix) else prefix
        return deque(self.denoise(cache, noise, num_steps, guide), maxlen=1)[0].actions

    def denoise(
        self, cache: PrefixCache, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Iterator[EulerStep]:
        """The steps of ``sample_actions``, one by one, with the same arguments."""
        suffix, step = self._suffix(cache, noise.shape[1]), float(np.float32(-1.0 / num_steps))
        conditions = self.step_conditions(num_steps)
        return integrate(
            noise, num_steps, step, lambda x, index: self._velocity(x, conditions[index], cache, suffix), guide
        )

    def step_conditions(self, num_steps: int) -> tuple[StepCondition, ...]:
        """``condition`` of every step, one row for the whole batch; kept until a weight changes (see StepTables)."""
        norms = [
            norm for layer in self.expert.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        sources = [self.time_mlp_in, self.time_mlp_out, self.expert.norm, *norms]
        return self._tables.get(num_steps, sources, lambda: self._step_conditions(num_steps))

    def forget_step_tables(self) -> None:
        """Forget what was kept per denoise step; needed only after a write through ``parameter.data``."""
        self._tables.clear()

    def train(self, mode: bool = True) -> Pi05:
        """``nn.Module.train``; also forgets what was kept per denoise step."""
        self.forget_step_tables()
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """``nn.Module.load_state_dict`` that also takes the key list of official files (see TIED_KEYS, UNUSED_KEYS)."""
        return super().load_state_dict(canonical_state_dict(state_dict), strict=strict, assign=assign)

    def _step_conditions(self, num_steps: int) -> tuple[StepCondition, ...]:
        device = self.action_in_proj.weight.device
        conditions = []
        for index, time in enumerate(euler_times(num_steps)):
            with denoise_step(index, num_steps):
                conditions.append(self.condition(torch.full((1,), time, dtype=torch.float32, device=device)))
        return tuple(conditions)

    def _velocity(self, x_t: Tensor, condition: StepCondition, cache: PrefixCache, suffix: _Suffix) -> Tensor:
        hidden = self._expert(x_t, condition, cache, suffix)
        return self.action_out_proj(hidden.to(self.action_out_proj.weight.dtype)).float()

    def _expert(self, x_t: Tensor, condition: StepCondition, cache: PrefixCache, suffix: _Suffix) -> Tensor:
        x = self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype)).to(cache.keys[0].dtype)
        past = zip(cache.keys, cache.values, strict=True)
        for layer, modulation, keys_values in zip(self.expert.layers, condition.layers, past, strict=True):
            x, _, _ = layer(x, suffix.rotary, suffix.mask, modulation, keys_values)
        return self.expert.norm(x, condition.final)[0]

    def _suffix(self, cache: PrefixCache, horizon: int) -> _Suffix:
        rotary = self._rotary(suffix_position_ids(cache.pad_mask, horizon))
        return _Suffix(rotary, None if cache.complete else F.pad(cache.pad_mask, (0, horizon), value=True))

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
        skip_absent: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, N, lm_width]`` of all cameras and their mask ``[B, N]``."""
        skip = {"skip_absent": skip_absent} if isinstance(self.vision_tower, SiglipVision) else {}
        # The encoder may be of another type than the language tower (bfloat16 keeps parts of a model in float32).
        dtype = next(self.vision_tower.parameters()).dtype
        images, text = [image.to(dtype) for image in images], text.to(dtype)
        state = None if state is None else state.to(dtype)
        tokens, mask = self.vision_tower(images, image_masks, text, text_mask, state, **skip)
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

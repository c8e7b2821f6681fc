"""GR00T N1.5 in plain PyTorch: a vision-language backbone, an adapter, and a diffusion transformer that denoises.

SigLIP embeds the images, Qwen3 (cut at its selected layer) reads them with the prompt, the adapter attends over the
result. All this and the state's encoding run once per observation, and so do the keys and values of every
cross-attention, which do not depend on the denoise step. The action head then evaluates the velocity of the action
chunk a few times, and an Euler loop integrates from noise (timestep 0) to actions.

State dict keys and shapes are those of the official checkpoint. Shapes: B batch, T prompt tokens (images included), H
action horizon, A action width. Source of the computation: NVIDIA's Isaac GR00T, release N1.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.models.flow import EulerStep, VelocityGuide, check_sampling, integrate
from omega_qvla_core.models.gr00t_config import LAYER_NORM_EPS, Gr00tConfig
from omega_qvla_core.models.gr00t_dit import Adapter, DiT, FloatLayerNorm, KeysValues, action_time_features
from omega_qvla_core.models.gr00t_embodiment import ActionEncoder, Embodiment, EmbodimentMLP
from omega_qvla_core.models.prefix_masks import drop_columns, host_all
from omega_qvla_core.models.qwen3 import Qwen3Tower
from omega_qvla_core.models.siglip import SiglipVision
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.models.step_tables import StepTables

__all__ = ["UNUSED_PREFIXES", "Gr00tCache", "Gr00tConfig", "Gr00tN15", "Gr00tPrefix", "canonical_state_dict"]

LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
TOKEN_TABLE = "backbone.eagle_model.language_model.model.embed_tokens.weight"
UNUSED_PREFIXES = (
    LM_HEAD,
    "backbone.eagle_model.vision_model.vision_model.head.",
)
"""Tensors of official files that nothing reads (an unrelated output head, SigLIP's pooling head): never allocated."""
LEROBOT_PREFIX = "_groot_model."


@dataclass(frozen=True)
class Gr00tPrefix:
    """What the language tower and the state encoder read.

    Attributes:
        embeddings: ``[B, T, width]``, image embeddings in their places.
        pad_mask: bool ``[B, T]``, False for padding.
        state: float ``[B, K, state_dim]``, normalised and padded (K is 1 in the release).
        embodiment: Index per row.
        complete: Whether ``pad_mask`` is known to be all True.
    """

    embeddings: Tensor
    pad_mask: Tensor
    state: Tensor
    embodiment: Embodiment
    complete: bool = False


@dataclass(frozen=True)
class Gr00tCache:
    """What the diffusion transformer reads of an observation.

    Attributes:
        contexts: Per block the keys and values of the features, None for self-attention.
        state_features: ``[B, K, width]``.
        pad_mask: bool ``[B, T]``.
        embodiment: Index per row.
        last_hidden: ``[B, T, feature_width]``, the features.
    """

    contexts: tuple[KeysValues | None, ...]
    state_features: Tensor
    pad_mask: Tensor
    embodiment: Embodiment
    last_hidden: Tensor

    def repeat(self, times: int) -> Gr00tCache:
        """The cache with every row repeated ``times`` times in a row (several noises per observation)."""
        if times == 1:
            return self
        contexts = tuple(
            None if one is None else (one[0].repeat_interleave(times, dim=0), one[1].repeat_interleave(times, dim=0))
            for one in self.contexts
        )
        return replace(
            self,
            contexts=contexts,
            state_features=self.state_features.repeat_interleave(times, dim=0),
            pad_mask=self.pad_mask.repeat_interleave(times, dim=0),
            embodiment=tuple(index for index in self.embodiment for _ in range(times)),
            last_hidden=self.last_hidden.repeat_interleave(times, dim=0),
        )


@dataclass(frozen=True)
class TimeCondition:
    """All that the action head reads of the timestep; B may be 1 for a whole batch.

    Attributes:
        modulations: Of the diffusion transformer.
        action_features: float32 ``[B, width]`` for the action encoder.
    """

    modulations: tuple[Tensor, ...]
    action_features: Tensor


class Gr00tN15(nn.Module):
    """GR00T N1.5: see the module's docstring.

    Args:
        config: Sizes. Weights start random; ``load_state_dict`` takes a checkpoint's.
    """

    def __init__(self, config: Gr00tConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _Backbone(config)
        self.action_head = _ActionHead(config)
        self._tables: StepTables[tuple[TimeCondition, ...]] = StepTables()

    @property
    def vision(self) -> SiglipVision:
        """The vision tower."""
        return self.backbone.eagle_model.vision_model

    @property
    def language_model(self) -> Qwen3Tower:
        """The language tower: ``layers`` and ``norm``."""
        return self.backbone.eagle_model.language_model.model

    @property
    def expert(self) -> DiT:
        """The diffusion transformer."""
        return self.action_head.model

    def embed_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None = None,
        embodiment: Sequence[int] | int = 0,
        drop_masked: bool = True,
    ) -> Gr00tPrefix:
        """Embed cameras and prompt.

        Args:
            images: One float ``[B, 3, size, size]`` in [-1, 1] per camera, in the order of the prompt's image tokens.
            image_masks: One bool ``[B]`` per camera; a row's prompt has image tokens for its present cameras only.
            tokens: int64 ``[B, T]``.
            token_mask: bool ``[B, T]``; False for padding.
            state: float ``[B, state_dim]`` or ``[B, K, state_dim]``, normalised and padded with zeros.
            embodiment: Index for all rows, or one per row.
            drop_masked: Leave out padding that all rows have. Padding is not harmless in this model: the action head
                attends to it. Without common padding the input is what the official processor would have made.

        Raises:
            ValueError: If image tokens, images, state or embodiment do not fit.
        """
        present = torch.stack(tuple(image_masks), dim=1)
        stacked = torch.stack(tuple(images), dim=1)
        pixels = stacked.flatten(0, 1) if host_all(present) else stacked[present]
        return self.embed_pixels(pixels, tokens, token_mask, state, embodiment, drop_masked)

    def embed_pixels(
        self,
        pixels: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None,
        embodiment: Sequence[int] | int = 0,
        drop_masked: bool = True,
    ) -> Gr00tPrefix:
        """``embed_prefix`` with the images (or tiles) of all rows in one tensor ``[N, 3, size, size]``, row by row."""
        config, batch = self.config, tokens.shape[0]
        if state is None or state.shape[0] != batch or state.shape[-1] != config.state_dim:
            found = None if state is None else list(state.shape)
            raise ValueError(f"state has shape {found}; this model and batch need [{batch}, {config.state_dim}]")
        if drop_masked:
            tokens, token_mask = drop_columns(tokens, token_mask)
        return Gr00tPrefix(
            embeddings=self.backbone.eagle_model.embed(pixels, tokens),
            pad_mask=token_mask,
            state=state if state.dim() == 3 else state[:, None],
            embodiment=self._embodiment(embodiment, batch),
            complete=host_all(token_mask),
        )

    def encode_prefix(self, prefix: Gr00tPrefix, last_hidden: bool = True) -> Gr00tCache:
        """Run language tower, adapter and state encoder, and the keys and values of every cross-attention.

        Args:
            prefix: From ``embed_prefix``.
            last_hidden: For the same call as in Pi 0.5; every layer of this tower is needed in any case.
        """
        return self.cache(prefix, self.action_head.adapt(self.backbone.features(prefix)))

    def cache(self, prefix: Gr00tPrefix, features: Tensor) -> Gr00tCache:
        """``encode_prefix`` of a prefix whose adapted features ``[B, T, feature_width]`` are known."""
        return Gr00tCache(
            contexts=self.expert.contexts(features),
            state_features=self.action_head.state_encoder(prefix.state, prefix.embodiment),
            pad_mask=prefix.pad_mask,
            embodiment=prefix.embodiment,
            last_hidden=features,
        )

    def condition(self, timestep: Tensor) -> TimeCondition:
        """What the action head reads of timesteps int64 ``[B]`` (or ``[1]`` for a whole batch)."""
        return TimeCondition(self.expert.modulations(timestep), action_time_features(timestep, self.config.dit.width))

    def velocity(self, x_t: Tensor, time: Tensor, cache: Gr00tCache) -> Tensor:
        """One evaluation of the action head.

        Args:
            x_t: float32 ``[B, H, A]``: ``(1 - t) * noise + t * actions``.
            time: Timestep int64 ``[B]``, ``trunc(timestep_buckets * t)``: 0 for noise.
            cache: From ``encode_prefix``.

        Returns:
            float32 ``[B, H, A]``; the training target is ``actions - noise``.
        """
        if torch.is_grad_enabled():
            # Training is under way, and not every optimizer counts its writes in the tensors' versions.
            self.forget_step_tables()
        return self.action_head.velocity(x_t, self.condition(time), cache)

    def sample_actions(
        self, prefix: Gr00tPrefix | Gr00tCache, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Tensor:
        """Integrate from noise to actions.

        Args:
            prefix: From ``embed_prefix`` or ``encode_prefix``.
            noise: float32 ``[B, H, A]``.
            num_steps: Euler steps. Each velocity runs inside ``denoise_step(index, num_steps)``.
            guide: Corrects every velocity, see ``models.flow.VelocityGuide``.

        Returns:
            float32 ``[B, H, A]``, not clipped.

        Raises:
            ValueError: If the noise does not fit the model, or ``num_steps`` is not positive.
        """
        expected = (prefix.pad_mask.shape[0], self.config.action_horizon, self.config.action_dim)
        check_sampling(noise, expected, num_steps)
        cache = self.encode_prefix(prefix) if isinstance(prefix, Gr00tPrefix) else prefix
        return deque(self.denoise(cache, noise, num_steps, guide), maxlen=1)[0].actions

    def denoise(
        self, cache: Gr00tCache, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Iterator[EulerStep]:
        """The steps of ``sample_actions``, one by one, with the same arguments."""
        conditions = self.step_conditions(num_steps)
        return integrate(
            noise, num_steps, 1.0 / num_steps, lambda x, i: self.action_head.velocity(x, conditions[i], cache), guide
        )

    def step_conditions(self, num_steps: int) -> tuple[TimeCondition, ...]:
        """``condition`` of every step, one row for the whole batch; kept until a weight changes (see StepTables)."""
        dit = self.expert
        sources = [dit.timestep_encoder, dit.proj_out_1, *(block.norm1 for block in dit.transformer_blocks)]
        return self._tables.get(num_steps, sources, lambda: self._step_conditions(num_steps))

    def forget_step_tables(self) -> None:
        """Forget what was kept per denoise step; needed only after a write through ``parameter.data``."""
        self._tables.clear()

    def train(self, mode: bool = True) -> Gr00tN15:
        """``nn.Module.train``; also forgets what was kept per denoise step."""
        self.forget_step_tables()
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """``nn.Module.load_state_dict`` that also takes the key list of official files (see canonical_state_dict)."""
        return super().load_state_dict(canonical_state_dict(state_dict), strict=strict, assign=assign)

    def _step_conditions(self, num_steps: int) -> tuple[TimeCondition, ...]:
        device = self.action_head.future_tokens.weight.device
        conditions = []
        for index, timestep in enumerate(euler_timesteps(num_steps, self.config.timestep_buckets)):
            with denoise_step(index, num_steps):
                conditions.append(self.condition(torch.tensor([timestep], device=device)))
        return tuple(conditions)

    def _embodiment(self, embodiment: Sequence[int] | int, batch: int) -> Embodiment:
        count = self.config.num_embodiments
        found = (embodiment,) * batch if isinstance(embodiment, int) else tuple(int(index) for index in embodiment)
        if len(found) != batch or not all(0 <= index < count for index in found):
            raise ValueError(f"embodiment is {found}; this model and batch need {batch} of 0..{count - 1}")
        return found


def canonical_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an official file under the names used here, unused ones dropped.

    LeRobot prefixes every name, and its files may have kept the token table under the name of the output head alone;
    only then does that name count. The two are never tied otherwise: official files hold unrelated tensors.
    """
    names = {name.removeprefix(LEROBOT_PREFIX): value for name, value in state_dict.items()}
    if LM_HEAD in names and TOKEN_TABLE not in names:
        names[TOKEN_TABLE] = names[LM_HEAD]
    return {name: value for name, value in names.items() if not name.startswith(UNUSED_PREFIXES)}


def euler_timesteps(num_steps: int, buckets: int) -> list[int]:
    """Timesteps at which the velocity is evaluated: 0 (noise) upwards, truncated as the official code does."""
    return [int(index / num_steps * buckets) for index in range(num_steps)]


class _Backbone(nn.Module):
    """Vision tower, projector and language tower under the official names."""

    def __init__(self, config: Gr00tConfig) -> None:
        super().__init__()
        self.eagle_model = _Eagle(config)
        self.eagle_linear = (
            nn.Linear(config.language.width, config.feature_width) if config.project_features else nn.Identity()
        )

    def features(self, prefix: Gr00tPrefix) -> Tensor:
        """``[B, T, feature_width]``."""
        tower = self.eagle_model.language_model.model
        return self.eagle_linear(tower(prefix.embeddings, prefix.pad_mask, prefix.complete))


class _Eagle(nn.Module):
    def __init__(self, config: Gr00tConfig) -> None:
        super().__init__()
        self.image_token_id = config.language.image_token_id
        self.vision_model = SiglipVision(config.vision)
        self.mlp1 = nn.Sequential(nn.Linear(config.vision.width, config.language.width))
        self.language_model = nn.Module()
        self.language_model.model = Qwen3Tower(config.language)

    def embed(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Token embeddings ``[B, T, width]``, image tokens replaced by the images' embeddings in order."""
        text = self.language_model.model.embed_tokens(tokens)
        at_image = tokens == self.image_token_id
        seen = self.mlp1(self.vision_model.encode(pixels)).flatten(0, 1).to(text.dtype)
        count = int(at_image.sum())
        if count != len(seen):
            raise ValueError(
                f"the prompts have {count} image tokens, the {len(pixels)} images make {len(seen)}; use the processor "
                "of this checkpoint"
            )
        return text.masked_scatter(at_image[..., None], seen)


class _ActionHead(nn.Module):
    def __init__(self, config: Gr00tConfig) -> None:
        super().__init__()
        width, count = config.dit.width, config.num_embodiments
        self.horizon = config.action_horizon
        self.model = DiT(config.dit, config.feature_width, config.hidden_size, config.interleave)
        self.state_encoder = EmbodimentMLP(count, config.state_dim, config.hidden_size, width)
        self.action_encoder = ActionEncoder(count, config.action_dim, width)
        self.action_decoder = EmbodimentMLP(count, config.hidden_size, config.hidden_size, config.action_dim)
        self.future_tokens = nn.Embedding(config.future_tokens, width)
        self.vlln, self.vl_self_attention = nn.Identity(), nn.Identity()
        if config.adapter is not None:
            self.vlln = FloatLayerNorm(config.feature_width, eps=LAYER_NORM_EPS)
            self.vl_self_attention = Adapter(config.adapter)
        self.position_embedding = nn.Embedding(config.max_positions, width) if config.max_positions else None

    def adapt(self, features: Tensor) -> Tensor:
        """Features ``[B, T, feature_width]`` as the diffusion transformer reads them."""
        return self.vl_self_attention(self.vlln(features))

    def tokens(self, x_t: Tensor, condition: TimeCondition, cache: Gr00tCache) -> Tensor:
        """State, future and action tokens ``[B, K + future + H, width]``."""
        actions = self.action_encoder(x_t, condition.action_features, cache.embodiment)
        if self.position_embedding is not None:
            actions = actions + self.position_embedding.weight[: x_t.shape[1]]
        future = self.future_tokens.weight.expand(x_t.shape[0], -1, -1)
        return torch.cat((cache.state_features, future, actions), dim=1)

    def velocity(self, x_t: Tensor, condition: TimeCondition, cache: Gr00tCache) -> Tensor:
        """float32 ``[B, H, A]``."""
        hidden = self.model(self.tokens(x_t, condition, cache), condition.modulations, cache.contexts)
        return self.action_decoder(hidden[:, -self.horizon :], cache.embodiment).float()

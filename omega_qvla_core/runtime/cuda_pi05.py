"""Pi 0.5 as a fixed sequence of kernels on static buffers: see ``cuda_engine`` for how it is replayed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels.triton_kernels import rows
from omega_qvla_core.kernels.triton_kernels.launch import padded_tokens
from omega_qvla_core.kernels.triton_kernels.launch_rows import Heads
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.kernels.triton_kernels.weights import weight_bytes
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.siglip import SiglipVision
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.runtime.cuda_expert import CudaExpert, Suffix, suffix_angles
from omega_qvla_core.runtime.cuda_layers import NormFactors, Workspace, large_product
from omega_qvla_core.runtime.cuda_prefix import CudaPrefix
from omega_qvla_core.runtime.cuda_sites import precision_name
from omega_qvla_core.runtime.cuda_vision import CudaVision
from omega_qvla_core.runtime.engine import EngineShape

# Prompts are padded to a multiple of this; keys past the prompt are masked.
_TEXT_STEP = 8


class CudaPi05:
    """The whole model.

    Args:
        model: On the device where it is to run.
        num_steps: Denoise steps.
        tuned: Block sizes.
        dtype: Of rows, keys and values, and unquantized weights.
        expand: Whether 4-bit weights of the prefix are kept as int8.

    Raises:
        EngineError: The kernels do not compute this model.
    """

    def __init__(self, model: Pi05, num_steps: int, tuned: Tuning, dtype: torch.dtype, expand: bool) -> None:
        config = model.config
        self.model, self.config, self.dtype, self.num_steps = model, config, dtype, num_steps
        heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        conditions = model.step_conditions(num_steps)
        self.step_size = -1.0 / num_steps
        self.vision = None
        if isinstance(model.vision, SiglipVision):
            self.vision = CudaVision(model.vision, tuned, dtype, expand)
            projector = model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear
            self.projector = large_product("projector", projector, tuned, dtype, expand)
            self.seen = NormFactors.of_layer_norm(model.vision.vision_model.post_layernorm, self.projector.unsmooth)
        self.prefix = CudaPrefix(
            model.language_model, heads, config.rms_norm_eps, config.rope_theta, tuned, dtype, expand
        )  # fmt: skip
        self.expert = CudaExpert(model, heads, conditions, tuned, dtype)
        self.precision = precision_name(self.prefix.bits + self.expert.bits)

    def shape(self, inputs: ModelInputs) -> EngineShape:
        """The bucket of one observation; waits for the GPU where masks lie there."""
        batch, length = inputs.tokens.shape
        if batch != 1:
            raise EngineError(f"it takes one observation at a time, not {batch}")
        present = int(torch.stack(tuple(inputs.image_masks)).sum())
        if present == 0 or (self.vision is None and present != len(inputs.images)):
            raise EngineError(f"{present} of {len(inputs.images)} cameras are there")
        text = int(inputs.token_mask.sum())
        return EngineShape(1, present, min(-(-max(text, 1) // _TEXT_STEP) * _TEXT_STEP, length), self.num_steps)

    def static(self, shape: EngineShape) -> Pi05Static:
        """Buffers for a shape."""
        return Pi05Static(self, shape)

    def weight_bytes(self) -> int:
        """Of the engine's own copies."""
        products = [*self.prefix.weights(), *self.expert.weights()]
        if self.vision is not None:
            products += [*self.vision.weights(), self.projector]
        return weight_bytes([one.weight for one in products]) + self.expert.table_bytes()


@dataclass
class _Inputs:
    images: Tensor
    tokens: Tensor
    state: Tensor | None


class Pi05Static:
    """Buffers of one shape, and the stages on them."""

    def __init__(self, plan: CudaPi05, shape: EngineShape) -> None:
        config, device = plan.config, plan.model.action_in_proj.weight.device
        self.plan, self.shape = plan, shape
        self.work = Workspace(device, plan.dtype)
        size = config.vision.image_size
        # The keypoint encoder alone reads the state.
        state = None if plan.vision is not None else torch.zeros(1, config.vision.state_dim, device=device)
        self.inputs = _Inputs(
            images=torch.zeros(shape.cameras, 3, size, size, device=device),
            tokens=torch.zeros(shape.text_tokens, dtype=torch.int64, device=device),
            state=state,
        )
        self.x_t = torch.zeros(config.action_horizon, config.action_dim, device=device)
        self.v_t = plan.expert.velocity_buffer(self.work)[: config.action_horizon, : config.action_dim]
        self.seen = self._vision_tokens()
        self.room = self.seen + shape.text_tokens
        self.keys = torch.full((1,), self.room, dtype=torch.int32, device=device)
        self._text_places = torch.arange(shape.text_tokens, device=device)
        self.embeddings = torch.zeros(self.room, config.lm_width, dtype=plan.dtype, device=device)
        width = 2 * config.num_kv_heads * config.head_dim
        room = self.room + padded_tokens(config.action_horizon)
        self.caches = [torch.zeros(room, width, dtype=plan.dtype, device=device) for _ in range(config.lm_depth)]
        half = config.head_dim // 2
        self.cos, self.sin = (torch.zeros(padded_tokens(config.action_horizon), half, device=device) for _ in "cs")

    def load(self, inputs: ModelInputs) -> None:
        """Copy one observation."""
        present = [image for image, mask in zip(inputs.images, inputs.image_masks) if bool(mask[0])]
        for place, image in zip(self.inputs.images, present):
            place.copy_(image[0])
        text = inputs.tokens[0][inputs.token_mask[0]]
        self.inputs.tokens.zero_()
        self.inputs.tokens[: len(text)] = text
        self.keys.fill_(self.seen + len(text))
        if self.inputs.state is not None:
            self.inputs.state.copy_(inputs.state)

    def vision(self) -> None:
        """Cameras and prompt to the prefix's embeddings."""
        plan = self.plan
        paligemma = plan.model.paligemma_with_expert.paligemma
        text = paligemma.lm_head(self.inputs.tokens) * math.sqrt(plan.config.lm_width)
        if plan.vision is None:
            there = (self._text_places < self.keys - self.seen)[None]
            present = torch.ones(1, dtype=torch.bool, device=there.device)
            images = [image[None] for image in self.inputs.images]
            seen, _ = paligemma.model.embed_cameras(
                images, [present] * len(images), text[None], there, self.inputs.state, False
            )  # fmt: skip
            self.embeddings[: self.seen] = seen[0].to(plan.dtype)
        else:
            tokens, pending = plan.vision.run(self.work, self.inputs.images)
            normed = plan.projector.normed(
                self.work, "seen in", tokens, rows.LAYER_NORM, plan.vision.eps, plan.seen, pending
            )  # fmt: skip
            plan.projector(normed, self.embeddings[: self.seen])
        self.embeddings[self.seen :] = text.to(plan.dtype)

    def prefix(self) -> None:
        """Embeddings to keys and values; positions of the chunk."""
        self._place_chunk()
        self._fill(self.caches)

    def prefix_and_first_step(self) -> None:
        """``prefix``, and beside it ``step(0)`` on a stream of its own: a layer waits for the keys of that layer only.

        One after the other where there are no streams (Triton's interpreter).
        """
        if not self.keys.is_cuda:
            self.prefix()
            self.step(0)
            return
        self._place_chunk()
        prefix, expert = torch.cuda.current_stream(), torch.cuda.Stream()
        expert.wait_stream(prefix)
        filled = [torch.cuda.Event() for _ in self.caches]

        def filling() -> Iterator[Tensor]:
            for cache, event in zip(self.caches, filled):
                yield cache
                event.record(prefix)

        def reading() -> Iterator[Tensor]:
            for cache, event in zip(self.caches, filled):
                expert.wait_event(event)
                yield cache

        self._fill(filling())
        filled[-1].record(prefix)  # nobody asked for another one
        with torch.cuda.stream(expert):
            self._velocity(0, reading())
        prefix.wait_stream(expert)

    def step(self, index: int) -> None:
        """``v_t`` of ``x_t`` at a denoise step."""
        self._velocity(index, self.caches)

    def _place_chunk(self) -> None:
        config = self.plan.config
        cos, sin = suffix_angles(self.keys, config.action_horizon, config.head_dim, config.rope_theta)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def _fill(self, caches: Iterable[Tensor]) -> None:
        x = self.work.buffer("prefix x", *self.embeddings.shape)
        x.copy_(self.embeddings)
        self.plan.prefix.run(self.work, x, self.keys, caches)

    def _velocity(self, step: int, caches: Iterable[Tensor]) -> None:
        suffix = Suffix(self.cos, self.sin, self.keys, self.room, caches)
        self.plan.expert.velocity(self.work, self.x_t, step, suffix)

    def bytes(self) -> int:
        """Of all buffers."""
        own = [self.inputs.images, self.embeddings, *self.caches]
        return self.work.bytes() + sum(one.numel() * one.element_size() for one in own)

    def _vision_tokens(self) -> int:
        config = self.plan.config.vision
        if self.plan.vision is None:
            return config.num_tokens
        return self.shape.cameras * config.num_patches

"""GR00T N1.5 as a fixed sequence of kernels on static buffers: see ``cuda_engine`` for how it is replayed.

An observation alone has no padding, and the model's action head would attend to it if it had. Prompts are therefore cut
to their own tokens, as the model's own ``drop_masked`` does, and room behind them is seen by nothing: the language
tower is causal, and the attention of adapter and transformer ends at the number of tokens that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels.triton_kernels import rows
from omega_qvla_core.kernels.triton_kernels.coding import Coding
from omega_qvla_core.kernels.triton_kernels.launch import padded_tokens
from omega_qvla_core.kernels.triton_kernels.launch_rows import Heads, attend, norm
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.kernels.triton_kernels.weights import weight_bytes
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.layers import QWEN3
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.runtime.cuda_blocks import EncoderLayer, LayerModules
from omega_qvla_core.runtime.cuda_dit import CudaDit, Features
from omega_qvla_core.runtime.cuda_layers import LargeProduct, NormFactors, Workspace, large_product
from omega_qvla_core.runtime.cuda_prefix import CudaPrefix, rms_factors
from omega_qvla_core.runtime.cuda_sites import SiteReader, precision_name
from omega_qvla_core.runtime.cuda_vision import CudaVision
from omega_qvla_core.runtime.engine import EngineShape

# Prompts get room for a multiple of this many words.
_TEXT_STEP = 8


class CudaGr00t:
    """The whole model.

    Args:
        model: On the device where it is to run.
        num_steps: Denoise steps.
        tuned: Block sizes.
        dtype: Of rows, keys and values, and unquantized weights. Rows of adapter and transformer are float32.
        expand: Whether 4-bit weights for many tokens are kept as int8.

    Raises:
        EngineError: The kernels do not compute this model.
    """

    def __init__(self, model: Gr00tN15, num_steps: int, tuned: Tuning, dtype: torch.dtype, expand: bool) -> None:
        config = model.config
        language, tower = config.language, model.language_model
        self.model, self.config, self.dtype, self.num_steps = model, config, dtype, num_steps
        self.step_size = 1.0 / num_steps
        self.vision = CudaVision(model.vision, tuned, dtype, expand)
        self._projector = large_product("projector", model.backbone.eagle_model.mlp1[0], tuned, dtype, expand)
        self._seen = NormFactors.of_layer_norm(model.vision.vision_model.post_layernorm, self._projector.unsmooth)
        self.heads = Heads(language.num_heads, language.num_kv_heads, language.head_dim)
        self.language = CudaPrefix(
            tower, self.heads, language.rms_norm_eps, language.rope_theta, tuned, dtype, expand, QWEN3, causal=True,
            complete=True,
        )  # fmt: skip
        self.adapter = _Adapter(model, tuned, dtype, expand)
        self.dit = CudaDit(model, model.step_conditions(num_steps), tuned, dtype, expand)
        self.precision = precision_name(self.language.bits + self.dit.bits)

    def shape(self, inputs: ModelInputs) -> EngineShape:
        """The bucket of one observation; waits for the GPU where masks lie there."""
        config, batch = self.config, inputs.tokens.shape[0]
        if batch != 1:
            raise EngineError(f"it takes one observation at a time, not {batch}")
        present = int(torch.stack(tuple(inputs.image_masks)).sum())
        prompt = inputs.tokens[inputs.token_mask]
        seen = int((prompt == config.language.image_token_id).sum())
        if present == 0 or seen != present * config.vision.num_patches:
            raise EngineError(f"{present} cameras are there, and {seen} image tokens in the prompt")
        if inputs.state is None or tuple(inputs.state.shape) != (1, config.state_dim):
            found = None if inputs.state is None else list(inputs.state.shape)
            raise EngineError(f"the state has shape {found}; it takes one of [1, {config.state_dim}]")
        if not 0 <= _embodiment(inputs) < config.num_embodiments:
            raise EngineError(f"there is no embodiment {_embodiment(inputs)}; there are {config.num_embodiments}")
        words = max(len(prompt) - seen, 1)
        return EngineShape(1, present, -(-words // _TEXT_STEP) * _TEXT_STEP, self.num_steps)

    def static(self, shape: EngineShape) -> Gr00tStatic:
        """Buffers for a shape."""
        return Gr00tStatic(self, shape)

    def weight_bytes(self) -> int:
        """Of the engine's own copies."""
        products = [*self.vision.weights(), *self.language.weights(), *self.adapter.weights(), *self.dit.weights()]
        return weight_bytes([one.weight for one in (*products, self._projector)]) + self.dit.table_bytes()

    def embed(self, work: Workspace, images: Tensor, out: Tensor) -> None:
        """Images ``[N, 3, size, size]`` to embeddings ``[N * patches, width]``."""
        tokens, pending = self.vision.run(work, images)
        normed = self._projector.normed(work, "seen in", tokens, rows.LAYER_NORM, self.vision.eps, self._seen, pending)
        self._projector(normed, out)


class _Adapter:
    """What lies between the language tower's last layer and the transformer: norms, projection, self-attention."""

    def __init__(self, model: Gr00tN15, tuned: Tuning, dtype: torch.dtype, expand: bool) -> None:
        config, head, tower_norm = model.config, model.action_head, model.language_model.norm
        self._eps, self._tuned, self.width = tower_norm.eps, tuned, config.feature_width
        self._projector = None
        if config.project_features:
            self._projector = large_product("projector", model.backbone.eagle_linear, tuned, dtype, expand)
        self._first = rms_factors(tower_norm, None if self._projector is None else self._projector.unsmooth)
        self._layers: list[EncoderLayer] = []
        if config.adapter is not None:
            self._norm, self._norm_eps = NormFactors.of_layer_norm(head.vlln, None), head.vlln.eps
            self._heads = Heads(config.adapter.num_heads, config.adapter.num_heads, config.adapter.head_dim)
            read = SiteReader(dtype)
            self._layers = [
                EncoderLayer(f"adapter layer {index}", _modules(block), read, tuned, expand)
                for index, block in enumerate(head.vl_self_attention.transformer_blocks)
            ]

    def weights(self) -> list[LargeProduct]:
        """All products."""
        products = [one for layer in self._layers for one in layer.products]
        return products if self._projector is None else [self._projector, *products]

    def run(self, work: Workspace, x: Tensor, keys: Tensor) -> Tensor:
        """Features ``[T, feature width]`` of the tower's rows ``[T, width]``, of which ``keys`` count."""
        features = work.buffer("features", x.shape[0], self.width)
        if self._projector is None:
            norm(x, features, None, Coding(), kind=rows.RMS_NORM, eps=self._eps, mul=self._first.mul)
        else:
            normed = self._projector.normed(work, "features in", x, rows.RMS_NORM, self._eps, self._first)
            self._projector(normed, features)
        if not self._layers:
            return features
        adapted = work.buffer("adapted", *features.shape, dtype=torch.float32)
        factors = self._norm
        norm(
            features, adapted, None, Coding(), kind=rows.LAYER_NORM, eps=self._norm_eps, mul=factors.mul,
            add=factors.add,
        )  # fmt: skip
        pending = None
        for layer in self._layers:
            pending = layer.run(work, adapted, lambda qkv: self._attention(work, qkv, keys), pending)
        return adapted if pending is None else adapted.add_(pending[: self.width])

    def _attention(self, work: Workspace, qkv: Tensor, keys: Tensor) -> Tensor:
        tokens, width = qkv.shape[0], self.width
        mixed = work.buffer("adapter attention", tokens, width)
        attend(
            qkv, qkv[:, width:], qkv[:, 2 * width :], keys, mixed, self._heads, tokens, most_keys=tokens,
            blocks=self._tuned.attention,
        )  # fmt: skip
        return mixed


def _modules(block: nn.Module) -> LayerModules:
    attention, ff = block.attn1, block.ff.net
    qkv = attention.to_q, attention.to_k, attention.to_v
    return LayerModules(block.norm1, qkv, attention.to_out[0], block.norm3, ff[0].proj, ff[2])


@dataclass(frozen=True)
class _Inputs:
    """One observation, and where image embeddings go."""

    images: Tensor
    tokens: Tensor
    image_places: Tensor
    state: Tensor


class Gr00tStatic:
    """Buffers of one shape, and the stages on them."""

    def __init__(self, plan: CudaGr00t, shape: EngineShape) -> None:
        config, device = plan.config, plan.model.action_head.future_tokens.weight.device
        self.plan, self.shape = plan, shape
        self.work = Workspace(device, plan.dtype)
        size, seen = config.vision.image_size, shape.cameras * config.vision.num_patches
        self.room = seen + shape.text_tokens
        self.inputs = _Inputs(
            images=torch.zeros(shape.cameras, 3, size, size, device=device),
            tokens=torch.zeros(self.room, dtype=torch.int64, device=device),
            image_places=torch.arange(seen, device=device),
            state=torch.zeros(1, config.state_dim, device=device),
        )
        self.x_t = torch.zeros(config.action_horizon, config.action_dim, device=device)
        self.v_t = plan.dit.velocity_buffer(self.work)[: config.action_horizon, : config.action_dim]
        self.seen = torch.zeros(seen, config.language.width, dtype=plan.dtype, device=device)
        self.embeddings = torch.zeros(self.room, config.language.width, dtype=plan.dtype, device=device)
        # Keys and values of the language tower are read within their layer only.
        width = 2 * plan.heads.kv * plan.heads.dim
        self.cache = torch.zeros(self.room, width, dtype=plan.dtype, device=device)
        dit = plan.dit
        self.features = Features(
            tokens=torch.zeros(padded_tokens(dit.tokens), dit.width, device=device),
            own=torch.full((1,), dit.tokens, dtype=torch.int32, device=device),
            keys=torch.full((1,), self.room, dtype=torch.int32, device=device),
            contexts=dit.context_buffers(self.room, plan.dtype, device),
        )
        self.features.tokens[dit.actions + 1 : dit.tokens] = plan.model.action_head.future_tokens.weight

    def load(self, inputs: ModelInputs) -> None:
        """Copy one observation."""
        self.plan.dit.embodiment.choose(_embodiment(inputs))
        present = [image for image, mask in zip(inputs.images, inputs.image_masks) if bool(mask[0])]
        for place, image in zip(self.inputs.images, present):
            place.copy_(image[0])
        prompt = inputs.tokens[inputs.token_mask]
        self.inputs.tokens.zero_()
        self.inputs.tokens[: len(prompt)] = prompt
        self.inputs.image_places.copy_((prompt == self.plan.config.language.image_token_id).nonzero()[:, 0])
        self.features.keys.fill_(len(prompt))
        self.inputs.state.copy_(inputs.state)

    def vision(self) -> None:
        """Cameras and prompt to the prefix's embeddings."""
        self.plan.embed(self.work, self.inputs.images, self.seen)
        self.embeddings.copy_(self.plan.model.language_model.embed_tokens(self.inputs.tokens))
        self.embeddings.index_copy_(0, self.inputs.image_places, self.seen)

    def prefix(self) -> None:
        """Embeddings to keys and values of every cross-attention; state and places of the chunk's tokens."""
        plan, work, features = self.plan, self.work, self.features
        x = work.buffer("prefix x", *self.embeddings.shape)
        x.copy_(self.embeddings)
        plan.language.run(work, x, features.keys, [self.cache] * plan.config.language.depth)
        plan.dit.contexts(work, plan.adapter.run(work, x, features.keys), features.contexts)
        actions, embodiment = plan.dit.actions, plan.dit.embodiment
        features.tokens[:actions].copy_(embodiment.places)
        features.tokens[actions : actions + 1].copy_(embodiment.state_token(self.inputs.state))

    def prefix_and_first_step(self) -> None:
        """One after the other: a step begins with what the prefix ends with."""
        self.prefix()
        self.step(0)

    def step(self, index: int) -> None:
        """``v_t`` of ``x_t`` at a denoise step."""
        self.plan.dit.velocity(self.work, self.x_t, index, self.features)

    def bytes(self) -> int:
        """Of all buffers."""
        contexts = [one for one in self.features.contexts if one is not None]
        own = [self.inputs.images, self.seen, self.embeddings, self.cache, self.features.tokens, *contexts]
        return self.work.bytes() + sum(one.numel() * one.element_size() for one in own)


def _embodiment(inputs: ModelInputs) -> int:
    return 0 if inputs.embodiment is None else inputs.embodiment[0]

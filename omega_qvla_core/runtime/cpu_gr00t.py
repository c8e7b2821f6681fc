"""GR00T N1.5 on a CPU for one observation of a fixed prefix length and one embodiment, over fixed buffers.

Language tower, adapter, state encoder, and the keys and values of every cross-attention run once per observation.
Constant over observations, and made with the plan, are the modulations of every block and step and what the action
encoder makes of the timestep. There are no masks but the language tower's causal one: one observation without padding
needs none. ``cpu_tower`` and ``cpu_head`` say what the layers save, ``embodiment_weights`` which linears are multiplied
out.

Results are those of the model up to float32 rounding. In quantized models that can move an activation code that lies
between two values, and with it the outputs by a part of a quantization step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.models.gr00t_dit import DiT
from omega_qvla_core.models.gr00t_n15 import Gr00tN15, Gr00tPrefix, TimeCondition
from omega_qvla_core.runtime.cpu_head import BlockWeights, HeadLayer, Norm
from omega_qvla_core.runtime.cpu_linear import Product, merge
from omega_qvla_core.runtime.cpu_plan import Plan, check_steps
from omega_qvla_core.runtime.cpu_tower import Cache, Layer, LayerWeights, State, plain_norm, plain_norms, turns
from omega_qvla_core.runtime.embodiment_weights import EmbodimentWeights


@dataclass(frozen=True)
class Gr00tWeights:
    """Products of all linears that run in a plan."""

    language: tuple[LayerWeights, ...]
    project: Product | None
    adapter: tuple[BlockWeights, ...]
    blocks: tuple[BlockWeights, ...]
    _embodiments: dict[int, EmbodimentWeights] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Gr00tN15) -> Gr00tWeights:
        """Read a model."""
        project = model.backbone.eagle_linear
        return cls(
            tuple(LayerWeights.of(one, False) for one in model.language_model.layers),
            None if isinstance(project, nn.Identity) else merge([project], [None]),
            tuple(BlockWeights.of(one) for one in _adapter_blocks(model)),
            tuple(BlockWeights.of(one) for one in model.expert.transformer_blocks),
        )

    def embodiment(self, model: Gr00tN15, index: int) -> EmbodimentWeights:
        """An embodiment's, read when a plan first asks for them."""
        if index not in self._embodiments:
            self._embodiments[index] = EmbodimentWeights.of(model.action_head, index, torch.float32)
        return self._embodiments[index]

    def copied_bytes(self) -> int:
        """Bytes besides the model's own."""
        parts = [*self.language, *self.adapter, *self.blocks, *self._embodiments.values()]
        if self.project is not None:
            parts.append(self.project)
        return sum(one.copied_bytes() for one in parts)


class Gr00tShape(NamedTuple):
    """What a plan is made for: T prompt tokens (images included), K state tokens, and the embodiment."""

    prompt_tokens: int
    state_tokens: int
    embodiment: int


class Gr00tPlan(Plan):
    """See ``Plan``.

    Args:
        model: Read for norms, encoders and step tables; its linears come from ``weights``.
        weights: Of the model.
        shape: Of the prefix.
        num_steps: Denoise steps.

    Raises:
        StepContextError: A quantized site has tables for another number of steps.
        QuantizationError: A pack does not hold the embodiment.
    """

    def __init__(self, model: Gr00tN15, weights: Gr00tWeights, shape: Gr00tShape, num_steps: int) -> None:
        _check_steps(model, num_steps)
        super().__init__(num_steps, 1.0 / num_steps)
        self._build_prefix(model, weights, shape.prompt_tokens)
        self._build_transformer(model, weights, shape)
        self._embodiment = weights.embodiment(model, shape.embodiment)
        self._build_constants(model, num_steps)

    @staticmethod
    def shape_of(prefix: Gr00tPrefix) -> Gr00tShape:
        return Gr00tShape(prefix.embeddings.shape[1], prefix.state.shape[1], prefix.embodiment[0])

    def encode(self, prefix: Gr00tPrefix) -> None:
        """Fill the keys and values of the features, and the state's tokens."""
        self._language_state.x.copy_(prefix.embeddings[0])
        for layer, norms in zip(self._language, self._language_norms):
            layer.run(0, norms)
        features = self._language_state.normed(self._language_end)
        if self._project is not None:
            features = self._project(features, 0)
        # Not in the memory of products, where keys and values of the same size would be written over them.
        self._features.copy_(features if self._adapter_start is None else self._adapter_start(features))
        for layer, norm in zip(self._adapter, self._adapter_norms):
            layer.run(0, norm)
        for layer in self._readers:
            layer.write_context(self._features)
        self._state_tokens.copy_(self._state_encoder(prefix.state, prefix.embodiment)[0])

    def velocity(self, x_t: Tensor, index: int) -> Tensor:
        one = self._embodiment
        hidden = torch.addmm(self._encoder_bias[index], x_t, one.actions[0])
        self._before.copy_(self._start)
        torch.addmm(self._positions, F.silu(hidden, inplace=True), one.tokens[0], out=self._chunk)
        for layer, norm in zip(self._blocks, self._norms[index]):
            layer.run(index, norm)
        hidden = torch.addmm(one.hidden[1], self._final[index](self._chunk), one.hidden[0]).relu_()
        return torch.addmm(one.out[1], hidden, one.out[0])

    def _build_prefix(self, model: Gr00tN15, weights: Gr00tWeights, tokens: int) -> None:
        config, tower, buffers = model.config.language, model.language_model, self.buffers
        self._language_state = State(tokens, config.width, buffers)
        # Nothing reads a layer's keys and values after it: all of them use the same memory.
        shape = (config.num_kv_heads, tokens, config.head_dim)
        cache = Cache(buffers.get("keys", *shape), buffers.get("values", *shape), 0, tokens)
        angles = turns(tokens, config.head_dim, config.rope_theta)
        self._language = [
            Layer(block, one, self._language_state, cache, angles, buffers, causal=True)
            for block, one in zip(tower.layers, weights.language)
        ]
        self._language_norms = [plain_norms(block) for block in tower.layers]
        self._language_end = plain_norm(tower.norm)
        self._project = None if weights.project is None else weights.project.bind(tokens, buffers)
        self._features = buffers.own(tokens, model.config.feature_width)
        blocks, self._adapter_start = _adapter_blocks(model), None
        if model.config.adapter is not None:
            self._adapter_start = Norm.of(model.action_head.vlln)
        self._adapter = [
            HeadLayer(block, one, self._features, 0, tokens, buffers) for block, one in zip(blocks, weights.adapter)
        ]
        self._adapter_norms = [Norm.of(block.norm1) for block in blocks]

    def _build_transformer(self, model: Gr00tN15, weights: Gr00tWeights, shape: Gr00tShape) -> None:
        config, head, buffers = model.config, model.action_head, self.buffers
        before, horizon = shape.state_tokens + config.future_tokens, config.action_horizon
        x = buffers.own(before + horizon, config.dit.width)
        self._before, self._chunk = x[:before], x[before:]
        self._start = buffers.own(before, config.dit.width)
        self._state_tokens = self._start[: shape.state_tokens]
        self._start[shape.state_tokens :].copy_(head.future_tokens.weight)
        self._state_encoder = head.state_encoder
        blocks = model.expert.transformer_blocks
        # After the last block the actions' tokens alone are read.
        read = [len(x)] * (len(blocks) - 1) + [horizon]
        self._blocks = [
            HeadLayer(block, one, x, shape.prompt_tokens, rows, buffers)
            for block, one, rows in zip(blocks, weights.blocks, read)
        ]
        self._readers = [layer for layer, block in zip(self._blocks, blocks) if block.attends_to_features]

    def _build_constants(self, model: Gr00tN15, num_steps: int) -> None:
        conditions, one = model.step_conditions(num_steps), self._embodiment
        self._encoder_bias = [one.step_bias(condition.action_features)[0] for condition in conditions]
        self._norms = [_block_norms(condition, model.expert) for condition in conditions]
        self._final = [_final_norm(condition, model.expert) for condition in conditions]
        self._positions = one.token_bias(model.action_head.position_embedding, model.config.action_horizon)


def _adapter_blocks(model: Gr00tN15) -> list[nn.Module]:
    return [] if model.config.adapter is None else list(model.action_head.vl_self_attention.transformer_blocks)


def _block_norms(condition: TimeCondition, dit: DiT) -> list[Norm]:
    """First norms of all blocks: scale, then shift."""
    norms = []
    for modulation, block in zip(condition.modulations, dit.transformer_blocks):
        scale, shift = modulation[0, 0].float().chunk(2)
        norms.append(Norm(1.0 + scale, shift.clone(), block.norm1.norm.eps))
    return norms


def _final_norm(condition: TimeCondition, dit: DiT) -> Norm:
    """Shift, then scale: the opposite of the blocks."""
    shift, scale = condition.modulations[-1][0, 0].float().chunk(2)
    return Norm(1.0 + scale, shift.clone(), dit.norm_out.eps)


def _check_steps(model: Gr00tN15, num_steps: int) -> None:
    """Keys and values of the features run outside the denoise loop, the rest of the transformer in it."""
    head = model.action_head
    check_steps([model.language_model, model.backbone.eagle_linear, head.vl_self_attention], 0)
    for block in model.expert.transformer_blocks:
        attention = block.attn1
        once = [attention.to_k, attention.to_v] if block.attends_to_features else []
        check_steps(once, 0)
        in_loop = [attention.to_q, attention.to_out, block.ff]
        check_steps(in_loop if once else [*in_loop, attention.to_k, attention.to_v], num_steps)

"""Pi 0.5 on a CPU for one observation of a fixed prefix length: language tower and action expert over fixed buffers.

What is saved against the model's own code: q/k/v and gate/up are one product each; a norm is one operator (a LayerNorm
over ``[x, -x]``, whose mean is zero and whose variance is the mean square); rotary positions are one complex product,
for which the rows of query and key weights are laid out in pairs; keys and values are written where the next attention
reads them; modulations, positions and angles are constants. There are no masks: one observation without padding needs
none.

Results are those of the model up to float32 rounding. In quantized models that can move an activation code that lies
between two values, and with it the outputs by a part of a quantization step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.errors import StepContextError
from omega_qvla_core.models.layers import AdaRMSNorm, Block, RMSNorm, rotary_angles
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.runtime.cpu_buffers import Buffers
from omega_qvla_core.runtime.cpu_linear import Product, merge
from omega_qvla_core.runtime.engine import VelocityGuide


@dataclass(frozen=True)
class LayerWeights:
    """Products of one layer, for any number of tokens; ``keys_values`` alone for a layer that stops there."""

    qkv: Product
    keys_values: Product
    out: Product
    gate_up: Product
    down: Product

    @classmethod
    def of(cls, block: Block, last: bool) -> LayerWeights:
        """Read a layer; ``last`` makes the product of keys and values alone."""
        attention, mlp = block.self_attn, block.mlp
        queries = _paired_rows(attention.num_heads, attention.head_dim)
        keys = _paired_rows(attention.num_kv_heads, attention.head_dim)
        qkv = merge([attention.q_proj, attention.k_proj, attention.v_proj], [queries, keys, None])
        return cls(
            qkv,
            merge([attention.k_proj, attention.v_proj], [keys, None]) if last else qkv,
            merge([attention.o_proj], [None]),
            merge([mlp.gate_proj, mlp.up_proj], [None, None]),
            merge([mlp.down_proj], [None]),
        )

    def copied_bytes(self) -> int:
        """See ``Product``."""
        products = {id(one): one for one in (self.qkv, self.keys_values, self.out, self.gate_up, self.down)}
        return sum(one.copied_bytes() for one in products.values())


@dataclass(frozen=True)
class Pi05Weights:
    """Products of both towers."""

    language: tuple[LayerWeights, ...]
    expert: tuple[LayerWeights, ...]

    @classmethod
    def of(cls, model: Pi05) -> Pi05Weights:
        """Read a model."""
        layers = model.language_model.layers
        language = tuple(LayerWeights.of(one, one is layers[-1]) for one in layers)
        return cls(language, tuple(LayerWeights.of(one, False) for one in model.expert.layers))

    def copied_bytes(self) -> int:
        """Bytes besides the model's own."""
        return sum(one.copied_bytes() for one in (*self.language, *self.expert))


class Pi05Plan:
    """All that runs after the prefix is embedded, for one observation.

    Args:
        model: Read for norms, projections and step tables; its linears come from ``weights``.
        weights: Of the model.
        prefix_tokens: P.
        num_steps: Denoise steps.

    Raises:
        StepContextError: A quantized site has tables for another number of steps.
    """

    def __init__(self, model: Pi05, weights: Pi05Weights, prefix_tokens: int, num_steps: int) -> None:
        _check_steps(model, num_steps)
        config = model.config
        self.num_steps, self.step_size = num_steps, float(np.float32(-1.0 / num_steps))
        self.buffers = Buffers()
        kv_shape = (config.num_kv_heads, prefix_tokens + config.action_horizon, config.head_dim)
        self._keys = [torch.zeros(kv_shape) for _ in weights.language]
        self._values = [torch.zeros(kv_shape) for _ in weights.language]
        positions = torch.arange(prefix_tokens + config.action_horizon)[None]
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta)
        angles = torch.complex(cos[0, 0], sin[0, 0])[:, None]
        self._prefix_state = State(prefix_tokens, config.lm_width)
        self._chunk_state = State(config.action_horizon, config.expert_width)
        layers = zip(model.language_model.layers, weights.language, self._keys, self._values)
        self._language = [
            _Layer(block, one, self._prefix_state, Cache(key, value, 0, prefix_tokens), angles, self.buffers)
            for block, one, key, value in layers
        ]
        layers = zip(model.expert.layers, weights.expert, self._keys, self._values)
        self._expert = [
            _Layer(block, one, self._chunk_state, Cache(key, value, prefix_tokens, kv_shape[1]), angles, self.buffers)
            for block, one, key, value in layers
        ]
        self._prefix_norms = [_plain_norms(block) for block in model.language_model.layers]
        conditions = model.step_conditions(num_steps)
        self._modulations = [
            [tuple(Modulation.of(one, norm.eps) for one, norm in zip(pair, _norms(block))) for pair, block in pairs]
            for pairs in (list(zip(condition.layers, model.expert.layers)) for condition in conditions)
        ]
        self._final = [Modulation.of(condition.final, model.expert.norm.eps) for condition in conditions]
        self._project_in, self._project_out = model.action_in_proj, model.action_out_proj

    def bytes(self) -> int:
        """Size of all buffers."""
        kept = [*self._keys, *self._values, self._prefix_state.mirrored, self._chunk_state.mirrored]
        return self.buffers.bytes() + sum(one.numel() * one.element_size() for one in kept)

    def encode(self, embeddings: Tensor) -> None:
        """Fill the keys and values from embeddings ``[P, lm_width]``."""
        self._prefix_state.x.copy_(embeddings)
        for layer, norms in zip(self._language[:-1], self._prefix_norms):
            layer.run(0, norms)
        self._language[-1].write_keys_values(self._prefix_norms[-1][0])

    def denoise(self, noise: Tensor, guide: VelocityGuide | None = None) -> Tensor:
        """Actions ``[H, A]`` from noise ``[H, A]``, after ``encode``; a new tensor."""
        x_t = noise.clone()
        for index in range(self.num_steps):
            with denoise_step(index, self.num_steps):
                v_t = self._velocity(x_t, index)
            if guide is not None:
                sign = -1.0 if self.step_size < 0 else 1.0
                v_t = sign * guide(x_t[None], (sign * v_t)[None], index / self.num_steps)[0]
            x_t.add_(v_t, alpha=self.step_size)
        return x_t

    def _velocity(self, x_t: Tensor, index: int) -> Tensor:
        state = self._chunk_state
        torch.addmm(self._project_in.bias, x_t, self._project_in.weight.t(), out=state.x)
        for layer, modulation in zip(self._expert, self._modulations[index]):
            layer.run(index, modulation)
        hidden = state.normed(self._final[index])
        return torch.addmm(self._project_out.bias, hidden, self._project_out.weight.t())


class State:
    """The residual stream ``x [M, width]``, in a buffer ``[M, 2 * width]`` beside its negative."""

    def __init__(self, tokens: int, width: int) -> None:
        self.tokens, self.width = tokens, width
        self.mirrored = torch.zeros(tokens, 2 * width)
        self.x, self._negative = self.mirrored.split(width, dim=1)

    def normed(self, modulation: Modulation) -> Tensor:
        """``x / rms(x) * scale + shift``, ``[M, width]``."""
        torch.neg(self.x, out=self._negative)
        both = F.layer_norm(self.mirrored, (2 * self.width,), modulation.scale, modulation.shift, modulation.eps)
        return both[:, : self.width]


@dataclass(frozen=True)
class Modulation:
    """What a norm multiplies with and adds, each ``[2 * width]`` (the second half is for the negative and not read).

    Attributes:
        scale: Factor.
        shift: Summand, or None.
        eps: Epsilon of the norm.
        gate: ``[width]`` for the update after it, or None.
    """

    scale: Tensor
    shift: Tensor | None
    eps: float
    gate: Tensor | None = None

    @classmethod
    def of(cls, modulation: Tensor, eps: float) -> Modulation:
        """From an adaptive norm's ``[1, 1, 3 * width]``."""
        scale, shift, gate = modulation[0, 0].float().chunk(3)
        return cls((1.0 + scale).repeat(2), shift.repeat(2), eps, gate.clone())


@dataclass(frozen=True)
class Cache:
    """Keys and values ``[kv heads, S, head_dim]``; a layer writes tokens ``start`` to ``stop`` and sees all before."""

    keys: Tensor
    values: Tensor
    start: int
    stop: int


class _Layer:
    """A transformer layer over fixed buffers."""

    def __init__(
        self, block: Block, weights: LayerWeights, state: State, cache: Cache, angles: Tensor, buffers: Buffers
    ) -> None:
        attention, tokens = block.self_attn, state.tokens
        self._state, self._last = state, weights.keys_values
        self._heads, self._kv_heads, self._head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self._qkv, self._keys_values = (one.bind(tokens, buffers) for one in (weights.qkv, weights.keys_values))
        self._out, self._down = weights.out.bind(tokens, buffers), weights.down.bind(tokens, buffers)
        self._gate_up, self._mlp_dim = weights.gate_up.bind(tokens, buffers), weights.gate_up.outputs // 2
        self._angles = angles[cache.start : cache.stop]
        queries = buffers.get("queries", self._heads, tokens, self._head_dim)
        self._query_place = _complex(queries).transpose(0, 1)
        # The query heads of one key head are rows of one longer sequence: see models.layers.Attention.
        self._queries = queries.view(1, self._kv_heads, -1, self._head_dim)
        self._key_place = _complex(cache.keys[:, cache.start : cache.stop]).transpose(0, 1)
        self._value_place = cache.values[:, cache.start : cache.stop].transpose(0, 1)
        self._seen_keys, self._seen_values = cache.keys[None, :, : cache.stop], cache.values[None, :, : cache.stop]
        self._mixed = buffers.get("mixed", tokens, self._heads * self._head_dim)
        self._mixed_heads = self._mixed.view(tokens, self._heads, self._head_dim).transpose(0, 1)
        self._hidden = buffers.get("hidden", tokens, self._mlp_dim)

    def run(self, step: int, modulations: tuple[Modulation, Modulation]) -> None:
        """Update the state; ``step`` is the denoise step, 0 in the language tower."""
        before, after = modulations
        heads = self._qkv(self._state.normed(before), step).view(self._state.tokens, -1, self._head_dim)
        torch.mul(_complex(heads[:, : self._heads]), self._angles, out=self._query_place)
        self._write(heads[:, self._heads :])
        mixed = F.scaled_dot_product_attention(self._queries, self._seen_keys, self._seen_values)
        self._mixed_heads.copy_(mixed.view(self._heads, self._state.tokens, self._head_dim))
        self._update(self._out(self._mixed, step), before.gate)
        gate_up = self._gate_up(self._state.normed(after), step)
        torch.ops.aten.gelu.out(gate_up[:, : self._mlp_dim], approximate="tanh", out=self._hidden)
        self._hidden.mul_(gate_up[:, self._mlp_dim :])
        self._update(self._down(self._hidden, step), after.gate)

    def write_keys_values(self, modulation: Modulation) -> None:
        """Keys and values alone, all that is needed of the last language layer."""
        out = self._keys_values(self._state.normed(modulation), 0)
        self._write(out.view(self._state.tokens, -1, self._head_dim))

    def _write(self, heads: Tensor) -> None:
        torch.mul(_complex(heads[:, : self._kv_heads]), self._angles, out=self._key_place)
        self._value_place.copy_(heads[:, self._kv_heads :])

    def _update(self, update: Tensor, gate: Tensor | None) -> None:
        if gate is None:
            self._state.x.add_(update)
        else:
            self._state.x.addcmul_(update, gate)


def _check_steps(model: Pi05, num_steps: int) -> None:
    """As each site would when it runs (see ``QuantizedSite``)."""
    for tower, steps in ((model.language_model, 0), (model.expert, num_steps)):
        for site in quantized_sites(tower):
            if site.spec.steps not in (0, steps):
                raise StepContextError(
                    f"{site.spec.name} was calibrated for {site.spec.steps} denoise steps but runs with {steps}; use "
                    "the calibrated number or quantize again"
                )


def _norms(block: Block) -> tuple[nn.Module, nn.Module]:
    return block.input_layernorm, block.post_attention_layernorm


def _plain_norms(block: Block) -> tuple[Modulation, Modulation]:
    before, after = (_plain_norm(one) for one in _norms(block))
    return before, after


def _plain_norm(norm: RMSNorm | AdaRMSNorm) -> Modulation:
    scale = 1.0 + norm.weight.detach().float() if norm.unit_offset else norm.weight.detach().float()
    return Modulation(scale.repeat(2), None, norm.eps)


def _paired_rows(heads: int, head_dim: int) -> Tensor:
    """Rows of a query or key weight such that the two numbers that rotary positions mix lie side by side."""
    pairs = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    return (torch.arange(heads)[:, None] * head_dim + pairs).reshape(-1)


def _complex(values: Tensor) -> Tensor:
    """``[..., head_dim]`` in pairs -> complex ``[..., head_dim / 2]``, a view."""
    return torch.view_as_complex(values.unflatten(-1, (-1, 2)))

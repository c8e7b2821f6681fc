"""Pi 0.5 on a CPU for one observation of a fixed prefix length: language tower and action expert over fixed buffers.

Modulations, positions and angles are constants; ``cpu_tower`` says what its layers save. There are no masks: one
observation without padding needs none.

Results are those of the model up to float32 rounding. In quantized models that can move an activation code that lies
between two values, and with it the outputs by a part of a quantization step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_prefix import Prefix
from omega_qvla_core.runtime.cpu_plan import Plan, check_steps
from omega_qvla_core.runtime.cpu_tower import Cache, Layer, LayerWeights, Modulation, State, plain_norms, turns


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


class Pi05Plan(Plan):
    """See ``Plan``.

    Args:
        model: Read for norms, projections and step tables; its linears come from ``weights``.
        weights: Of the model.
        prefix_tokens: P.
        num_steps: Denoise steps.

    Raises:
        StepContextError: A quantized site has tables for another number of steps.
    """

    def __init__(self, model: Pi05, weights: Pi05Weights, prefix_tokens: int, num_steps: int) -> None:
        check_steps([model.language_model], 0)
        check_steps([model.expert], num_steps)
        super().__init__(num_steps, float(np.float32(-1.0 / num_steps)))
        config = model.config
        tokens = prefix_tokens + config.action_horizon
        kv_shape = (config.num_kv_heads, tokens, config.head_dim)
        kept = [(self.buffers.own(*kv_shape), self.buffers.own(*kv_shape)) for _ in weights.language]
        angles = turns(tokens, config.head_dim, config.rope_theta)
        self._prefix_state = State(prefix_tokens, config.lm_width, self.buffers)
        self._chunk_state = State(config.action_horizon, config.expert_width, self.buffers)
        self._language = [
            Layer(block, one, self._prefix_state, Cache(*pair, 0, prefix_tokens), angles, self.buffers)
            for block, one, pair in zip(model.language_model.layers, weights.language, kept)
        ]
        self._expert = [
            Layer(block, one, self._chunk_state, Cache(*pair, prefix_tokens, tokens), angles, self.buffers)
            for block, one, pair in zip(model.expert.layers, weights.expert, kept)
        ]
        self._prefix_norms = [plain_norms(block) for block in model.language_model.layers]
        conditions = model.step_conditions(num_steps)
        eps = config.rms_norm_eps
        self._modulations = [
            [(Modulation.of(before, eps), Modulation.of(after, eps)) for before, after in condition.layers]
            for condition in conditions
        ]
        self._final = [Modulation.of(condition.final, eps) for condition in conditions]
        self._project_in, self._project_out = model.action_in_proj, model.action_out_proj

    @staticmethod
    def shape_of(prefix: Prefix) -> int:
        return prefix.embeddings.shape[1]

    def encode(self, prefix: Prefix) -> None:
        """Fill the keys and values."""
        self._prefix_state.x.copy_(prefix.embeddings[0])
        for layer, norms in zip(self._language[:-1], self._prefix_norms):
            layer.run(0, norms)
        self._language[-1].write_keys_values(self._prefix_norms[-1][0])

    def velocity(self, x_t: Tensor, index: int) -> Tensor:
        state = self._chunk_state
        torch.addmm(self._project_in.bias, x_t, self._project_in.weight.t(), out=state.x)
        for layer, modulation in zip(self._expert, self._modulations[index]):
            layer.run(index, modulation)
        hidden = state.normed(self._final[index])
        return torch.addmm(self._project_out.bias, hidden, self._project_out.weight.t())

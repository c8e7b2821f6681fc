"""State encoder, action encoder and action decoder of GR00T N1.5 on a GPU, for the embodiment in use.

Which linears are one product is in ``embodiment_weights``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels.triton_kernels import numerics
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT, round_up
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.gr00t_embodiment import EmbodimentLinear
from omega_qvla_core.models.gr00t_n15 import Gr00tN15, TimeCondition
from omega_qvla_core.runtime.cuda_layers import ActivatedInto, SmallProduct
from omega_qvla_core.runtime.cuda_sites import FloatSite
from omega_qvla_core.runtime.embodiment_weights import EmbodimentWeights


class CudaEmbodiment:
    """Weights of the embodiment in use, at fixed addresses, which a graph needs.

    Args:
        model: A ``Gr00tN15``.
        conditions: ``model.step_conditions(num_steps)``.
        tuned: Block sizes.
        dtype: Of weights.

    Attributes:
        encoder: Per denoise step: actions to the operand of ``action``.
        action: To tokens, without what ``places`` has.
        places: float32 ``[H, width]``: what is added to the tokens whatever the actions are.
        decoder: Rows after the transformer's last norm to the operand of ``velocity``.
        velocity: To velocities.

    Raises:
        EngineError: A weight is quantized.
    """

    def __init__(self, model: Gr00tN15, conditions: Sequence[TimeCondition], tuned: Tuning, dtype: torch.dtype) -> None:
        self._head, self._dtype = model.action_head, dtype
        self._times = torch.cat([one.action_features for one in conditions]).double()
        self._index = 0
        found = self._read(0)
        self.places = self._places(found).float()
        self._step_bias = self._padded_step_bias(found)
        self._state = [one.detach().to(dtype, copy=True) for one in self._state_weights(0)]
        into, self.action, decoder, self.velocity = self._products = [
            SmallProduct(site.input, site.small(), tuned) for site in self._sites(found)
        ]
        self.encoder = tuple(
            ActivatedInto("action hidden", into.with_bias(bias), self.action, numerics.SILU) for bias in self._step_bias
        )
        self.decoder = ActivatedInto("decoder hidden", decoder, self.velocity, numerics.RELU)

    def choose(self, index: int) -> None:
        """Take the weights of an embodiment, for the graphs launched afterwards; does nothing if they are here."""
        if index == self._index:
            return
        found = self._read(index)
        self.places.copy_(self._places(found))
        self._step_bias.copy_(self._padded_step_bias(found))
        for kept, new in zip(self._state, self._state_weights(index)):
            kept.copy_(new)
        for product, site in zip(self._products, self._sites(found)):
            new = site.small()
            product.weight.tiles.copy_(new.tiles)
            if new.bias is not None:
                product.weight.bias.copy_(new.bias)
        self._index = index

    def state_token(self, state: Tensor) -> Tensor:
        """``[1, width]`` of a normalised state ``[1, state_dim]``."""
        first, first_bias, second, second_bias = self._state
        hidden = torch.addmm(first_bias, state.to(self._dtype), first).relu_()
        return torch.addmm(second_bias, hidden, second)

    def weights(self) -> list[SmallProduct]:
        """All products for few tokens."""
        return list(self._products)

    def table_bytes(self) -> int:
        """Of what is not in ``weights``."""
        return sum(one.numel() * one.element_size() for one in (self.places, self._step_bias, *self._state))

    def _sites(self, found: EmbodimentWeights) -> tuple[FloatSite, ...]:
        return (
            FloatSite(found.actions[0].t(), None, self._dtype),
            FloatSite(found.tokens[0].t(), None, self._dtype),
            FloatSite(found.hidden[0].t(), found.hidden[1], self._dtype),
            FloatSite(found.out[0].t(), found.out[1], self._dtype),
        )

    def _read(self, index: int) -> EmbodimentWeights:
        head = self._head
        if not all(isinstance(one, EmbodimentLinear) for one in _linears(head)):
            raise EngineError("the weights of the embodiments are quantized; use scope paper")
        return EmbodimentWeights.of(head, index, torch.float64)

    def _state_weights(self, index: int) -> tuple[Tensor, ...]:
        encoder = self._head.state_encoder
        return (*encoder.layer1.weights_of(index), *encoder.layer2.weights_of(index))

    def _places(self, found: EmbodimentWeights) -> Tensor:
        """float64 ``[H, width]``."""
        head = self._head
        return found.token_bias(head.position_embedding, head.horizon).expand(head.horizon, -1)

    def _padded_step_bias(self, found: EmbodimentWeights) -> Tensor:
        """float32 ``[steps, width padded]``."""
        bias = found.step_bias(self._times)
        steps, width = bias.shape
        padded = bias.new_zeros(steps, round_up(width, BLOCK_OUT), dtype=torch.float32)
        padded[:, :width] = bias
        return padded


def _linears(head: nn.Module) -> tuple[nn.Module, ...]:
    encoder, decoder, state = head.action_encoder, head.action_decoder, head.state_encoder
    return encoder.W1, encoder.W2, encoder.W3, decoder.layer1, decoder.layer2, state.layer1, state.layer2

"""State encoder, action encoder and action decoder of GR00T N1.5 for one embodiment.

Two linears with nothing between them become one: the action encoder's first with the half of its second that reads the
actions, and the transformer's last with the decoder's first. The other half of the second reads the flow time alone, so
that it becomes a bias per denoise step. The products of weights are float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Matrices:
    """Weights ``[O, I]`` and biases of an embodiment, float64; see the module's docstring.

    Attributes:
        state: Of the state encoder, each ``[I, O]`` and ``[O]``.
        into: Actions to what the action encoder activates.
        step_bias: Added to it, ``[steps, width]``.
        action: From what is activated to tokens.
        places: What is added to the tokens, ``[H, width]``.
        decoder: From the transformer's last norm to what the decoder activates.
        decoder_bias: Added to it.
        out: From there to velocities.
        out_bias: Added to them.
    """

    state: tuple[Tensor, Tensor, Tensor, Tensor]
    into: Tensor
    step_bias: Tensor
    action: Tensor
    places: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    out: Tensor
    out_bias: Tensor


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
        found = self._matrices(0)
        self.places = found.places.float()
        self._step_bias = _step_bias(found)
        self._state = [one.to(dtype) for one in found.state]
        into, self.action, decoder, self.velocity = self._products = [
            SmallProduct(site, site.small(), tuned) for site in self._sites(found)
        ]
        self.encoder = tuple(
            ActivatedInto("action hidden", into.with_bias(bias), self.action, numerics.SILU) for bias in self._step_bias
        )
        self.decoder = ActivatedInto("decoder hidden", decoder, self.velocity, numerics.RELU)

    def choose(self, index: int) -> None:
        """Take the weights of an embodiment, for the graphs launched afterwards; does nothing if they are here."""
        if index == self._index:
            return
        found = self._matrices(index)
        self.places.copy_(found.places)
        self._step_bias.copy_(_step_bias(found))
        for kept, new in zip(self._state, found.state):
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

    def _sites(self, found: _Matrices) -> tuple[FloatSite, ...]:
        return (
            FloatSite(found.into, None, self._dtype),
            FloatSite(found.action, None, self._dtype),
            FloatSite(found.decoder, found.decoder_bias, self._dtype),
            FloatSite(found.out, found.out_bias, self._dtype),
        )

    def _matrices(self, index: int) -> _Matrices:
        head = self._head
        encoder, decoder, last = head.action_encoder, head.action_decoder, head.model.proj_out_2
        (w1, b1), (w2, b2), (w3, b3) = (_of(one, index) for one in (encoder.W1, encoder.W2, encoder.W3))
        (d1, e1), (d2, e2) = (_of(one, index) for one in (decoder.layer1, decoder.layer2))
        actions, time = w2.split(w3.shape[0])
        places = b3.expand(head.horizon, -1)
        if head.position_embedding is not None:
            places = places + head.position_embedding.weight[: head.horizon].detach().double()
        return _Matrices(
            state=(*_of(head.state_encoder.layer1, index), *_of(head.state_encoder.layer2, index)),
            into=(w1 @ actions).t(),
            step_bias=b1 @ actions + b2 + self._times @ time,
            action=w3.t(),
            places=places,
            decoder=(last.weight.detach().double().t() @ d1).t(),
            decoder_bias=last.bias.detach().double() @ d1 + e1,
            out=d2.t(),
            out_bias=e2,
        )


def _of(linear: nn.Module, index: int) -> tuple[Tensor, Tensor]:
    """Weight ``[I, O]`` and bias ``[O]``, float64."""
    if not isinstance(linear, EmbodimentLinear):
        raise EngineError("the weights of the embodiments are quantized; use scope paper")
    return linear.W[index].detach().double(), linear.b[index].detach().double()


def _step_bias(found: _Matrices) -> Tensor:
    """float32 ``[steps, width padded]``."""
    steps, width = found.step_bias.shape
    padded = found.step_bias.new_zeros(steps, round_up(width, BLOCK_OUT), dtype=torch.float32)
    padded[:, :width] = found.step_bias
    return padded

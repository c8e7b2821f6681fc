"""Action encoder and decoder of GR00T N1.5 for one embodiment, with less to compute per denoise step.

Two linears with nothing between them become one: the action encoder's first with the half of its second that reads the
actions, and the transformer's last with the decoder's first. The other half of the second reads the flow time alone, so
that it becomes a bias per denoise step. The products of weights are float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A linear as ``x @ weight + bias``: weight ``[I, O]``, bias ``[O]``.
Affine = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EmbodimentWeights:
    """See the module's docstring.

    Attributes:
        actions: Noisy actions to the encoder's hidden width.
        time: Weight of the time features there, ``[width, width]``.
        tokens: Hidden width to tokens.
        hidden: The transformer's last norm to the decoder's hidden width.
        out: Hidden width to velocities.
    """

    actions: Affine
    time: Tensor
    tokens: Affine
    hidden: Affine
    out: Affine

    @classmethod
    def of(cls, head: nn.Module, embodiment: int, dtype: torch.dtype) -> EmbodimentWeights:
        """Read one embodiment's weights.

        Args:
            head: ``Gr00tN15.action_head``.
            embodiment: Which.
            dtype: Of all tensors; what has that type already is the model's own memory.

        Raises:
            QuantizationError: A pack does not hold the embodiment.
        """
        encoder, decoder, project = head.action_encoder, head.action_decoder, head.model.proj_out_2
        first, (second, bias) = (one.weights_of(embodiment) for one in (encoder.W1, encoder.W2))
        # The second linear reads what the first one gave beside the time features.
        of_actions, of_time = second.split(first[0].shape[1])
        return cls(
            _product(first, (of_actions, bias), dtype),
            of_time.detach().to(dtype),
            _as(dtype, encoder.W3.weights_of(embodiment)),
            _product((project.weight.t(), project.bias), decoder.layer1.weights_of(embodiment), dtype),
            _as(dtype, decoder.layer2.weights_of(embodiment)),
        )

    def step_bias(self, time_features: Tensor) -> Tensor:
        """What ``actions`` is to add at a denoise step ``[steps, width]``, of its time features ``[steps, width]``."""
        return torch.addmm(self.actions[1], time_features, self.time)

    def token_bias(self, positions: nn.Embedding | None, horizon: int) -> Tensor:
        """What ``tokens`` is to add: ``[width]``, or ``[horizon, width]`` with the positions' table in it."""
        bias = self.tokens[1]
        return bias if positions is None else bias + positions.weight[:horizon].detach().to(bias.dtype)

    def copied_bytes(self) -> int:
        """Bytes besides the model's own."""
        return sum(one.numel() * one.element_size() for one in (*self.actions, *self.hidden))


def _as(dtype: torch.dtype, linear: Affine) -> Affine:
    weight, bias = linear
    return weight.detach().to(dtype), bias.detach().to(dtype)


def _product(first: Affine, second: Affine, dtype: torch.dtype) -> Affine:
    """One linear in the place of two."""
    (weight, bias), (after, after_bias) = (_as(torch.float64, linear) for linear in (first, second))
    return (weight @ after).to(dtype), (bias @ after + after_bias).to(dtype)

"""Reference backend: multiply codes by their scales, then a float32 product ("fake quantization")."""

from __future__ import annotations

from torch import Tensor

from omega_qvla_core.kernels.base import Backend, GroupedWeight, grouped


def dequantize(weight: GroupedWeight) -> Tensor:
    """float32 ``[O, I]``: every code times the scale of its row and group."""
    scales = weight.scales.repeat_interleave(weight.group, dim=1)[:, : weight.codes.shape[1]]
    return weight.codes.float() * scales


class ReferenceBackend(Backend):
    """What the other backends are compared with; about as fast as the unquantized layer."""

    name = "reference"

    def prepare(self, weight: GroupedWeight) -> Tensor:
        """float32 ``[G * g, O]``: the dequantized weight, transposed."""
        return grouped(dequantize(weight), weight.group).transpose(1, 2).flatten(0, 1).contiguous()

    def linear(self, codes: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
        activations = (codes * scales).transpose(0, 1).flatten(1)
        return activations @ weight

"""What every backend implements: the product of activation codes with weight codes, scales outside the reduction.

Shapes: M tokens, I input columns in G groups of g (the last group is zero-padded), O output columns. With integer
codes ``a`` and ``w`` the product is ``y[m, o] = sum_g sx[g, m] * sw[o, g] * (sum_k a[g, m, k] * w[g, k, o])``. The
inner sum is an integer; backends that execute it compute that integer exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupedWeight:
    """A quantized weight matrix, as the quantizer hands it to a backend.

    Attributes:
        codes: int8 ``[O, I]``.
        scales: float32 ``[O, G]``, one scale per row and group.
        group: Columns per group; ``G = ceil(I / group)``.
        weight_bits: Bits of the weight codes.
        activation_bits: Bits of the activation codes that it will be multiplied with.
    """

    codes: Tensor
    scales: Tensor
    group: int
    weight_bits: int = 4
    activation_bits: int = 4

    @property
    def largest_accumulator(self) -> int:
        """Bound of the magnitude of a group's integer sum."""
        return self.group << (self.weight_bits + self.activation_bits - 2)


class Backend(ABC):
    """One way to compute the product. Backends keep no state: ``prepare`` returns all that ``linear`` needs."""

    name: str

    @abstractmethod
    def prepare(self, weight: GroupedWeight) -> Any:
        """Bring a weight into the backend's own layout, once per load."""

    @abstractmethod
    def linear(self, codes: Tensor, scales: Tensor, weight: Any) -> Tensor:
        """The product.

        Args:
            codes: float32 ``[G, M, g]`` holding integers; padding columns hold zero.
            scales: float32 ``[G, M, 1]`` for a scale per token and group, ``[1, M, 1]`` per token, ``[1, 1, 1]`` for
                one scale.
            weight: What ``prepare`` returned.

        Returns:
            float32 ``[M, O]``.
        """


def grouped(codes: Tensor, group: int) -> Tensor:
    """``[O, I]`` -> contiguous ``[G, O, group]``, the last group padded with zeros."""
    rows, columns = codes.shape
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(codes, (0, groups * group - columns))
    return padded.view(rows, groups, group).transpose(0, 1).contiguous()

"""What the quantizer needs of a policy. ``runtime.Policy`` is one; the quantizer itself never imports the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from omega_qvla_core.checkpoints.loading import Description
from omega_qvla_core.policy_types import PolicySpec


class QuantizablePolicy(Protocol):
    """A model with its processing.

    Attributes:
        model: The network.
        description: Configuration, statistics and vocabulary that belong to it.
        device: Where it computes.
        processor: Observation <-> tensors; ``prepare(observations, device)`` gives the model's inputs.
        spec: What the policy needs and gives.
    """

    model: nn.Module
    description: Description
    device: torch.device
    processor: Any
    spec: PolicySpec

    def noise(self, count: int, seeds: Sequence[int] | None = None) -> Tensor:
        """Start noise float32 ``[count, horizon, model's action width]``, one seed per row."""
        ...

    def with_model(self, model: nn.Module, quantization: str = "none") -> Any:
        """The same policy (and type) around another network; ``quantization`` names the recipe."""
        ...


PolicyT = TypeVar("PolicyT", bound=QuantizablePolicy)

"""What the CPU engine's plans have in common: buffers, the denoise loop, and the check of tables per step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from omega_qvla_core.errors import StepContextError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.runtime.cpu_buffers import Buffers
from omega_qvla_core.runtime.engine import VelocityGuide


class Weights(Protocol):
    """What the plans of one model share: its linears as products."""

    def copied_bytes(self) -> int:
        """Bytes besides the model's own."""
        ...


class Plan(ABC):
    """All that runs after the prefix is embedded, for one observation; made from a model, its weights, and a shape.

    Args:
        num_steps: Denoise steps.
        step_size: Signed length of one in the family's flow time.
    """

    def __init__(self, num_steps: int, step_size: float) -> None:
        self.num_steps, self.step_size = num_steps, step_size
        self.buffers = Buffers()

    @staticmethod
    @abstractmethod
    def shape_of(prefix: Any) -> Hashable:
        """Everything of an embedded prefix that a plan is made for."""

    @abstractmethod
    def encode(self, prefix: Any) -> None:
        """Run what runs once per observation, on the model's prefix of one row without padding."""

    @abstractmethod
    def velocity(self, x_t: Tensor, index: int) -> Tensor:
        """Velocity ``[H, A]`` of a noisy chunk ``[H, A]`` at a denoise step, after ``encode``; a new tensor."""

    def bytes(self) -> int:
        """Size of all buffers."""
        return self.buffers.bytes()

    def denoise(self, noise: Tensor, guide: VelocityGuide | None = None) -> Tensor:
        """Actions ``[H, A]`` from noise ``[H, A]``, after ``encode``; a new tensor."""
        x_t = noise.clone()
        sign = -1.0 if self.step_size < 0 else 1.0
        for index in range(self.num_steps):
            with denoise_step(index, self.num_steps):
                v_t = self.velocity(x_t, index)
            if guide is not None:
                v_t = sign * guide(x_t[None], (sign * v_t)[None], index / self.num_steps)[0]
            x_t.add_(v_t, alpha=self.step_size)
        return x_t


def check_steps(modules: Iterable[nn.Module], steps: int) -> None:
    """Refuse tables of another number of denoise steps, as each site would when it runs (see ``QuantizedSite``).

    Args:
        modules: Hold the sites.
        steps: With which they run; 0 outside the denoise loop.

    Raises:
        StepContextError: A site has tables for another number.
    """
    for site in (site for module in modules for site in quantized_sites(module)):
        if site.spec.steps not in (0, steps):
            raise StepContextError(
                f"{site.spec.name} was calibrated for {site.spec.steps} denoise steps but runs with {steps}; use "
                "the calibrated number or quantize again"
            )

"""The Euler loop that all flow-matching action heads share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from omega_qvla_core.models.step_context import denoise_step

VelocityGuide = Callable[[Tensor, Tensor, float], Tensor]
"""``guide(x, u, tau) -> u``: corrects a velocity between evaluation and step.

``x`` and ``u`` are float32 ``[B, H, A]``; ``u`` points from noise to actions, whatever the family's convention;
``tau`` is 0 for noise and 1 for actions."""


@dataclass(frozen=True)
class EulerStep:
    """One step of an integration.

    Attributes:
        index: 0 for the noisiest.
        velocity: float32 ``[B, H, A]`` that the action head gave, after the guide.
        actions: float32 ``[B, H, A]`` after the step.
    """

    index: int
    velocity: Tensor
    actions: Tensor


def integrate(
    noise: Tensor,
    num_steps: int,
    step_size: float,
    velocity: Callable[[Tensor, int], Tensor],
    guide: VelocityGuide | None = None,
) -> Iterator[EulerStep]:
    """Integrate ``x <- x + step_size * velocity(x, index)`` from noise.

    Args:
        noise: ``[B, H, A]``.
        num_steps: Number of evaluations; each runs inside ``denoise_step(index, num_steps)``.
        step_size: Signed length of a step in flow time.
        velocity: Called with the chunk so far, float32, and the step's index.
        guide: Applied to every velocity; None: none.
    """
    sign = 1.0 if step_size > 0.0 else -1.0
    x = noise.float()
    for index in range(num_steps):
        with denoise_step(index, num_steps):
            v_t = velocity(x, index)
            if guide is not None:
                v_t = sign * guide(x, sign * v_t, index / num_steps)
            x = x + step_size * v_t
        yield EulerStep(index, v_t, x)


def check_sampling(noise: Tensor, expected: tuple[int, int, int], num_steps: int) -> None:
    """Refuse noise that does not fit the model and batch, and a number of steps below 1.

    Raises:
        ValueError: See above.
    """
    if tuple(noise.shape) != expected:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; this model and batch need {expected}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")

"""Real-time chunking: plan the next chunk so that it continues what the arm is already committed to.

While an inference runs, the arm executes steps of the previous chunk. Guided denoising draws the new chunk's first
steps to those and lets the following ones agree with the rest of the previous chunk, less and less (Black, Galliker and
Levine, "Real-Time Execution of Action Chunking Flow Policies", arXiv 2506.07339). Each step's velocity is corrected by

    u  <-  u + g(tau) * W * (Y - (x + (1 - tau) u))        g = min(beta, (1 - tau) / (tau r^2)),
                                                            r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)

with the committed steps ``Y``, weights ``W`` and flow time ``tau`` from 0 (noise) to 1 (actions). The paper multiplies
the error with the transposed Jacobian of the prediction ``x + (1 - tau) u(x)``; here, as in LeRobot's implementation,
that Jacobian is the identity. So nothing is differentiated, and it works on any weights, quantized ones included. What
that changes is measured in ``docs/realtime_chunking.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import CommittedPrefix


def prefix_weights(horizon: int, delay_steps: int, committed_steps: int) -> np.ndarray:
    """How strongly each step is held to the committed one: the paper's soft mask.

    Args:
        horizon: Steps of a chunk.
        delay_steps: Steps ``d`` with weight 1.
        committed_steps: Steps ``K`` from which on nothing is committed.

    Returns:
        float32 ``[horizon]``: 1, then ``c (e^c - 1) / (e - 1)`` with ``c = (K - i) / (K - d + 1)``, then 0.
    """
    steps = np.arange(horizon)
    c = np.clip((committed_steps - steps) / (committed_steps - delay_steps + 1), 0.0, 1.0)
    soft = c * np.expm1(c) / (math.e - 1.0)
    return np.where(steps < delay_steps, 1.0, np.where(steps < committed_steps, soft, 0.0)).astype(np.float32)


def guidance_weight(tau: float, max_weight: float) -> float:
    """``g(tau)``; ``max_weight`` at 0, 0 at 1."""
    if tau <= 0.0:
        return max_weight
    if tau >= 1.0:
        return 0.0
    inverse_r2 = (tau * tau + (1.0 - tau) ** 2) / (1.0 - tau) ** 2
    return min(max_weight, (1.0 - tau) / tau * inverse_r2)


@dataclass(frozen=True, eq=False)
class PrefixGuidance:
    """A guide for ``models.flow.integrate``: elementwise, without gradients.

    Attributes:
        targets: float32 ``[B, H, A]``, the committed steps as the model would predict them; anything where unknown.
        weights: float32 ``[B, H, A]``, 0 where unknown and in the padding of the action vector.
        max_weight: See ``CommittedPrefix``.
    """

    targets: Tensor
    weights: Tensor
    max_weight: float

    def to(self, device: torch.device) -> PrefixGuidance:
        """The same guide on a device."""
        return PrefixGuidance(self.targets.to(device), self.weights.to(device), self.max_weight)

    def __call__(self, x: Tensor, u: Tensor, tau: float) -> Tensor:
        """The corrected velocity. Where nothing is committed, ``u`` itself, NaN included."""
        error = self.targets - (x + (1.0 - tau) * u)
        step = guidance_weight(tau, self.max_weight) * self.weights * error
        return torch.where(self.weights > 0.0, u + step, u)


def guidance(
    prefixes: Sequence[CommittedPrefix | None], normalized: Sequence[np.ndarray | None], shape: tuple[int, int, int]
) -> PrefixGuidance | None:
    """Put the committed prefixes of a batch together.

    Args:
        prefixes: One per row; None: nothing is committed there.
        normalized: Per row, the prefix's actions as the model would predict them, ``[K, actions]``.
        shape: ``(B, H, A)`` of the model.

    Returns:
        The guide on the CPU, None if no row has a prefix.

    Raises:
        ConfigError: The prefixes ask for different ``max_weight``.
    """
    given = [prefix for prefix in prefixes if prefix is not None]
    if not given:
        return None
    if len({prefix.max_weight for prefix in given}) > 1:
        raise ConfigError("the committed prefixes of one batch must have the same max_weight")
    targets, weights = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for row, (prefix, actions) in enumerate(zip(prefixes, normalized, strict=True)):
        if prefix is None or actions is None:
            continue
        steps, width = actions.shape
        usable = np.isfinite(actions)
        targets[row, :steps, :width] = np.where(usable, actions, 0.0)
        schedule = prefix_weights(shape[1], prefix.delay_steps, steps)
        weights[row, :steps, :width] = schedule[:steps, None] * usable
    return PrefixGuidance(torch.from_numpy(targets), torch.from_numpy(weights), given[0].max_weight)

"""What the parts of Pi 0.5 hand to each other: prefix, its keys and values, positions and times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """What the language tower reads.

    Attributes:
        embeddings: ``[B, P, lm_width]``: tokens of all cameras, then the prompt.
        pad_mask: bool ``[B, P]``; False for absent cameras and padding. At least one True in each row.
        complete: Whether ``pad_mask`` is known to be all True, so that attention needs no mask.
    """

    embeddings: Tensor
    pad_mask: Tensor
    complete: bool = False

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[B, P]``: masked tokens take up no position (leading ones get -1, which is never read)."""
        return self.pad_mask.long().cumsum(dim=1) - 1


@dataclass(frozen=True)
class PrefixCache:
    """What the action expert reads of the prefix.

    Attributes:
        keys: Per layer ``[B, num_kv_heads, P, head_dim]``, rotated.
        values: Per layer, same shape.
        pad_mask: bool ``[B, P]``.
        last_hidden: ``[B, P, lm_width]`` after the final norm; no action depends on it. None if it was not asked for.
        complete: As in ``Prefix``.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pad_mask: Tensor
    last_hidden: Tensor | None
    complete: bool = False

    def repeat(self, times: int) -> PrefixCache:
        """The cache with every row repeated ``times`` times in a row (several noises per observation)."""
        if times == 1:
            return self
        return replace(
            self,
            keys=tuple(key.repeat_interleave(times, dim=0) for key in self.keys),
            values=tuple(value.repeat_interleave(times, dim=0) for value in self.values),
            pad_mask=self.pad_mask.repeat_interleave(times, dim=0),
            last_hidden=None if self.last_hidden is None else self.last_hidden.repeat_interleave(times, dim=0),
        )


@dataclass(frozen=True)
class StepCondition:
    """All that the action expert reads of the flow-matching time; B may be 1 for a whole batch.

    Attributes:
        layers: Per layer the modulations ``[B, 1, 3 * expert_width]`` of its two norms.
        final: Modulation of the final norm, same shape.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    final: Tensor


def euler_times(num_steps: int) -> list[float]:
    """Times at which the velocity is evaluated: accumulated in float32 from 1 downwards, as the reference does.

    The rounding counts: exact times would move the actions by 1e-4 (the time embedding is that steep).

    Raises:
        ValueError: If ``num_steps`` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    step, time, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    for _ in range(num_steps):
        times.append(float(time))
        time = time + step
    return times


def suffix_position_ids(pad_mask: Tensor, horizon: int) -> Tensor:
    """int64 ``[B, horizon]``: the chunk's positions come after the valid tokens of the prefix."""
    return pad_mask.long().sum(dim=1, keepdim=True) + torch.arange(horizon, device=pad_mask.device)

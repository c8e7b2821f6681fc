"""The denoise step that is being computed, for layers whose scales depend on it.

A context variable rather than an argument, because the step has to reach every linear of the action head without
changing the signatures of the official models. The model's Euler loop sets it; a quantized layer reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class DenoiseStep:
    """Index of the step in loop order (0 = noisiest, first executed) and the number of steps."""

    index: int
    total: int


_CURRENT: ContextVar[DenoiseStep | None] = ContextVar("omega_qvla_denoise_step", default=None)


def current_step() -> DenoiseStep | None:
    """The step being computed, or None outside the denoise loop (vision and prefix run there)."""
    return _CURRENT.get()


@contextmanager
def denoise_step(index: int, total: int) -> Iterator[None]:
    """Declare that the code inside computes step ``index`` of ``total``."""
    if not 0 <= index < total:
        raise ValueError(f"denoise step {index} is not within 0..{total - 1}")
    token = _CURRENT.set(DenoiseStep(index, total))
    try:
        yield
    finally:
        _CURRENT.reset(token)

"""Small functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """The nearest integer, ties to even, for ``|x| < 2**22``: beyond 1.5 * 2**23 float32 holds integers only."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """tanh-GELU: ``x * sigmoid(2 z)`` with ``z = sqrt(2 / pi) (x + 0.044715 x^3)``, which equals its tanh form."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))

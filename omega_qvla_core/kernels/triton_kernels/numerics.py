"""Small functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GELU, SILU, RELU = 0, 1, 2


@triton.jit
def round_half_even(x):
    """The nearest integer, ties to even, for ``|x| < 2**22``: beyond 1.5 * 2**23 float32 holds integers only."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def low_plane(packed, NATIVE: tl.constexpr):
    """16 times the codes in the low nibbles, int8.

    NATIVE code works on four codes at a time, which the compiler does not find by itself; Triton's interpreter cannot
    run it, and takes the same arithmetic byte by byte.
    """
    if NATIVE:
        codes = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = packed << 4
    return codes


@triton.jit
def high_plane(packed, NATIVE: tl.constexpr):
    """16 times the codes in the high nibbles, int8; see ``low_plane``."""
    if NATIVE:
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = packed & -16
    return codes


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """tanh-GELU: ``x * sigmoid(2 z)`` with ``z = sqrt(2 / pi) (x + 0.044715 x^3)``, which equals its tanh form."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """GELU (its tanh form), SILU or RELU of ``x``."""
    if ACTIVATION == 0:
        y = gelu_tanh(x)
    elif ACTIVATION == 1:
        y = silu(x)
    else:
        # Not a maximum, which would hide a value that is not a number.
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def rotate_lines(v, LINES: tl.constexpr):
    """``v H`` of float32 ``[LINES, 64]``, H the orthogonal Hadamard matrix in Sylvester's order.

    Six butterflies of sums and differences in registers: fewer instructions than a product, and no rounding of ``v``.
    """
    x = tl.reshape(v, (LINES, 2, 2, 2, 2, 2, 2))
    for stage in tl.static_range(6):
        both = tl.sum(x, axis=stage + 1, keep_dims=True)
        second = tl.reshape((tl.arange(0, 64) // (2 ** (5 - stage))) % 2, (1, 2, 2, 2, 2, 2, 2))
        # The first of a pair becomes the sum, the second the first minus the second.
        x = tl.where(second == 0, both, both - 2.0 * x)
    return tl.reshape(x, (LINES, 64)) * 0.125


@triton.jit
def begin(EARLY: tl.constexpr):
    """With EARLY the next kernel may be launched while this one runs, and this one waits for the one before it.

    Programmatic dependent launch, from compute capability 9.0: it hides the time between two kernels. A kernel may read
    before this what the one before it does not write: all kernels further back have ended, since the one before has
    waited for them. What changes from launch to launch must then be read past the L1 cache.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

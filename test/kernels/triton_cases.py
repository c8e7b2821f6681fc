"""What the tests of the Triton kernels share: the device they run on, random codes and weights."""

from __future__ import annotations

import torch

from omega_qvla_core.kernels import GroupedWeight, code_range

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Triton's interpreter multiplies no bfloat16.
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

# Rounding of a rotation, whose sums are taken in another order.
ROTATION_RELATIVE = 2.0**-20


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_weight(outputs, columns, group, bits=4, fill=None):
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (outputs, columns), dtype=torch.int8, generator=generator(columns + outputs))
    if fill is not None:
        codes = torch.full_like(codes, fill)
    scales = torch.rand(outputs, -(-columns // group), generator=generator(1)) * 0.1 + 0.01
    return GroupedWeight(codes.to(DEVICE), scales.to(DEVICE), group, bits, bits)


def random_codes(tokens, columns, bits=4):
    """int8 ``[T, K]``."""
    low, high = code_range(bits)
    return torch.randint(low, high + 1, (tokens, columns), generator=generator(tokens)).to(torch.int8).to(DEVICE)


def random_floats(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=generator(seed)) * scale).to(DEVICE)


def largest_difference(found, expected):
    """Relative to the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))

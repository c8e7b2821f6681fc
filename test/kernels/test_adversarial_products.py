"""Products where a mistake would show: no tokens, rows of zeros, sums that cancel, one stated order of groups."""

from __future__ import annotations

import pytest
import torch

from omega_qvla_core.kernels import BACKENDS, GroupedWeight, code_range
from omega_qvla_core.kernels.base import grouped

# tokens, columns, outputs, group
SIZES = [(5, 192, 130, 64), (3, 16383, 131, 64), (3, 16384, 9, 128), (4, 77, 200, 16), (2, 1, 3, 64)]


def random_weight(columns, outputs, group, bits=4):
    generator = torch.Generator().manual_seed(columns)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (outputs, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, -(-columns // group), generator=generator) + 0.1
    return GroupedWeight(codes, scales, group, bits, bits)


def random_codes(tokens, columns, group, bits=4):
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(tokens)
    return grouped(torch.randint(low, high + 1, (tokens, columns), generator=generator).float(), group)


def oracle(codes, weight):
    return torch.bmm(codes.long(), grouped(weight.codes.long(), weight.group).transpose(1, 2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_groups_are_added_in_ascending_order_bit_for_bit(size, bits):
    """``y += (sum_g * sx_g) * sw_g`` in float32, as the backend's docstring states it."""
    tokens, columns, outputs, group = size
    weight, codes = random_weight(columns, outputs, group, bits), random_codes(tokens, columns, group, bits)
    scales = torch.rand(codes.shape[0], tokens, 1, generator=torch.Generator().manual_seed(7)) + 0.1
    sums = oracle(codes, weight).float()
    if len(sums) == 1:
        expected = (sums[0] * weight.scales[:, 0]) * scales[0]
    else:
        expected = (sums[0] * scales[0]) * weight.scales[:, 0]
        for index in range(1, len(sums)):
            expected = expected.addcmul(sums[index] * scales[index], weight.scales[:, index])
    backend = BACKENDS["cpu"]
    assert torch.equal(backend.linear(codes, scales, backend.prepare(weight)), expected)


@pytest.mark.parametrize("outputs", [9, 200], ids=["floats", "int8"])
def test_no_tokens_give_no_outputs(outputs):
    weight = random_weight(128, outputs, 64)
    for backend in BACKENDS.values():
        y = backend.linear(torch.zeros(2, 0, 64), torch.ones(2, 0, 1), backend.prepare(weight))
        assert y.shape == (0, outputs)


@pytest.mark.parametrize("outputs", [9, 200], ids=["floats", "int8"])
def test_rows_of_zeros_stay_zero_and_leave_the_others_alone(outputs):
    weight = random_weight(128, outputs, 64)
    codes = random_codes(6, 128, 64)
    scales = torch.ones(2, 6, 1)
    backend = BACKENDS["cpu"]
    full = backend.linear(codes, scales, backend.prepare(weight))
    codes[:, 2] = 0
    weight.codes[4] = 0
    y = backend.linear(codes, scales, backend.prepare(weight))
    assert not y[2].any() and not y[:, 4].any()
    keep, rows = [0, 1, 3, 4, 5], [index for index in range(outputs) if index != 4]
    assert torch.equal(y[keep][:, rows], full[keep][:, rows])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [16384, 16383, 65, 1])
def test_sums_that_cancel_are_exact(columns, bits):
    """Alternating signs of the largest codes: every partial sum matters, and the total is next to nothing."""
    low, high = code_range(bits)
    weight = random_weight(columns, 150, columns, bits)
    weight.codes[:, 0::2], weight.codes[:, 1::2] = low, high
    values = torch.empty(2, columns)
    values[:, 0::2], values[:, 1::2] = high, low
    values[1] = low
    codes = grouped(values, columns)
    backend = BACKENDS["cpu"]
    assert torch.equal(backend.accumulators(codes, backend.prepare(weight)), oracle(codes, weight))

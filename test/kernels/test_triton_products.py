"""Epilogues of the product for few tokens, and the product for many tokens, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the package triton is not installed")

from triton_cases import DEVICE, FLOAT, largest_difference, random_codes, random_floats, random_weight

from omega_qvla_core.kernels import GroupedWeight
from omega_qvla_core.kernels.reference import dequantize
from omega_qvla_core.kernels.triton_kernels import large_gemm, launch, numerics, small_gemm
from omega_qvla_core.kernels.triton_kernels.launch import (
    Blocks,
    Joining,
    large_linear,
    partial_buffer,
    small_linear,
)
from omega_qvla_core.kernels.triton_kernels.weights import (
    large_float_weight,
    large_weight,
    small_float_weight,
    small_weight,
    weight_bytes,
)

# Of Triton's interpreter: numpy conversions, and exp of what saturates anyway.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

TOKENS = 16


def scales_of(groups, tokens=TOKENS):
    return random_floats(groups, tokens, seed=3).abs() + 0.1


def expected_product(codes, scales, weight):
    """float64 [T, O] of codes [T, K] with scales [G or 1, T]."""
    spread = scales.t().double().repeat_interleave(-(-codes.shape[1] // scales.shape[0]), dim=1)[:, : codes.shape[1]]
    return (codes.double() * spread) @ dequantize(weight).double().t()


@pytest.mark.parametrize("group", [64, 128, 256], ids=["tile", "long tile", "row"])
@pytest.mark.parametrize("bits", [4, 8])
def test_triton_shares_of_k_add_up_to_the_product(group, bits):
    weight, codes = random_weight(80, 256, group, bits), random_codes(TOKENS, 256, bits)
    scales, prepared = scales_of(256 // group), small_weight(weight)
    parts = partial_buffer(prepared, TOKENS, DEVICE)
    assert parts.shape[0] > 1
    small_linear(codes, scales, prepared, parts, small_gemm.PARTIAL)
    found = parts.sum(dim=0)[:, :80]
    assert largest_difference(found, expected_product(codes, scales, weight)) < 1e-6


def test_triton_programs_of_two_tiles_write_the_shares_that_programs_of_one_do(monkeypatch):
    """Where a weight has many rows, a program owns two tiles of them."""
    weight, codes, scales = small_weight(random_weight(256, 256, 64)), random_codes(TOKENS, 256), scales_of(4)
    shared = []
    for programs in (1000, 4):
        out = torch.zeros(2, TOKENS, 256, device=DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_PROGRAMS", programs)
            small_linear(codes, scales, weight, out, small_gemm.PARTIAL)
        shared.append(out)
    assert shared[0].abs().amin(dim=2).max() > 0
    assert torch.equal(shared[0], shared[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_triton_ways_through_a_share_give_the_same_bits(bits, monkeypatch):
    """Tiles held in registers, groups two at a time with scales ahead or not, one tile of rows or two."""
    tokens = launch.MOST_SMALL_TOKENS
    weight, codes = random_weight(256, 512, 64, bits), random_codes(tokens, 512, bits)
    prepared, scales = small_weight(weight), scales_of(8, tokens)
    found = []
    for way in (
        launch._Way(),
        launch._Way(tiles=2),
        launch._Way(held=True),
        launch._Way(together=2),
        launch._Way(tiles=2, together=2, warps=8),
    ):
        out = torch.zeros(2, tokens, 256, device=DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_way", lambda *_, way=way: way)
            small_linear(codes, scales, prepared, out, small_gemm.PARTIAL)
        found.append(out)
    assert largest_difference(found[0].sum(dim=0), expected_product(codes, scales, weight)) < 1e-6
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_triton_products_in_shares_go_the_way_that_suits_their_sizes():
    """As measured on an H100: the expert of Pi 0.5 for 50 and for 10 tokens."""
    way = {}
    for name, (outputs, columns, count) in {
        "out": (1024, 2048, 8),
        "gate and up": (8192, 1024, 2),
        "down": (1024, 4096, 8),
    }.items():
        weight = small_weight(random_weight(outputs, columns, 64))
        assert launch.shares(weight, whole=True) == count
        units = columns // 64 // count
        way[name] = [launch._way(weight, small_gemm.PARTIAL, count, 1, units, tokens) for tokens in (64, 16)]
    assert way["out"] == [launch._Way(together=2), launch._Way(held=True)]
    assert way["gate and up"] == [launch._Way(tiles=2, together=2, warps=8), launch._Way(tiles=2)]
    assert way["down"] == [launch._Way(together=2), launch._Way()]


def test_triton_large_rows_must_be_in_reach_of_32_bits():
    launch.require_addressable(torch.empty(2**10, 2**15, device="meta"))
    with pytest.raises(ValueError, match="65536 rows, 32768 numbers apart"):
        launch.require_addressable(torch.empty(2**16, 2**15, device="meta"))


def test_triton_float_weight_is_a_plain_product_with_bias():
    weight, bias, x = random_floats(70, 100), random_floats(70, seed=5), random_floats(TOKENS, 128, seed=1)
    x[:, 100:] = 0
    out = torch.zeros(TOKENS, 128, device=DEVICE)
    small_linear(x.to(FLOAT), None, small_float_weight(weight, bias, dtype=FLOAT), out)
    expected = x[:, :100].to(FLOAT).double() @ weight.to(FLOAT).double().t() + bias.double()
    assert largest_difference(out[:, :70], expected) < 1e-5


@pytest.mark.parametrize("silu", [False, True], ids=["gelu", "silu"])
@pytest.mark.parametrize("group", [64, 256])
def test_triton_gated_product_activates_the_gate(silu, group):
    weight, codes = random_weight(2 * 64, 256, group), random_codes(TOKENS, 256)
    scales, activation = scales_of(256 // group), numerics.SILU if silu else numerics.GELU
    out = torch.zeros(TOKENS, 64, device=DEVICE)
    gated = small_weight(weight, gated=True)
    small_linear(codes, scales, gated, out, small_gemm.GATED, activation=activation)
    gate, up = (expected_product(codes, scales, weight) * 1.0).chunk(2, dim=1)
    gate = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
    assert largest_difference(out, gate * up) < 1e-5


@pytest.mark.parametrize("group", [64, 192], ids=["groups", "row"])
@pytest.mark.parametrize("activation", [numerics.GELU, numerics.RELU], ids=["gelu", "relu"])
def test_triton_product_with_bias_is_activated_once_its_shares_are_joined(activation, group):
    weight, bias, codes = random_weight(70, 192, group), random_floats(70, seed=5), random_codes(TOKENS, 192)
    prepared, scales = small_weight(weight, bias), scales_of(192 // group)
    codes = F.pad(codes, (0, prepared.columns - 192))
    joining = Joining(
        torch.full((Joining.numbers(prepared, TOKENS),), float("nan"), device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    out = torch.zeros(TOKENS, 128, device=DEVICE)
    small_linear(codes, scales, prepared, out, small_gemm.ACTIVATED, activation=activation, joining=joining)
    expected = expected_product(codes[:, :192], scales, weight) + bias
    expected = F.relu(expected) if activation == numerics.RELU else F.gelu(expected, approximate="tanh")
    assert largest_difference(out[:, :70], expected) < 1e-5


def test_triton_small_weight_takes_half_a_byte_per_code():
    weight = random_weight(128, 256, 64)
    assert small_weight(weight).tiles.numel() == 128 * 256 // 2
    assert weight_bytes([small_weight(weight)]) == 128 * 256 // 2 + 128 * 4 * 4


LARGE = Blocks(tokens=32, out=32, inner=64, warps=4)
# Programs that read through descriptors and take several tiles in turn.
TURNS = Blocks(tokens=32, out=32, inner=64, warps=4, resident=1, described=True)
EITHER = pytest.mark.parametrize("blocks", [LARGE, TURNS], ids=["pointers", "descriptors"])


@EITHER
@pytest.mark.parametrize("case", ["rows", "groups", "int4", "int4 groups"])
def test_triton_product_for_many_tokens(case, blocks):
    tokens, outputs, columns = 70, 50, 200
    group = columns if case in ("rows", "int4") else 64
    weight, codes = random_weight(outputs, columns, group), random_codes(tokens, columns)
    prepared = large_weight(weight, expand="int4" not in case)
    assert prepared.groups == (4 if "groups" in case else 1)
    scales = scales_of(prepared.groups, tokens)
    padded = F.pad(codes, (0, prepared.columns - columns))
    out = torch.zeros(tokens, outputs, device=DEVICE)
    large_linear(padded, scales, prepared, out, blocks=blocks)
    per_group = scales if prepared.groups > 1 else scales.expand(weight.scales.shape[1], -1)
    wide = F.pad(codes, (0, -columns % group))
    spread = per_group.t().double().repeat_interleave(group, dim=1)
    expected = (wide.double() * spread)[:, :columns] @ dequantize(weight).double().t()
    assert largest_difference(out, expected) < 1e-6


@EITHER
@pytest.mark.parametrize("bits", [8, 16], ids=["int8", "floats"])
def test_triton_many_tokens_with_gate_bias_and_residual(bits, blocks):
    tokens, outputs, columns = 40, 47, 128
    weight, codes = random_weight(2 * outputs, columns, columns, 8), random_codes(tokens, columns, 8)
    scales, bias = scales_of(1, tokens), random_floats(outputs, seed=6)
    residual, out = random_floats(tokens, outputs, seed=7), torch.zeros(tokens, outputs, device=DEVICE)
    x = codes if bits == 8 else codes.to(FLOAT)
    used = scales if bits == 8 else torch.ones_like(scales)
    matrix = weight.codes.float() * 2.0**-8
    plain = GroupedWeight(weight.codes, torch.full_like(weight.scales, 2.0**-8), columns, 8, 8)
    both = random_floats(2 * outputs, seed=8)
    if bits == 8:
        gated = large_weight(plain, both, gated=True)
    else:
        gated = large_float_weight(matrix, both, gated=True, dtype=FLOAT)
    large_linear(x, used, gated, out, large_gemm.GATED_SILU, residual, blocks)
    gate, up = (expected_product(codes, used, plain) + both).chunk(2, dim=1)
    assert largest_difference(out, F.silu(gate) * up + residual) < 1e-4
    half = GroupedWeight(plain.codes[:outputs], plain.scales[:outputs], columns, 8, 8)
    one = large_weight(half, bias) if bits == 8 else large_float_weight(matrix[:outputs], bias, dtype=FLOAT)
    large_linear(x, used, one, out, large_gemm.GELU, None, blocks)
    gate = expected_product(codes, used, half) + bias
    assert largest_difference(out, F.gelu(gate, approximate="tanh")) < 1e-4


@EITHER
def test_triton_many_tokens_add_a_floating_product_to_float32_rows_in_place(blocks):
    weight, bias = random_floats(50, 100), random_floats(50, seed=5)
    x, rows = random_floats(37, 128, seed=1).to(FLOAT), random_floats(37, 50, seed=2)
    x[:, 100:] = 0
    expected = rows.double() + x[:, :100].double() @ weight.to(FLOAT).double().t() + bias.double()
    large_linear(x, None, large_float_weight(weight, bias, dtype=FLOAT), rows, residual=rows, blocks=blocks)
    assert rows.dtype == torch.float32 and largest_difference(rows, expected) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_triton_shares_are_joined_by_the_last_program_and_the_counter_is_left_clean(gated):
    weight, codes, scales = random_weight(128, 512, 64), random_codes(TOKENS, 512), scales_of(8)
    prepared = small_weight(weight, gated=gated)
    joining = Joining(
        torch.full((Joining.numbers(prepared, TOKENS),), float("nan"), device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    expected = expected_product(codes, scales, weight)
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = F.gelu(gate, approximate="tanh") * up
    epilogue = small_gemm.GATED if gated else small_gemm.STORE
    for _ in range(2):
        out = torch.zeros(TOKENS, 64 if gated else 128, device=DEVICE)
        small_linear(codes, scales, prepared, out, epilogue, joining=joining)
        assert largest_difference(out, expected) < 1e-5
        assert not joining.counter.any()

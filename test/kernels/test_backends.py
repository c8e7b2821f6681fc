"""The integer backend against an int64 oracle, and both backends against each other."""

from __future__ import annotations

import copy

import pytest
import torch

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.kernels import BACKENDS, GroupedWeight, backend, code_range, cpu, cpu_routes
from omega_qvla_core.kernels.base import grouped

# tokens, columns, outputs, group: tabletop sizes, odd sizes, one of each, and the longest sum of a full-size model.
SIZES = [
    (16, 128, 256, 64),
    (16, 384, 128, 64),
    (3, 200, 150, 64),
    (1, 1, 1, 64),
    (7, 65, 129, 65),
    (2, 16384, 130, 64),
    (2, 16384, 130, 16384),
]


def weight_of(size, bits=4, fill=None):
    _, columns, outputs, group = size
    generator = torch.Generator().manual_seed(columns + outputs)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (outputs, columns), dtype=torch.int8, generator=generator)
    if fill is not None:
        codes = torch.full_like(codes, fill)
    scales = torch.rand(outputs, -(-columns // group), generator=generator) * 0.1 + 0.01
    return GroupedWeight(codes, scales, group, bits, bits)


def codes_of(size, bits=4, fill=None):
    tokens, columns, _, group = size
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (tokens, columns), generator=torch.Generator().manual_seed(tokens))
    if fill is not None:
        codes = torch.full_like(codes, fill)
    return grouped(codes.float(), group)


def oracle(codes, weight):
    """int64 sums [G, M, O]."""
    return torch.bmm(codes.long(), grouped(weight.codes.long(), weight.group).transpose(1, 2))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("extreme", [None, (0, 0), (0, 1), (1, 1)], ids=["random", "low*low", "low*high", "high*high"])
def test_accumulators_equal_an_int64_oracle_bit_for_bit(size, bits, extreme):
    limits = code_range(bits)
    fills = (None, None) if extreme is None else (limits[extreme[0]], limits[extreme[1]])
    weight, codes = weight_of(size, bits, fills[0]), codes_of(size, bits, fills[1])
    prepared = BACKENDS["cpu"].prepare(weight)
    assert torch.equal(BACKENDS["cpu"].accumulators(codes, prepared), oracle(codes, weight))


ROUTES = (cpu_routes.FLOAT32, cpu_routes.FLOAT64, cpu_routes.ONEDNN, cpu_routes.INT_MM)


def offered(route, size, bits):
    """Whether the backend may choose the route for such a weight."""
    _, columns, _, group = size
    if isinstance(route, cpu_routes.FloatRoute):
        return route is cpu_routes.FLOAT64 or weight_of(size, bits).largest_accumulator <= 2**24
    if route is cpu_routes.ONEDNN and weight_of(size, bits).largest_accumulator > 2**24:
        return False
    return min(group, columns) >= 8 and cpu_routes.is_exact(route, cpu_routes.Kind(bits, bits))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_route_gives_the_same_sums_and_outputs(size, bits, monkeypatch):
    """Which of them runs depends on the CPU; no output may."""
    weight, codes = weight_of(size, bits), codes_of(size, bits)
    scales = torch.rand(codes.shape[0], codes.shape[1], 1) + 0.1
    integer, outputs, names = BACKENDS["cpu"], [], []
    for route in ROUTES:
        if offered(route, size, bits):
            monkeypatch.setattr(cpu, "choose", lambda weight, route=route: route)
            prepared = integer.prepare(weight)
            assert torch.equal(integer.accumulators(codes, prepared), oracle(codes, weight)), route.name
            outputs.append(integer.linear(codes, scales, prepared))
            names.append(route.name)
    assert {"float32", "float64"} & set(names)
    assert all(torch.equal(one, outputs[0]) for one in outputs), names


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_products_into_given_memory_are_the_same(route, monkeypatch):
    size = (16, 384, 128, 64)
    if not offered(route, size, 4):
        pytest.skip(f"{route.name} is not exact on this CPU")
    monkeypatch.setattr(cpu, "choose", lambda weight: route)
    weight, codes, scales = BACKENDS["cpu"].prepare(weight_of(size)), codes_of(size), torch.rand(6, 16, 1) + 0.1
    sums = torch.full((6, 16, 128), float("nan"))
    got = cpu.product(codes, scales, weight, cpu.Work(sums, sums.unbind()))
    assert torch.equal(got, BACKENDS["cpu"].linear(codes, scales, weight))


def test_the_choice_is_an_exact_route_and_is_kept(monkeypatch):
    weight = weight_of((16, 384, 128, 64))
    route = cpu_routes.choose(weight)
    assert route in ROUTES and offered(route, (16, 384, 128, 64), 4)

    def never(call):
        raise AssertionError("a size is tried once")

    monkeypatch.setattr(cpu_routes, "_best_time_s", never)
    assert cpu_routes.choose(weight) is route


def test_a_route_that_is_wrong_on_this_cpu_is_not_offered():
    class Saturating(cpu_routes.FloatRoute):
        name = "saturating"

        def integers(self, codes, layout):
            return super().integers(codes, layout).clamp(-(1 << 15), (1 << 15) - 1)

    assert not cpu_routes.is_exact(Saturating(), cpu_routes.Kind(8, 8))
    assert cpu_routes.is_exact(Saturating(), cpu_routes.Kind(2, 4))


def test_prepared_weights_can_be_copied_with_their_model():
    weight, codes = weight_of((16, 384, 128, 64)), codes_of((16, 384, 128, 64))
    for route in (cpu_routes.FLOAT32, cpu_routes.ONEDNN, cpu_routes.INT_MM):
        if offered(route, (16, 384, 128, 64), 4):
            layout = route.prepare(grouped(weight.codes, 64).transpose(1, 2), cpu_routes.Kind(4, 4), torch.ones(6, 128))
            copied = copy.deepcopy(layout)
            assert torch.equal(route.integers(codes, copied), oracle(codes, weight))


def test_sums_beyond_float32_are_never_held_in_it():
    route = cpu_routes.choose(weight_of((2, 16384, 130, 16384), bits=8))
    assert route in (cpu_routes.FLOAT64, cpu_routes.INT_MM)


@pytest.mark.parametrize("kind", ["token_group", "token"])
def test_many_tokens_are_computed_in_blocks_with_the_same_outputs(kind):
    size = (700, 128, 600, 64)
    weight, codes = weight_of(size), codes_of(size)
    scales = torch.rand(2 if kind == "token_group" else 1, 700, 1) + 0.1
    integer = BACKENDS["cpu"]
    prepared = integer.prepare(weight)
    assert torch.equal(integer.linear(codes, scales, prepared), cpu.product(codes, scales, prepared))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["token_group", "token", "tensor"])
def test_backends_agree_within_float32_rounding(size, kind):
    weight, codes = weight_of(size), codes_of(size)
    groups, tokens, _ = codes.shape
    shape = {"token_group": (groups, tokens, 1), "token": (1, tokens, 1), "tensor": (1, 1, 1)}[kind]
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    outputs = [BACKENDS[name].linear(codes, scales, BACKENDS[name].prepare(weight)) for name in ("reference", "cpu")]
    exact = (oracle(codes, weight).double() * scales * weight.scales.double().t()[:, None]).sum(dim=0)
    bound = (oracle(codes.abs(), weight_abs(weight)).double() * scales * weight.scales.double().t()[:, None]).sum(dim=0)
    for y in outputs:
        assert y.dtype == torch.float32
        # Every output is a sum of I terms, each rounded to 2**-24 relative; sums of random signs stay far below I.
        assert ((y - exact).abs() <= bound * 2.0**-24 * 64 + 1e-12).all()


def weight_abs(weight):
    return GroupedWeight(weight.codes.abs(), weight.scales, weight.group)


def test_tokens_of_zeros_give_zeros():
    weight, codes = weight_of(SIZES[0]), codes_of(SIZES[0], fill=0)
    for one in BACKENDS.values():
        assert not one.linear(codes, torch.ones(2, 16, 1), one.prepare(weight)).any()


def test_a_scale_that_is_not_a_number_shows_in_the_output():
    weight, codes = weight_of(SIZES[0]), codes_of(SIZES[0])
    scales = torch.ones(2, 16, 1)
    scales[1, 3] = float("nan")
    for one in BACKENDS.values():
        y = one.linear(codes, scales, one.prepare(weight))
        assert y[3].isnan().all() and y[2].isfinite().all()


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        backend("referense")

"""Activation schemes: METHOD A.7 and E2."""

from __future__ import annotations

import pytest
import torch

from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES, FitData, row_factors


def tokens_of(tokens=400, columns=128):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, 5] *= 20
    return x * torch.rand(tokens, 1, generator=generator).add(0.1)


def fit_data(clip, tokens=None, group=64, percentile=99.9):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    return FitData(tokens_of() if tokens is None else tokens, weight, group, 4, clip, percentile)


def coded(name, data):
    """What the product sees, [M, I]."""
    scheme = ACTIVATION_SCHEMES[name]
    row = row_factors(name, scheme.fit(data), data.bits)
    u = data.tokens[None] if name != "token_group" else data.tokens.view(-1, 2, 64).transpose(0, 1)
    codes, scales = scheme.encode(u, row, data.bits)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= -8 and float(codes.max()) <= 7
    return (codes * scales).transpose(0, 1).reshape(data.tokens.shape)


def test_the_static_table_is_the_quantile_over_seven():
    data = fit_data("percentile")
    expected = torch.quantile(data.tokens.abs(), 0.999, dim=0) / 7
    assert torch.allclose(ACTIVATION_SCHEMES["static_channel"].fit(data), expected, rtol=1e-5)


def test_a_dead_channel_gets_the_floor_and_codes_of_zero():
    tokens = tokens_of()
    tokens[:, 3] = 0
    data = fit_data("percentile", tokens)
    assert float(ACTIVATION_SCHEMES["static_channel"].fit(data)[3]) == pytest.approx(1e-6 / 7)
    assert not coded("static_channel", data)[:, 3].any()


@pytest.mark.parametrize("name", ["static_tensor", "static_channel", "token", "token_group"])
def test_a_searched_clip_is_no_worse_than_absmax_on_what_it_was_searched_on(name):
    errors = [float((coded(name, fit_data(clip)) - tokens_of()).square().sum()) for clip in ("absmax", "mse")]
    assert errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.parametrize("name", ["static_tensor", "token", "token_group"])
def test_a_clip_searched_for_the_output_is_no_worse_there(name):
    weight = fit_data("mse").weight
    parts = [slice(0, 64), slice(64, 128)] if name == "token_group" else [slice(0, 128)]
    errors = []
    for clip in ("mse", "output"):
        difference = coded(name, fit_data(clip)) - tokens_of()
        errors.append(sum(float((difference[:, part] @ weight[:, part].T).square().sum()) for part in parts))
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_finer_scales_have_smaller_errors():
    order = ("static_tensor", "token", "token_group")
    errors = [float((coded(name, fit_data("mse")) - tokens_of()).norm()) for name in order]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["token", "token_group"])
def test_tokens_of_zeros_stay_zero(name):
    data = fit_data("absmax")
    tokens = data.tokens.clone()
    tokens[7] = 0
    scheme = ACTIVATION_SCHEMES[name]
    u = tokens[None] if name == "token" else tokens.view(-1, 2, 64).transpose(0, 1)
    codes, scales = scheme.encode(u, row_factors(name, scheme.fit(data), 4), 4)
    assert not codes[:, 7].any() and scales.isfinite().all()


@pytest.mark.parametrize("name", ["static_tensor", "token", "token_group"])
def test_a_value_that_is_not_a_number_shows_in_the_scales(name):
    """Integer codes cannot carry it; the output must not look healthy."""
    u = torch.randn(2, 5, 64)
    u[0, 3, 1] = float("nan")
    row = torch.ones(2 if name == "token_group" else 1, 1, 1)
    _, scales = ACTIVATION_SCHEMES[name].encode(u, row, 4)
    assert scales.isnan().any()

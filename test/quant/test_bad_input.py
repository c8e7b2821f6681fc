"""Calibration data and weights as they should not be: a clear error, or a fallback that the report lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from omega_qvla_core.errors import OmegaQVLAError, QuantizationError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant import Recipe, SideRecipe, calibrate, quantize_linears, quantize_policy
from omega_qvla_core.quant.scope import ACTION_HEAD, LANGUAGE, sites_of_linears

WIDTH, STEPS = 96, 3
RECIPES = {
    "executable": Recipe.preset("executable_w4a4"),
    "paper": Recipe.preset("paper_w4a4"),
    "per token": Recipe.preset("executable_w4a4").replace_sides(activation="token", rotation="svd_hadamard"),
    "static": Recipe.preset("static_clip_hadamard"),
    "centred": Recipe.preset("executable_w4a4").replace_sides(centring=True, hessian_weights="output_energy"),
    "auto": replace(
        Recipe.preset("auto_w4a4"),
        auto=replace(Recipe.preset("auto_w4a4").auto, smoothings=(0.5,), permutations=("serpentine",)),
    ),
}


def model_of(seed=0, width=WIDTH):
    torch.manual_seed(seed)
    model = nn.Module()
    model.linear = nn.Linear(width, 40)
    return model.requires_grad_(False)


def quantized(recipe, x, steps=STEPS, model=None):
    """Quantize one linear on ``x [T, n, I]``; returns (module, result)."""
    model = model or model_of(width=x.shape[-1])
    sites = sites_of_linears(["linear"], ACTION_HEAD if steps else LANGUAGE)
    with calibrate(model, sites) as calibration:
        for index in range(x.shape[0]):
            if steps:
                with denoise_step(index, steps):
                    model.linear(x[index])
            else:
                model.linear(x[index])
    return model, quantize_linears(model, sites, recipe, calibration)[0]


def tokens(seed=1, steps=STEPS, count=60, width=WIDTH):
    return torch.randn(steps, count, width, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    with denoise_step(0, STEPS):
        return model.linear(x)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_dead_channels(recipe):
    x = tokens()
    x[..., 10:30] = 0
    model, result = quantized(recipe, x)
    assert result.error < 0.5
    assert torch.isfinite(outputs(model, tokens(2)[0])).all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_tokens_of_zeros_in_calibration_and_in_use(recipe):
    x = tokens()
    x[:, ::3] = 0
    model, result = quantized(recipe, x)
    assert result.error < 0.5
    y = outputs(model, torch.cat((torch.zeros(2, WIDTH), x[0, 1:3])))
    assert torch.isfinite(y).all()
    if recipe.action_head.centring is False:
        assert torch.equal(y[:2], model.linear.site.bias.expand(2, -1))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_denoise_step_of_zeros_only(recipe):
    x = tokens()
    x[1] = 0
    model, result = quantized(recipe, x)
    assert np.isfinite(result.error) and result.error < 0.5
    with denoise_step(1, STEPS):
        assert torch.isfinite(model.linear(x[0])).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", ["executable_w4a4", "rtn_static_absmax"])
def test_values_that_are_not_finite_name_the_layer(bad, recipe):
    x = tokens()
    x[1, 3, 5] = bad
    with pytest.raises(QuantizationError, match="linear: calibration saw NaN or Inf"):
        quantized(Recipe.preset(recipe), x)
    model = model_of()
    model.linear.weight[3, 3] = bad
    with pytest.raises(QuantizationError, match="^linear: the weight holds NaN or Inf"):
        quantized(Recipe.preset(recipe), tokens(), model=model)


def test_values_whose_squares_overflow_are_refused_by_name():
    with pytest.raises(QuantizationError, match="linear"):
        quantized(RECIPES["executable"], tokens() * 1e30)


def test_fewer_tokens_than_channels_are_listed_in_the_report():
    _, result = quantized(RECIPES["executable"], tokens(count=20))
    assert any("60 tokens for 96 channels" in note for note in result.notes)


def test_identical_tokens_make_a_singular_hessian_that_damping_carries():
    x = tokens()[:, :1].expand(STEPS, 60, WIDTH)
    model, result = quantized(RECIPES["executable"], x)
    assert np.isfinite(result.error) and torch.isfinite(outputs(model, tokens(2)[0])).all()


def test_a_singular_hessian_without_damping_is_noted():
    x = tokens()[:, :1].expand(STEPS, 60, WIDTH)
    _, result = quantized(RECIPES["executable"].replace_sides(damping=0.0), x)
    assert any("damping raised from 0.0" in note for note in result.notes)


@pytest.mark.parametrize(
    "fields", [{"group": 50, "activation_group": 25}, {"group": 64}, {"group": 1000}, {"block": 7}]
)
def test_groups_and_blocks_that_do_not_divide_the_width_leave_a_short_last_one(fields):
    if "group" in fields and "activation_group" not in fields:
        fields = {**fields, "activation_group": fields["group"]}
    recipe = Recipe("odd", action_head=SideRecipe(**fields, weight_bits=8, activation_bits=8))
    model, result = quantized(recipe, tokens(width=97))
    assert result.error < 0.03
    assert outputs(model, tokens(2, width=97)[0]).shape == (60, 40)


def test_a_layer_never_seen_is_named():
    model = model_of()
    sites = sites_of_linears(["linear"], LANGUAGE)
    with calibrate(model, sites) as calibration:
        pass
    with pytest.raises(QuantizationError, match="linear was never seen in calibration"):
        quantize_linears(model, sites, RECIPES["executable"], calibration)
    with pytest.raises(QuantizationError, match="linear was never seen in calibration"):
        quantize_linears(model, sites, RECIPES["auto"], calibration)


def test_too_few_tokens_are_refused():
    for recipe in (RECIPES["executable"], RECIPES["auto"]):
        with pytest.raises(QuantizationError, match="5 tokens seen at denoise step 0 of 3"):
            quantized(recipe, tokens(count=5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_refused(bad, policy, calibration_observations):
    first = calibration_observations[0]
    broken = replace(first, state=np.full_like(first.state, bad))
    with pytest.raises(OmegaQVLAError, match=r"NaN|nan|finite|Inf"):
        quantize_policy(policy, Recipe.preset("rtn_static_absmax"), [broken, *calibration_observations])

"""The automatic choice: what helps is taken, what hurts is not, and a byte budget is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from omega_qvla_core.errors import ConfigError, QuantizationError
from omega_qvla_core.quant import Recipe, calibrate, quantize_linears, with_activations
from omega_qvla_core.quant.auto import Candidate, Decision, spend
from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.layers_check import LayerData, layer_error, quantized_layer, read_layers
from omega_qvla_core.quant.recipe import SideRecipe
from omega_qvla_core.quant.scope import LANGUAGE, sites_of_linears

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "quant" / "layers.safetensors"
AUTO = Recipe.preset("auto_w4a4")
FEW = replace(AUTO, auto=AutoChoice(smoothings=(0.5,), permutations=("none",), clips=("output",), byte_budget=None))


@lru_cache
def golden():
    return read_layers(GOLDEN)


@pytest.mark.parametrize("layer", ["llm_q", "odd_dims"])  # the others take longer: docs/quantization.md
def test_what_was_chosen_without_the_evaluation_inputs_is_as_good_as_the_better_preset_on_them(layer):
    data, base = golden()[layer], Recipe.preset("executable_w4a4")
    better = min(layer_error(data, recipe)["error"] for recipe in (base, with_activations(base, "token")))
    assert layer_error(data, AUTO)["error"] <= 1.03 * better


def massive_outliers(tokens=200, width=128, rows=64):
    """A few tokens carry one massive channel on which the outputs rest, as in some down-projections.

    Coded as it is, the massive value takes the largest code exactly and costs nothing. A rotation spreads it over its
    block, where it rounds, and the other channels of the token drown.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator) * 0.02
    weight[:, 5] += torch.randn(rows, generator=generator)

    def inputs(seed):
        x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)) * 0.05
        x[:, ::4, 5] = 1000.0 * (1 + 0.2 * torch.rand(tokens // 4, generator=torch.Generator().manual_seed(seed)))
        return x

    return LayerData(weight, inputs(1), inputs(2))


def test_rotation_is_left_out_where_massive_outliers_make_it_hurt():
    data = massive_outliers()
    base = Recipe.preset("executable_w4a4")
    rotated = {r: layer_error(data, base.replace_sides(rotation=r))["error"] for r in ("hadamard", "svd_hadamard")}
    bare = layer_error(data, base.replace_sides(rotation="none"))["error"]
    assert all(error > 10 * bare for error in rotated.values())
    chosen = quantized_layer(data, AUTO).linear.site.spec.recipe
    assert chosen.rotation == "none"
    assert layer_error(data, AUTO)["error"] <= 1.03 * bare


def test_where_rotation_helps_it_stays():
    assert quantized_layer(golden()["llm_q"], FEW).linear.site.spec.recipe.rotation == "hadamard"


class Two(nn.Module):
    """A layer that rotation helps and one that does not matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.a(x), self.b(x)


def two(recipe, progress=None):
    model, sites = Two().requires_grad_(False), sites_of_linears(["a", "b"], LANGUAGE)
    spread = torch.linspace(-2, 2, 64).exp()
    with calibrate(model, sites) as calibration:
        model(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * spread)
    return model, quantize_linears(model, sites, recipe, calibration, progress=progress)


def test_decisions_say_what_was_tried_and_taken():
    calls = []
    _, results = two(FEW, progress=lambda done, total, what: calls.append(what))
    for result in results:
        decision = json.loads(json.dumps(result.decision, allow_nan=False))
        assert decision["taken"]["rotation"] == result.site.spec.recipe.rotation
        assert {tried["rotation"] for tried in decision["tried"]} == {"none", "hadamard", "svd_hadamard"}
        assert decision["taken"]["error"] <= decision["start"]["error"]
        assert decision["taken"]["bytes"] == sum(
            tensor.numel() * tensor.element_size() for tensor in result.site.tensors().values()
        )
    assert calls[:2] == ["choose a", "choose b"] and calls[-1] == ""


def test_without_auto_nothing_is_decided():
    assert [result.decision for result in two(Recipe.preset("w8a8"))[1]] == [None, None]


def test_a_byte_budget_buys_the_largest_gains_and_is_kept():
    def stored(model):
        return sum(t.numel() * t.element_size() for name in "ab" for t in getattr(model, name).site.tensors().values())

    in_float16 = 2 * 64 * (64 + 32)
    errors = {}
    for budget in (0.3, 0.45, 1.0):
        model, results = two(replace(FEW, auto=replace(FEW.auto, byte_budget=budget)))
        assert stored(model) <= budget * in_float16
        errors[budget] = sum(result.error**2 for result in results)
    assert errors[0.3] > errors[0.45] > errors[1.0]
    assert {result.site.spec.recipe.weight_bits for result in results} == {8}
    with pytest.raises(QuantizationError, match="byte budget"):
        two(replace(FEW, auto=replace(FEW.auto, byte_budget=0.2)))


def test_money_goes_where_it_takes_most_off_per_byte():
    recipe = SideRecipe()

    def decision(start, *others):
        candidates = tuple(Candidate(recipe, error, size) for error, size in (start, *others))
        return Decision(candidates[0], candidates[0], candidates)

    decisions = [decision((0.2, 100), (0.1, 200)), decision((0.2, 100), (0.05, 150)), decision((0.3, 100), (0.3, 90))]
    assert [taken.bytes for taken in spend(decisions, 340)] == [100, 150, 90]
    assert [taken.bytes for taken in spend(decisions, 440)] == [200, 150, 90]
    with pytest.raises(QuantizationError, match="need 290"):
        spend(decisions, 280)


def test_few_tokens_are_split_and_too_few_are_refused():
    assert layer_error(massive_outliers(tokens=20), FEW)["error"] < 0.1
    with pytest.raises(QuantizationError, match="12 tokens seen, at least 16"):
        layer_error(massive_outliers(tokens=12), FEW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotations": ("hadamart",)}, "did you mean 'hadamard'"),
        ({"permutations": ("zigzag",)}, "permutation 'zigzag'"),
        ({"clips": ("max",)}, "did you mean 'absmax'"),
        ({"smoothings": (1.5,)}, "smoothing is 1.5"),
        ({"low_ranks": (0,)}, "at least 1"),
        ({"byte_budget": 30.0}, "byte_budget is 30.0"),
        ({"folds": 1}, "folds is 1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"margin": 1.0}, "margin is 1.0"),
    ],
)
def test_choices_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AutoChoice(**fields)


def test_a_recipe_of_an_older_release_has_no_choice():
    data = Recipe.preset("executable_w4a4").to_json()
    del data["auto"], data["language"]["low_rank"], data["action_head"]["low_rank"]
    assert Recipe.from_json(data) == Recipe.preset("executable_w4a4")


def test_a_low_rank_branch_lowers_the_error():
    data = golden()["llm_q"]
    errors = [
        layer_error(data, Recipe.preset("executable_w4a4").replace_sides(solver="rtn", low_rank=rank))["error"]
        for rank in (0, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ConfigError, match="low_rank"):
        SideRecipe(low_rank=4, output_rotation=True, shared_input=False)

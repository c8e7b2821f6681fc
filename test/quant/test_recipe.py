"""Recipes as data: JSON and back, errors that name the nearest valid thing."""

from __future__ import annotations

import json

import pytest

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant import PRESETS, Override, Recipe, SideRecipe, with_activations


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    recipe = Recipe.preset(name)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert Recipe.from_json(json.dumps(recipe.to_json())) == recipe


def test_overrides_survive_json_and_the_last_match_wins():
    recipe = Recipe(
        "mixed",
        overrides=(
            Override("*.down_proj", {"weight_bits": 8}),
            Override("*.layers.1.*", {"group": 32, "activation_group": 32}),
        ),
    )
    recipe = Recipe.from_json(recipe.to_json())
    assert recipe.resolve("model.layers.0.mlp.down_proj", "language").weight_bits == 8
    second = recipe.resolve("model.layers.1.mlp.down_proj", "action_head")
    assert (second.weight_bits, second.group) == (8, 32)
    assert recipe.resolve("model.layers.0.mlp.up_proj", "language") == recipe.language


def test_sides_may_differ():
    recipe = Recipe("two", language=SideRecipe(rotation="svd_hadamard"))
    assert recipe.resolve("x", "language").rotation == "svd_hadamard"
    assert recipe.resolve("x", "action_head").rotation == "hadamard"


def change(recipe, **values):
    return {**recipe.to_json(), **values}


@pytest.mark.parametrize(
    "data,message",
    [
        ({"name": "x", "schema_version": 1, "langage": {}}, "did you mean 'language'"),
        ({"name": "x", "schema_version": 1, "language": {"weight_bit": 4}}, "did you mean 'weight_bits'"),
        ({"name": "x", "schema_version": 1, "overrides": [{"pattern": "*", "fields": {"grup": 4}}]}, "'group'"),
        ({"name": "x", "schema_version": 1, "overrides": {"*": {}}}, "must be a list"),
        ({"name": "x", "schema_version": 2}, "schema_version is 2"),
        ({"name": "x"}, "schema_version"),
        ({"name": "x", "schema_version": 1, "unquantized_dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"name": "x", "schema_version": 1, "language": {"weight_bits": "4"}}, "must be of type int"),
        ([], "must be a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_json_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_json(data)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rotation": "hadamart"}, "did you mean 'hadamard'"),
        ({"solver": "gtpq"}, "did you mean 'gptq'"),
        ({"activation": "tokens"}, "did you mean 'token'"),
        ({"permutation": "zigzag"}, "permutation 'zigzag'"),
        ({"permutation_score": "acts"}, "did you mean 'act'"),
        ({"scale_grid": "coarse"}, "scale_grid"),
        ({"clip": "max"}, "did you mean 'absmax'"),
        ({"hessian_weights": "even"}, "hessian_weights"),
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"weight_bits": 12}, "weight_bits is 12"),
        ({"activation_bits": 9}, "activation_bits is 9"),
        ({"activation_bits": 16}, "belong together"),
        ({"activation": "none"}, "belong together"),
        ({"weight_bits": 16}, "activations but not weights"),
        ({"smoothing": 1.5}, "smoothing is 1.5"),
        ({"block": 0}, "block is 0"),
        ({"group": -1}, "group is -1"),
        ({"damping": 2.0}, "damping is 2.0"),
        ({"percentile": 10.0}, "percentile is 10.0"),
        ({"clip": "percentile"}, "does not go with"),
        ({"output_rotation": True}, "shared_input"),
        ({"activation_group": 48}, "does not divide"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SideRecipe(**fields)


def test_an_override_that_makes_a_bad_recipe_is_refused_at_once():
    with pytest.raises(ConfigError, match="weight_bits is 1"):
        Recipe("x", overrides=(Override("*", {"weight_bits": 1}),))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'paper_w4a4'"):
        Recipe.preset("paper_w4a")


def test_what_executes_and_what_is_simulated():
    assert Recipe.preset("executable_w4a4").language.executable
    assert Recipe.preset("rtn_static_absmax").action_head.executable
    assert not Recipe.preset("paper_w4a4").action_head.executable
    assert not Recipe.preset("w4a16").language.executable
    assert not Recipe.preset("fp16").language.quantized


def test_the_published_recipe_leaves_its_action_head_static():
    recipe = with_activations(Recipe.preset("paper_w4a4"), "static")
    assert recipe.language.activation == "static_channel"
    assert recipe.action_head == Recipe.preset("paper_w4a4").action_head
    with pytest.raises(ConfigError, match="token_group"):
        with_activations(recipe, "token_groups")


def test_a_recipe_loads_by_name_or_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema_version": 1, "name": "mine", "language": {"weight_bits": 8}}))
    assert Recipe.load(path).language.weight_bits == 8
    assert Recipe.load("w4a8") == Recipe.preset("w4a8")
    for bad, message in ((tmp_path / "missing.json", "missing.json"), ("w4a9", "did you mean")):
        with pytest.raises(ConfigError, match=message):
            Recipe.load(bad)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ConfigError, match="mine.json.*name"):
        Recipe.load(path)

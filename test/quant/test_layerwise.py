"""Calibration of Pi 0.5 layer by layer from disk: the same pack as in memory, resumable at every layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layerwise_support import (
    assert_same,
    assert_same_statistics,
    both_statistics,
    contents,
    in_memory,
    slow,
    stop_at_unit,
    stop_before_writing,
)

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.errors import ObservationError, PackError, QuantizationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import Recipe, quantize_checkpoint
from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.recipe import Override

EXECUTABLE = Recipe.preset("executable_w4a4")
STATIC = Recipe.preset("rtn_static_absmax")
SIXTEEN = {"weight_bits": 16, "activation_bits": 16, "activation": "none", "clip": "absmax"}
PARTLY = Recipe("partly", overrides=(Override("*.o_proj", SIXTEEN), Override("*.v_proj", {"weight_bits": 8})))
CHOICE = AutoChoice(("none", "hadamard"), smoothings=(None,), permutations=("none",), clips=("absmax",), tokens=32)
CHOOSING = replace(STATIC, name="choosing", auto=CHOICE)
BUDGET = replace(CHOOSING, name="budget", auto=replace(CHOICE, byte_budget=0.3))


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layerwise") / "checkpoint"
    policy.save(folder)
    return folder


@pytest.fixture(scope="module")
def seen(calibration_observations) -> list[Observation]:
    """Two batches, the second one short."""
    return [*calibration_observations, *calibration_observations[:3]]


@pytest.fixture(scope="module")
def static(checkpoint, seen, tmp_path_factory) -> Path:
    """The pack of ``STATIC`` from memory."""
    return in_memory(checkpoint, STATIC, seen, tmp_path_factory.mktemp("static") / "pack")


@pytest.mark.parametrize("recipe", [EXECUTABLE, PARTLY, CHOOSING], ids=lambda recipe: recipe.name)
def test_the_pack_is_that_of_the_quantizer_in_memory(recipe, checkpoint, seen, tmp_path):
    quantize_checkpoint(checkpoint, recipe, tmp_path / "streamed", observations=seen)
    memory = in_memory(checkpoint, recipe, seen, tmp_path / "memory")
    assert_same(tmp_path / "streamed", memory)
    assert ("decision" in contents(tmp_path / "streamed")[0]["record"]) == (recipe is CHOOSING)
    assert not (tmp_path / "streamed" / "units").exists()


def test_statistics_and_token_samples_are_those_of_the_calibration_in_memory(checkpoint, seen, tmp_path):
    pairs = both_statistics(checkpoint, STATIC, seen, tmp_path, reservoir_tokens=20)
    assert len(pairs) == 4 * 4 and all(len(one.tokens()[0]) == 20 for one, _ in pairs)
    assert_same_statistics(pairs)


def test_models_that_start_with_weights_of_their_own_get_those_of_the_checkpoint(
    checkpoint, seen, static, tmp_path, monkeypatch
):
    monkeypatch.setattr("omega_qvla_core.quant.layerwise.model_without_weights", build_model)
    quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert_same(tmp_path, static)


@pytest.mark.parametrize("unit", [5, 14, *slow(1, 10)])
def test_a_run_that_stops_anywhere_goes_on(unit, checkpoint, seen, static, tmp_path):
    stop_at_unit(checkpoint, STATIC, seen, tmp_path, unit)
    result = quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert result.resumed == unit
    assert_same(tmp_path, static)


@pytest.mark.parametrize("file", ["language_000_kv", "block_000_x", *slow("prefix", "steps", "modulations")])
def test_a_run_that_is_cut_off_inside_a_stage_goes_on(file, checkpoint, seen, static, tmp_path, monkeypatch):
    stop_before_writing(file, checkpoint, STATIC, seen, tmp_path, monkeypatch)
    quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert_same(tmp_path, static)


@pytest.mark.parametrize("unit", [6, 13])
@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_lost_and_damaged_activations_are_computed_again(damage, unit, checkpoint, seen, static, tmp_path):
    stop_at_unit(checkpoint, STATIC, seen, tmp_path, unit)
    for path in (tmp_path / "units" / "activations").iterdir():
        if damage == "lost":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-8])
    quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert_same(tmp_path, static)


def test_what_cannot_be_done_is_refused_before_anything_is_written(checkpoint, seen, tmp_path):
    blind = [replace(one, images={"front": one.images["front"]}) for one in seen]
    for recipe, observations, error, message in (
        (EXECUTABLE, seen[:3], QuantizationError, "3 calibration observations"),
        (BUDGET, seen, QuantizationError, "'budget' has a byte budget, which is spent over all layers at once"),
        (EXECUTABLE, [*seen[:-1], blind[-1]], ObservationError, "camera 'wrist' is missing"),
    ):
        with pytest.raises(error, match=message):
            quantize_checkpoint(checkpoint, recipe, tmp_path / "out", observations=observations)
    assert not (tmp_path / "out").exists()


def test_other_observations_are_not_mixed_with_what_is_there(checkpoint, seen, tmp_path):
    stop_at_unit(checkpoint, STATIC, seen, tmp_path, 3)
    with pytest.raises(PackError, match="another recipe, checkpoint, robot setup or calibration"):
        quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen[1:])

"""Calibration layer by layer from disk: the same pack as in memory, resumable at every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.quant import Recipe, quantize_checkpoint, quantize_policy, save_pack
from omega_qvla_core.quant.recipe import Override
from omega_qvla_core.runtime import Policy

EXECUTABLE = Recipe.preset("executable_w4a4")
SIXTEEN = {"weight_bits": 16, "activation_bits": 16, "activation": "none", "clip": "absmax"}
PARTLY = Recipe("partly", overrides=(Override("*.o_proj", SIXTEEN), Override("*.v_proj", {"weight_bits": 8})))


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layerwise") / "checkpoint"
    policy.save(folder)
    return folder


@pytest.fixture(scope="module")
def seen(calibration_observations) -> list:
    """Two batches, the second one short."""
    return [*calibration_observations, *calibration_observations[:3]]


def contents(folder: Path) -> tuple[dict, dict]:
    with safe_open(folder / "pack.safetensors", framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(one: Path, other: Path) -> None:
    (left, ours), (right, theirs) = contents(one), contents(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert left["sites"] == right["sites"] and left["content_sha256"] == right["content_sha256"]


@pytest.mark.parametrize("recipe", [EXECUTABLE, PARTLY], ids=lambda recipe: recipe.name)
def test_the_pack_is_that_of_the_quantizer_in_memory(recipe, checkpoint, seen, tmp_path):
    quantize_checkpoint(checkpoint, recipe, tmp_path / "streamed", observations=seen)
    quantized, _ = quantize_policy(Policy.load(checkpoint), recipe, seen)
    save_pack(quantized, tmp_path / "memory")
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert not (tmp_path / "streamed" / "units").exists()


def test_models_that_start_with_weights_of_their_own_get_those_of_the_checkpoint(
    checkpoint, seen, tmp_path, monkeypatch
):
    recipe = Recipe.preset("rtn_static_absmax")
    quantize_checkpoint(checkpoint, recipe, tmp_path / "empty", observations=seen)
    monkeypatch.setattr("omega_qvla_core.quant.layerwise.model_without_weights", build_model)
    quantize_checkpoint(checkpoint, recipe, tmp_path / "random", observations=seen)
    assert_same(tmp_path / "empty", tmp_path / "random")


class _Stopped(Exception):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("unit", [1, 5, 10, 14])
def test_a_run_that_stops_anywhere_goes_on(unit, checkpoint, seen, tmp_path):
    recipe = Recipe.preset("rtn_static_absmax")

    def stop(done: int, total: int, what: str) -> None:
        if done == unit:
            raise _Stopped

    with pytest.raises(_Stopped):
        quantize_checkpoint(checkpoint, recipe, tmp_path / "a", observations=seen, progress=stop)
    result = quantize_checkpoint(checkpoint, recipe, tmp_path / "a", observations=seen)
    assert result.resumed == unit
    quantize_checkpoint(checkpoint, recipe, tmp_path / "b", observations=seen)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_lost_activations_are_computed_again(checkpoint, seen, tmp_path):
    recipe = Recipe.preset("rtn_static_absmax")

    def stop(done: int, total: int, what: str) -> None:
        if done == 6:
            raise _Stopped

    with pytest.raises(_Stopped):
        quantize_checkpoint(checkpoint, recipe, tmp_path / "a", observations=seen, progress=stop)
    for path in (tmp_path / "a" / "units" / "activations").iterdir():
        path.unlink()
    quantize_checkpoint(checkpoint, recipe, tmp_path / "a", observations=seen)
    quantize_checkpoint(checkpoint, recipe, tmp_path / "b", observations=seen)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_done_is_refused_before_anything_is_written(checkpoint, seen, tmp_path):
    for recipe, observations, message in (
        (EXECUTABLE, seen[:3], "3 calibration observations"),
        (Recipe.preset("executable_whole"), seen, "scope 'whole'"),
        (Recipe.preset("auto_w4a4"), seen, "quantize in memory"),
    ):
        with pytest.raises(QuantizationError, match=message):
            quantize_checkpoint(checkpoint, recipe, tmp_path / "out", observations=observations)
    assert not (tmp_path / "out").exists()

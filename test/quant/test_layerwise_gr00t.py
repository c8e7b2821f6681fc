"""Calibration of GR00T N1.5 layer by layer from disk: the same pack as in memory, resumable at every stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from layerwise_support import (
    assert_same,
    assert_same_statistics,
    both_statistics,
    in_memory,
    slow,
    stop_at_unit,
    stop_before_writing,
)
from safetensors.torch import load_file, save_file
from test_gr00t_policy import foundation_folders, observations

from omega_qvla_core.errors import ObservationError
from omega_qvla_core.quant import Recipe, quantize_checkpoint
from omega_qvla_core.quant.recipe import Override

EXECUTABLE = Recipe.preset("executable_w4a4")
STATIC = Recipe.preset("rtn_static_absmax")
SIXTEEN = {"weight_bits": 16, "activation_bits": 16, "activation": "none", "clip": "absmax"}
# Keys and values of the features apart, and a site of every tower that stays.
PARTLY = replace(
    STATIC,
    name="partly",
    overrides=(
        Override("*.to_k", {"weight_bits": 8}),
        Override("*.to_out.0", SIXTEEN),
        Override("*.layers.1.*", SIXTEEN),
    ),
)
SITES = 3 * 4 + 2 * 5 + 2 * 4
# Some sites of the third block are done.
IN_THIRD_BLOCK = 3 * 4 + 5 + 4 + 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return foundation_folders().nvidia_folder(tmp_path_factory.mktemp("gr00t") / "tiny")


@pytest.fixture(scope="module")
def seen() -> list:
    return observations(8)


@pytest.fixture(scope="module")
def static(checkpoint, seen, tmp_path_factory) -> Path:
    """The pack of ``STATIC`` from memory."""
    return in_memory(checkpoint, STATIC, seen, tmp_path_factory.mktemp("static") / "pack")


def with_projected_features(folder: Path) -> Path:
    """A checkpoint with a linear between language tower and adapter."""
    folders = foundation_folders()
    folders.nvidia_folder(folder)
    tiny = folders.GOLDEN / "gr00t" / "tiny_linear"
    for name in ("config.json", "eagle_config.json"):
        folders.write_json(folder / name, json.loads((tiny / name).read_text()))
    folders.write_shards(folder, load_file(tiny / "model.safetensors"), 2)
    return folder


def without_adapter(folder: Path) -> Path:
    """A checkpoint whose head reads the language tower's output as it is."""
    folders = foundation_folders()
    folders.nvidia_folder(folder, shards=1)
    folders.change_json(folder / "config.json", lambda data: data["action_head_cfg"].update(use_vlln=False))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if ".vl" not in name}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("recipe", [EXECUTABLE, PARTLY], ids=lambda recipe: recipe.name)
def test_the_pack_is_that_of_the_quantizer_in_memory(recipe, checkpoint, seen, tmp_path):
    result = quantize_checkpoint(checkpoint, recipe, tmp_path / "streamed", observations=seen)
    assert_same(tmp_path / "streamed", in_memory(checkpoint, recipe, seen, tmp_path / "memory"))
    assert result.resumed == 0 and not (tmp_path / "streamed" / "units").exists()


@pytest.mark.parametrize("build", [with_projected_features, without_adapter])
def test_other_ways_from_the_language_tower_to_the_head(build, seen, tmp_path):
    folder = build(tmp_path / "checkpoint")
    quantize_checkpoint(folder, STATIC, tmp_path / "streamed", observations=seen)
    assert_same(tmp_path / "streamed", in_memory(folder, STATIC, seen, tmp_path / "memory"))


def test_statistics_and_token_samples_are_those_of_the_calibration_in_memory(checkpoint, seen, tmp_path):
    """Sites of keys and values have one row and come before the loop: their samples are seeded accordingly."""
    pairs = both_statistics(checkpoint, STATIC, seen, tmp_path, reservoir_tokens=20)
    assert len(pairs) == SITES and all(len(one.tokens()[0]) == 20 for one, _ in pairs)
    assert [one.steps for one, _ in pairs if one.name.endswith(".kv")] == [0, 0]
    assert_same_statistics(pairs)


@pytest.mark.parametrize("unit", [9, SITES - 1])
def test_a_run_that_stops_anywhere_goes_on(unit, checkpoint, seen, static, tmp_path):
    stop_at_unit(checkpoint, STATIC, seen, tmp_path, unit)
    result = quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert result.resumed == unit
    assert_same(tmp_path, static)


@pytest.mark.parametrize("file", ["features_000_x", "block_001_x", *slow("embedded", "steps")])
def test_a_run_that_is_cut_off_inside_a_stage_goes_on(file, checkpoint, seen, static, tmp_path, monkeypatch):
    stop_before_writing(file, checkpoint, STATIC, seen, tmp_path, monkeypatch)
    quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert_same(tmp_path, static)


@pytest.mark.parametrize("file", ["prefix", "block_001_x"])
def test_a_damaged_stage_file_is_made_again(file, checkpoint, seen, static, tmp_path):
    stop_at_unit(checkpoint, STATIC, seen, tmp_path, IN_THIRD_BLOCK)
    folder = tmp_path / "units" / "activations"
    # What no later stage reads is gone.
    assert {one.stem for one in folder.iterdir()} == {
        "prefix",
        "features_002_x",
        "modulations",
        "block_001_x",
        "block_002_x",
    }
    path = folder / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    quantize_checkpoint(checkpoint, STATIC, tmp_path, observations=seen)
    assert_same(tmp_path, static)


def test_observations_of_other_cameras_are_refused_before_anything_is_written(checkpoint, seen, tmp_path):
    wrong = [*seen[:-1], replace(seen[-1], images={"front": seen[-1].images["front"]})]
    with pytest.raises(ObservationError, match="camera 'wrist'"):
        quantize_checkpoint(checkpoint, STATIC, tmp_path / "out", observations=wrong)
    assert not (tmp_path / "out").exists()

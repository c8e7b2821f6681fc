"""Scope ``whole`` calibrated layer by layer from disk, vision tower first: the same pack as in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from test_gr00t_policy import foundation_folders
from test_gr00t_policy import observations as gr00t_observations

from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import Recipe, quantize_checkpoint
from omega_qvla_core.quant.recipe import WholeRecipe

EXECUTABLE = Recipe.preset("executable_whole")
STATIC_SIDE = Recipe.preset("rtn_static_absmax").language
# Vision with static scales, so that its statistics count, and one embodiment alone.
STATIC = replace(
    Recipe.preset("rtn_static_absmax"),
    name="static_whole",
    whole=WholeRecipe(vision=STATIC_SIDE, adapter=STATIC_SIDE, embodiments="contract"),
)


@dataclass(frozen=True)
class Case:
    """A checkpoint with the observations to calibrate on."""

    checkpoint: Path
    seen: Sequence[Observation]


@pytest.fixture(scope="module", params=["pi05", "gr00t"])
def case(request, policy, calibration_observations, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    if request.param == "gr00t":
        return Case(foundation_folders().nvidia_folder(folder), gr00t_observations(8))
    policy.save(folder)
    return Case(folder, [*calibration_observations, *calibration_observations[:3]])


@pytest.fixture(scope="module")
def static(case, tmp_path_factory) -> Path:
    """The pack of ``STATIC`` from memory."""
    return in_memory(case.checkpoint, STATIC, case.seen, tmp_path_factory.mktemp("static") / "pack")


def test_the_pack_is_that_of_the_quantizer_in_memory(case, tmp_path):
    quantize_checkpoint(case.checkpoint, EXECUTABLE, tmp_path / "streamed", observations=case.seen)
    assert_same(tmp_path / "streamed", in_memory(case.checkpoint, EXECUTABLE, case.seen, tmp_path / "memory"))


def test_statistics_and_token_samples_are_those_of_the_calibration_in_memory(case, tmp_path):
    pairs = both_statistics(case.checkpoint, STATIC, case.seen, tmp_path, reservoir_tokens=20)
    assert any("vision" in one.name for one, _ in pairs) and all(len(one.tokens()[0]) == 20 for one, _ in pairs)
    assert_same_statistics(pairs)


@pytest.mark.parametrize("unit", [9, *slow(1)])
def test_a_run_that_stops_anywhere_goes_on(unit, case, static, tmp_path):
    """Before the parts are done, and at a layer of the vision tower."""
    stop_at_unit(case.checkpoint, STATIC, case.seen, tmp_path, unit)
    result = quantize_checkpoint(case.checkpoint, STATIC, tmp_path, observations=case.seen)
    assert result.resumed == unit
    assert_same(tmp_path, static)
    assert "part." in "".join(contents(tmp_path)[1])


@pytest.mark.parametrize("file", ["vision_000_x", *slow("embedded", "steps")])
def test_a_run_that_is_cut_off_inside_a_stage_goes_on(file, case, static, tmp_path, monkeypatch):
    stop_before_writing(file, case.checkpoint, STATIC, case.seen, tmp_path, monkeypatch)
    quantize_checkpoint(case.checkpoint, STATIC, tmp_path, observations=case.seen)
    assert_same(tmp_path, static)


def test_damaged_parts_and_activations_are_made_again(case, static, tmp_path):
    stop_at_unit(case.checkpoint, STATIC, case.seen, tmp_path, 14)
    units = tmp_path / "units"
    damaged = [max(units.glob("*.safetensors")), *(units / "activations").iterdir()]
    assert len(damaged) > 1
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-8])
    result = quantize_checkpoint(case.checkpoint, STATIC, tmp_path, observations=case.seen)
    assert result.resumed == 13
    assert_same(tmp_path, static)

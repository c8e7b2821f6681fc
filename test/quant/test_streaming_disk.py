"""Quantizing from disk, unit by unit: the same pack as in memory, resumable, strict."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from omega_qvla_core.errors import CheckpointError, PackError, QuantizationError
from omega_qvla_core.quant import Recipe, load_pack, quantize_policy, save_pack
from omega_qvla_core.quant.memory import meta_model, whole_accounting
from omega_qvla_core.quant.part_files import read_info
from omega_qvla_core.quant.policy import calibrate_policy, round_unquantized
from omega_qvla_core.quant.recipe import Override
from omega_qvla_core.quant.scope import find_sites
from omega_qvla_core.quant.streaming import needs_calibration, quantize_checkpoint
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.random_checkpoint import write_random_checkpoint
from omega_qvla_core.strict_json import write_json

RTN = Recipe.preset("rtn")


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "checkpoint"
    policy.save(folder)
    return folder


def contents(folder: Path) -> tuple[dict, dict]:
    with safe_open(folder / "pack.safetensors", framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


MIXED = replace(
    RTN,
    name="mixed",
    overrides=(Override("*.o_proj", {"weight_bits": 16, "activation_bits": 16, "activation": "none"}),),
)


@pytest.mark.parametrize("recipe", [RTN, Recipe.preset("rtn_whole"), MIXED], ids=lambda recipe: recipe.name)
def test_the_pack_is_that_of_the_quantizer_in_memory(recipe, checkpoint, calibration_observations, tmp_path):
    result = quantize_checkpoint(checkpoint, recipe, tmp_path / "streamed")
    quantized, _ = quantize_policy(Policy.load(checkpoint), recipe, calibration_observations)
    save_pack(quantized, tmp_path / "memory")
    streamed, memory = contents(tmp_path / "streamed"), contents(tmp_path / "memory")
    assert same(streamed[1], memory[1])
    for key in ("format", "model_sha256", "content_sha256", "sites"):
        assert streamed[0][key] == memory[0][key]
    assert not (tmp_path / "streamed" / "units").exists() and result.resumed == 0
    loaded = load_pack(tmp_path / "streamed")
    actions = [one.infer(calibration_observations[0]).actions for one in (loaded, quantized)]
    assert np.array_equal(*actions)


def test_the_result_says_what_it_took(checkpoint, policy, tmp_path):
    result = quantize_checkpoint(checkpoint, RTN, tmp_path)
    stored = whole_accounting(meta_model(policy.description.model), RTN, policy.spec.num_steps).stored
    assert stored < result.file_bytes < stored + 64 * 1024
    assert result.peak_bytes > 2**20 and result.units > 16
    assert 0 < result.worst[1] < 0.5 and result.worst[0] in contents(tmp_path)[0]["sites"]


def test_a_recipe_that_is_fitted_needs_a_calibration(checkpoint, tmp_path):
    assert needs_calibration(Recipe.preset("executable_w4a4")) and not needs_calibration(RTN)
    with pytest.raises(QuantizationError, match="give a calibration"):
        quantize_checkpoint(checkpoint, Recipe.preset("executable_w4a4"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_gptq_with_a_calibration_from_elsewhere(checkpoint, calibration_observations, tmp_path):
    recipe = Recipe.preset("executable_w4a4").replace_sides(clip="absmax")
    policy = Policy.load(checkpoint)
    sites = find_sites(policy.model)
    round_unquantized(policy.model.requires_grad_(False), recipe, sites)
    calibration = calibrate_policy(policy, sites, calibration_observations)
    manifest = {"observations": 8, "sha256": ["a"] * 8, "noise_seeds": [0, 7]}
    quantize_checkpoint(checkpoint, recipe, tmp_path / "streamed", calibration=calibration, manifest=manifest)
    assert load_pack(tmp_path / "streamed").model.quantization_record.calibration["observations"] == 8
    quantized, _ = quantize_policy(Policy.load(checkpoint), recipe, calibration_observations)
    save_pack(quantized, tmp_path / "memory")
    assert same(contents(tmp_path / "streamed")[1], contents(tmp_path / "memory")[1])


KILLED = """
import os, signal, sys
from omega_qvla_core.quant import Recipe
from omega_qvla_core.quant.streaming import quantize_checkpoint

def progress(done, total, name):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_checkpoint(sys.argv[1], Recipe.preset("rtn"), sys.argv[2], progress=progress)
"""


def test_a_killed_run_goes_on_where_it_was(checkpoint, tmp_path):
    out, root = tmp_path / "out", Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(out)], cwd=root, check=False)
    assert run.returncode == -signal.SIGKILL and not (out / "pack.safetensors").exists()
    done = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.safetensors")}
    assert len(done) == 5
    # What a kill in the middle of a write leaves, and a file that was cut off.
    (out / "units" / "00005.safetensors.partial").write_bytes(b"half")
    cut = sorted(done)[4]
    cut.write_bytes(cut.read_bytes()[:100])
    seen = []
    result = quantize_checkpoint(checkpoint, RTN, out, progress=lambda done, total, name: seen.append(done))
    assert result.resumed == 4 and seen[0] == 4
    quantize_checkpoint(checkpoint, RTN, tmp_path / "whole")
    assert (out / "pack.safetensors").read_bytes() == (tmp_path / "whole" / "pack.safetensors").read_bytes()


def interrupted(checkpoint: Path, out: Path, recipe: Recipe = RTN, **options: object) -> None:
    class Stop(Exception):
        pass

    def progress(done, total, name):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(checkpoint, recipe, out, progress=progress, **options)


def test_units_of_another_recipe_are_refused(checkpoint, tmp_path):
    interrupted(checkpoint, tmp_path)
    with pytest.raises(PackError, match="another recipe, checkpoint, robot setup or calibration"):
        quantize_checkpoint(checkpoint, Recipe.preset("rtn_whole"), tmp_path)


def test_units_of_another_checkpoint_are_refused(checkpoint, policy, tmp_path):
    interrupted(checkpoint, tmp_path / "out")
    policy.save(tmp_path / "other")
    with pytest.raises(PackError, match="another recipe, checkpoint, robot setup or calibration"):
        quantize_checkpoint(tmp_path / "other", RTN, tmp_path / "out")


def test_units_of_another_robot_setup_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    interrupted(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["name"] = "another"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackError, match="robot setup"):
        quantize_checkpoint(folder, RTN, tmp_path / "out")


def test_units_of_another_calibration_without_a_manifest_are_refused(checkpoint, calibration_observations, tmp_path):
    recipe, policy = Recipe.preset("rtn_static_absmax"), Policy.load(checkpoint)
    sites = find_sites(policy.model)
    one, other = (calibrate_policy(policy, sites, calibration_observations, seed=seed) for seed in (0, 1))
    interrupted(checkpoint, tmp_path, recipe, calibration=one)
    with pytest.raises(PackError, match="or calibration"):
        quantize_checkpoint(checkpoint, recipe, tmp_path, calibration=other)
    assert quantize_checkpoint(checkpoint, recipe, tmp_path, calibration=one).resumed == 3


@pytest.mark.parametrize("content", [None, "", "{"])
def test_units_whose_origin_is_not_known_are_refused(content, checkpoint, tmp_path):
    interrupted(checkpoint, tmp_path)
    state = tmp_path / "units" / "state.json"
    state.unlink() if content is None else state.write_text(content)
    with pytest.raises(PackError, match=r"state\.json"):
        quantize_checkpoint(checkpoint, RTN, tmp_path)
    assert len(list((tmp_path / "units").glob("*.safetensors"))) == 3


def test_a_unit_without_its_bytes_is_not_finished(tmp_path):
    path = tmp_path / "00000.safetensors"
    assert read_info(path) is None
    path.write_bytes(b"\x10")
    assert read_info(path) is None


@pytest.mark.parametrize(
    "name", ["action_in_proj.weight", "paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight"]
)
def test_nan_in_the_checkpoint_is_refused_by_name(name, policy, tmp_path):
    import copy

    broken = copy.copy(policy)
    broken.model = copy.deepcopy(policy.model)
    with torch.no_grad():
        broken.model.get_parameter(name).view(-1)[3] = float("nan")
    broken.save(tmp_path / "broken")
    with pytest.raises(QuantizationError, match=name.removesuffix(".weight")):
        quantize_checkpoint(tmp_path / "broken", RTN, tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["expert_mlp_dim"] = 64
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="expert"):
        quantize_checkpoint(folder, RTN, tmp_path / "out")


def test_a_random_checkpoint_loads_and_quantizes(policy, calibration_observations, tmp_path):
    write_random_checkpoint(tmp_path / "random", policy.description.model, seed=3)
    assert np.isfinite(Policy.load(tmp_path / "random").infer(calibration_observations[0]).actions).all()
    quantize_checkpoint(tmp_path / "random", Recipe.preset("rtn_whole"), tmp_path / "pack")
    assert np.isfinite(Policy.load(tmp_path / "pack").infer(calibration_observations[0]).actions).all()

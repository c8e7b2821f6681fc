"""Packs: the same actions bit for bit, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from omega_qvla_core.errors import ConfigError, OmegaQVLAError, PackError, QuantizationError
from omega_qvla_core.quant import PRESETS, Override, Recipe, load_pack, quantize_policy, report, save_pack
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.runtime import Policy


@pytest.fixture(scope="module")
def packed(executable, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "random_w4a4"
    save_pack(executable[0], folder)
    return folder


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def contents(path: Path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_actions(one: Policy, other: Policy, observations) -> bool:
    pairs = zip(one.infer_batch(observations), other.infer_batch(observations))
    return all(np.array_equal(a.actions, b.actions) for a, b in pairs)


MIXED = Recipe("mixed", overrides=(Override("*.v_proj", {"weight_bits": 8}),))
# A pack of an automatic choice is tested with the report.
VARIANTS = [
    *(Recipe.preset(name) for name in sorted(set(PRESETS) - {"auto_w4a4"})),
    MIXED,
    Recipe("float32", unquantized_dtype="float32"),
]


@pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: recipe.name)
def test_a_loaded_pack_gives_the_same_actions_bit_for_bit(recipe, policy, calibration_observations, tmp_path):
    recipe = replace(recipe, language=replace(recipe.language, permutation="serpentine"))
    quantized, _ = quantize_policy(policy, recipe, calibration_observations)
    save_pack(quantized, tmp_path / "pack")
    loaded = Policy.load(tmp_path / "pack")
    assert same_actions(quantized, loaded, calibration_observations[:3])
    assert loaded.spec == quantized.spec and loaded.spec.quantization == recipe.name


def test_a_pack_of_a_loaded_pack_is_the_same_pack(packed, tmp_path):
    load_pack(packed).save(tmp_path / "again")
    first, second = contents(packed / "pack.safetensors"), contents(tmp_path / "again" / "pack.safetensors")
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], tensor) for name, tensor in second[1].items())


def test_a_pack_holds_codes_two_per_byte_and_no_original_weight(packed):
    metadata, tensors = contents(packed / "pack.safetensors")
    name = "quantized.paligemma_with_expert.gemma_expert.model.layers.0.mlp.down.codes"
    assert tensors[name].dtype == torch.uint8 and tensors[name].shape == (64, 64)
    assert not [
        name
        for name in tensors
        if name.startswith("float.") and "_proj.weight" in name and "layers" in name and "vision" not in name
    ]
    assert {t.dtype for name, t in tensors.items() if name.startswith("float.")} == {torch.bfloat16}
    record = json.loads(metadata["record"])
    assert record["recipe"] == Recipe.preset("executable_w4a4").to_json()
    assert record["calibration"]["observations"] == len(record["calibration"]["sha256"]) == 8
    assert record["num_steps"] == 4 and "torch" in record["libraries"]


def test_the_file_is_as_small_as_the_report_says(packed, executable):
    result = executable[1]
    size = (packed / "pack.safetensors").stat().st_size
    payload = result.quantized_bytes + result.other_bytes
    assert payload < size < payload + 64 * 1024


def test_the_report_of_a_loaded_pack_is_that_of_the_quantization(packed, executable):
    assert report(load_pack(packed)).sites == executable[1].sites


def test_a_policy_without_quantization_has_no_pack(policy, tmp_path):
    with pytest.raises(QuantizationError, match="not quantized"):
        save_pack(policy, tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 1000, -100])
def test_a_truncated_pack_is_refused(folder, keep):
    path = folder / "pack.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PackError, match="damaged"):
        load_pack(folder)


def test_a_flipped_bit_is_refused(folder):
    path = folder / "pack.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(PackError, match="hash"):
        load_pack(folder)


def rewrite(folder: Path, change) -> None:
    path = folder / "pack.safetensors"
    metadata, tensors = contents(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def change_record(key, value):
    def change(metadata, tensors):
        record = json.loads(metadata["record"])
        record[key] = value
        metadata["record"] = json.dumps(record)

    return change


def test_an_unknown_recipe_key_is_refused(folder):
    recipe = Recipe.preset("executable_w4a4").to_json()
    recipe["language"]["rotatoin"] = "none"
    rewrite(folder, change_record("recipe", recipe))
    with pytest.raises(ConfigError, match="rotatoin.*did you mean 'rotation'"):
        load_pack(folder)


def test_another_number_of_denoise_steps_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["policy"]["num_steps"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackError, match="calibrated for 4 denoise steps.*asks for 8"):
        load_pack(folder)


def test_a_pack_for_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["expert_mlp_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackError, match="another model"):
        load_pack(folder)


def drop(name):
    return lambda metadata, tensors: tensors.pop(name)


def drop_site(metadata, tensors):
    metadata["sites"] = json.dumps(json.loads(metadata["sites"])[1:])


@pytest.mark.parametrize(
    "change",
    [
        drop("quantized.paligemma_with_expert.gemma_expert.model.layers.0.mlp.down.codes"),
        drop("float.action_in_proj.weight"),
        drop_site,
        lambda metadata, tensors: metadata.pop("sites"),
        lambda metadata, tensors: metadata.update(format="omega-qvla-pack-0"),
        lambda metadata, tensors: metadata.update(sites="{"),
        lambda metadata, tensors: metadata.update(record="{"),
        change_record("num_steps", "four"),
        lambda metadata, tensors: tensors.update({"float.more": torch.zeros(1)}),
    ],
)
def test_a_pack_that_lacks_or_adds_something_is_refused(folder, change):
    """Also when whoever changed it had renewed the hash."""
    from omega_qvla_core.quant.policy import tensors_hash

    def change_and_hash(metadata, tensors):
        change(metadata, tensors)
        metadata["content_sha256"] = tensors_hash(tensors)

    rewrite(folder, change_and_hash)
    with pytest.raises(PackError, match="pack.safetensors|record"):
        load_pack(folder)


def test_a_missing_folder_names_itself(tmp_path):
    with pytest.raises(OmegaQVLAError, match="nowhere"):
        load_pack(tmp_path / "nowhere")


def test_a_tensor_changed_after_quantization_is_refused(packed, tmp_path):
    changed = load_pack(packed)
    with torch.no_grad():
        changed.model.action_in_proj.weight += 1e-4
    with pytest.raises(PackError, match="action_in_proj.weight was changed"):
        save_pack(changed, tmp_path)


def test_loaded_sites_move_and_copy_with_the_model(packed, calibration_observations):
    loaded = load_pack(packed)
    before = loaded.infer(calibration_observations[0]).actions
    loaded.model.to(torch.float32)
    assert np.array_equal(loaded.infer(calibration_observations[0]).actions, before)
    assert len(list(quantized_sites(loaded.model))) == 16

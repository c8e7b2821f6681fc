"""GR00T N1.5 through the quantizer: scope, step-invariant keys and values, packs bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.loading import load_foundation, read_headers
from omega_qvla_core.errors import PackError, StepContextError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import QuantizedLinear, Recipe, find_sites, load_pack, quantize_policy, save_pack
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.scope import linear_side
from omega_qvla_core.runtime import Policy

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TEXTS = ("lift the red cube", "lift the cube")


def foundation_folders():
    """The builders of tiny public folders, which lie with the tests of checkpoints."""
    path = Path(__file__).parents[1] / "checkpoints" / "foundation_folders.py"
    spec = importlib.util.spec_from_file_location("foundation_folders_for_quant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def observations(count: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [
        Observation(
            {key: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for key in ("front", "wrist")},
            rng.normal(size=3) * 0.3,
            TEXTS[index % 2],
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    return Policy.load(foundation_folders().nvidia_folder(tmp_path_factory.mktemp("gr00t") / "tiny"))


@pytest.fixture(scope="module")
def quantized(policy):
    return quantize_policy(policy, Recipe.preset("executable_w4a4"), observations(8))


@pytest.fixture(scope="module")
def pack(quantized, tmp_path_factory) -> Path:
    return save_pack(quantized[0], tmp_path_factory.mktemp("pack") / "w4a4").parent


def full_size() -> nn.Module:
    released = json.loads((GOLDEN / "gr00t" / "full_keys.json").read_text())["released_config"]
    with torch.device("meta"):
        return build_model(Gr00tConfig.from_official_json(released))


def test_full_size_has_the_180_linears_of_the_published_scope():
    model = full_size()
    sites = find_sites(model)
    readers = [reader for site in sites for reader in site.readers]
    assert len(readers) == len(set(readers)) == 180
    assert sum(linear_side(reader) == "language" for reader in readers) == 84
    assert sum(model.get_submodule(reader).weight.numel() for reader in readers) == 1_069_547_520


def test_even_blocks_read_two_inputs_and_odd_blocks_one(policy):
    names = {site.name: site.readers for site in find_sites(policy.model)}
    blocks = "action_head.model.transformer_blocks"
    assert names[f"{blocks}.0.attn1.q"] == (f"{blocks}.0.attn1.to_q",)
    assert names[f"{blocks}.0.attn1.kv"] == (f"{blocks}.0.attn1.to_k", f"{blocks}.0.attn1.to_v")
    assert [name.rsplit(".", 1)[1] for name in names[f"{blocks}.1.attn1.qkv"]] == ["to_q", "to_k", "to_v"]
    assert f"{blocks}.1.attn1.to_out.0" in names and f"{blocks}.1.ff.net.0.proj" in names
    language = "backbone.eagle_model.language_model.model.layers.0"
    assert [name.rsplit(".", 1)[1] for name in names[f"{language}.mlp.gate_up"]] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize(
    "name",
    [
        "backbone.eagle_model.vision_model.vision_model.encoder.layers.0.self_attn.q_proj",
        "backbone.eagle_model.mlp1.0",
        "action_head.vl_self_attention.transformer_blocks.0.attn1.to_q",
        "action_head.model.timestep_encoder.timestep_embedder.linear_1",
        "action_head.model.transformer_blocks.0.norm1.linear",
        "action_head.model.proj_out_2",
        "backbone.eagle_model.language_model.lm_head",
    ],
)
def test_what_the_published_scope_leaves_out(name):
    assert linear_side(name) is None


def test_the_policy_is_quantized_and_close_to_the_float_one(policy, quantized):
    model, result = quantized[0].model, quantized[1]
    count = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    assert count == 3 * 7 + 4 * 6 and len(result.sites) == len(find_sites(policy.model))
    assert result.actions.relative < 0.35 and result.left_at_16_bits == ()
    assert quantized[0].spec.quantization == "executable_w4a4"


def test_keys_and_values_of_features_have_one_row_and_the_rest_of_the_head_one_per_step(policy, quantized):
    steps = policy.spec.num_steps
    for site in quantized_sites(quantized[0].model):
        crosses = site.spec.name.endswith(".kv")
        expected = steps if site.spec.side == "action_head" and not crosses else 0
        assert (site.spec.steps, site.activation.shape[0]) == (expected, max(expected, 1)), site.spec.name


def test_the_paper_recipe_has_static_tables_per_step_in_the_loop_only(policy):
    quantized, _ = quantize_policy(policy, Recipe.preset("paper_w4a4"), observations(8))
    for site in quantized_sites(quantized.model):
        if site.spec.side == "action_head":
            crosses = site.spec.name.endswith((".kv", ".to_k", ".to_v")) and int(site.spec.name.split(".")[3]) % 2 == 0
            rows = 1 if crosses else policy.spec.num_steps
            assert site.activation.shape == (rows, site.spec.in_features)


def test_a_layer_with_tables_refuses_to_run_without_a_step_or_with_another_number(quantized, policy):
    block = quantized[0].model.expert.transformer_blocks[1]
    x = torch.zeros(1, 3, policy.model.config.dit.width)
    with pytest.raises(StepContextError, match="outside the denoise loop"):
        block.ff.net[2](torch.zeros(1, 3, 4 * policy.model.config.dit.width))
    with denoise_step(0, policy.spec.num_steps + 1), pytest.raises(StepContextError, match="calibrated for"):
        block.attn1.to_q(x)


@pytest.mark.parametrize("name", ["rtn_static_absmax", "w8a8"])
def test_a_pack_gives_the_same_actions_bit_for_bit(name, policy, tmp_path):
    quantized, _ = quantize_policy(policy, Recipe.preset(name), observations(8))
    save_pack(quantized, tmp_path / "pack")
    loaded = Policy.load(tmp_path / "pack")
    assert loaded.spec == quantized.spec
    for one, two in zip(quantized.infer_batch(observations(3)), loaded.infer_batch(observations(3)), strict=True):
        assert np.array_equal(one.actions, two.actions)


def test_the_executable_pack_gives_the_same_actions_bit_for_bit(quantized, pack):
    loaded = load_pack(pack)
    for one, two in zip(quantized[0].infer_batch(observations(2)), loaded.infer_batch(observations(2)), strict=True):
        assert np.array_equal(one.actions, two.actions)


def test_a_pack_says_what_it_was_made_of(pack):
    record = load_pack(pack).model.quantization_record
    assert record.calibration["observations"] == len(record.calibration["sha256"]) == 8
    assert {"torch", "safetensors", "numpy"} <= record.libraries.keys() and len(record.source["sha256"]) == 64


def test_a_pack_with_another_number_of_steps_or_for_another_model_is_refused(pack, tmp_path):
    config = json.loads((pack / "config.json").read_text())
    for path, change, message in (
        ("steps", lambda c: c["robot"].update(num_steps=7), "denoise steps"),
        ("model", lambda c: c["model"].update(hidden_size=32), "another model"),
    ):
        folder = tmp_path / path
        folder.mkdir()
        for file in pack.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        changed = json.loads(json.dumps(config))
        change(changed)
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(PackError, match=message):
            load_pack(folder)


def test_the_headers_give_the_same_model_as_the_policy(tmp_path):
    folder = foundation_folders().nvidia_folder(tmp_path / "tiny")
    _, model = load_foundation(read_headers(folder), torch.float32)
    assert [site.name for site in find_sites(model)]

"""Scope whole: what is replaced, what stays, packs that load and run, action error."""

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
from test_gr00t_policy import foundation_folders
from test_gr00t_policy import observations as gr00t_observations
from torch import nn

from omega_qvla_core.errors import ConfigError, PackError, QuantizationError, StepContextError
from omega_qvla_core.models.gr00t_embodiment import EmbodimentLinear
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant import QuantizedLinear, Recipe, find_sites, load_pack, quantize_policy, report, save_pack
from omega_qvla_core.quant.parts import (
    QuantizedEmbedding,
    QuantizedEmbodimentLinear,
    StepTable,
    Unread,
    quantize_rows,
    stored_parts,
)
from omega_qvla_core.quant.policy import tensors_hash
from omega_qvla_core.quant.recipe import WholeRecipe, eight_bit_side
from omega_qvla_core.runtime import Policy

RTN_WHOLE = Recipe.preset("rtn_whole")
FLOAT_LINEARS = replace(Recipe.preset("fp16"), name="parts", whole=WholeRecipe())


@pytest.fixture(scope="module")
def whole(policy, calibration_observations):
    return quantize_policy(policy, RTN_WHOLE, calibration_observations)


@pytest.fixture(scope="module")
def gr00t(tmp_path_factory) -> Policy:
    return Policy.load(foundation_folders().nvidia_folder(tmp_path_factory.mktemp("gr00t") / "tiny"))


def test_everything_large_is_replaced_and_nothing_else_is_left(whole):
    model = whole[0].model
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"action_in_proj", "action_out_proj"}
    assert not [
        name for name, module in model.named_modules() if type(module) is nn.Embedding and "position" not in name
    ]
    kinds = {kind: [n for n, part in stored_parts(model) if isinstance(part, kind)] for kind in (StepTable, Unread)}
    assert kinds[Unread] == ["time_mlp_in", "time_mlp_out"] and len(kinds[StepTable]) == 2 * 2 + 1


def test_vision_and_projector_are_sites_of_eight_bits(whole, policy):
    sites = {site.name: site for site in whole[1].sites}
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0"
    assert sites[f"{tower}.self_attn.qkv"].bits == sites[f"{tower}.mlp.fc1"].bits == (8, 8)
    assert sites["paligemma_with_expert.paligemma.model.multi_modal_projector.linear"].bits == (8, 8)
    assert len(find_sites(policy.model, whole=True)) == len(sites) > len(find_sites(policy.model))
    assert all(site.executable for site in whole[1].sites)


def test_step_tables_are_the_modulation_at_the_steps_of_the_loop(policy, calibration_observations):
    quantized, _ = quantize_policy(policy, FLOAT_LINEARS, calibration_observations)
    for mine, float_one in zip(quantized.model.step_conditions(4), policy.model.step_conditions(4), strict=True):
        assert torch.allclose(mine.final, float_one.final, rtol=1e-3, atol=1e-3)
        for pair, float_pair in zip(mine.layers, float_one.layers, strict=True):
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(pair, float_pair))


def test_a_step_table_is_strict_about_the_step(whole):
    dense = whole[0].model.expert.norm.dense
    with pytest.raises(StepContextError, match="outside the denoise loop"):
        dense(torch.zeros(1, 64))
    with denoise_step(0, 3), pytest.raises(StepContextError, match="with 3 steps"):
        dense(torch.zeros(1, 64))
    with denoise_step(1, 4):
        assert torch.equal(dense(torch.zeros(2, 64))[1], dense.table[1].float())


def test_the_action_error_is_reported_and_eight_bits_are_close(policy, calibration_observations, whole):
    recipe = replace(
        Recipe.preset("w8a8"),
        name="all8",
        whole=WholeRecipe(adapter=eight_bit_side(), embedding_bits=8, embedding_group=0),
    )
    _, result = quantize_policy(policy, recipe, calibration_observations)
    assert 0 < result.actions.relative < 0.05 < whole[1].actions.relative < 0.6


def test_the_report_counts_what_the_parts_replaced(policy, whole):
    result = whole[1]
    everything = sum(tensor.numel() for tensor in policy.model.state_dict().values())
    linear_biases = sum(
        policy.model.get_submodule(reader).bias.numel()
        for site in find_sites(policy.model, whole=True)
        for reader in site.readers
        if policy.model.get_submodule(reader).bias is not None
    )
    assert result.whole_fp16_bytes == 2 * (everything - linear_biases)
    parts = [part for _, part in stored_parts(whole[0].model)]
    assert result.parts_bytes == sum(t.numel() * t.element_size() for part in parts for t in part.buffers()) > 0
    assert result.to_json()["parts_bytes"] == result.parts_bytes


def test_a_pack_gives_the_same_actions_bit_for_bit(whole, calibration_observations, tmp_path):
    save_pack(whole[0], tmp_path / "pack")
    loaded = Policy.load(tmp_path / "pack")
    assert loaded.spec == whole[0].spec
    pairs = [policy.infer_batch(calibration_observations[:3]) for policy in (whole[0], loaded)]
    assert all(np.array_equal(one.actions, two.actions) for one, two in zip(*pairs))
    assert report(loaded).sites == report(whole[0]).sites
    with safe_open(tmp_path / "pack" / "pack.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not [name for name in names if name.startswith("float.") and ("lm_head" in name or "dense" in name)]
    assert not [name for name in names if "time_mlp" in name]
    assert "part.paligemma_with_expert.paligemma.lm_head.codes" in names


def changed(pack: Path, folder: Path, change) -> Path:
    shutil.copytree(pack, folder)
    path = folder / "pack.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    metadata["content_sha256"] = tensors_hash(tensors)
    save_file(tensors, path, metadata)
    return folder


def edit_parts(change):
    def edit(metadata, tensors):
        parts = json.loads(metadata["parts"])
        change(parts)
        metadata["parts"] = json.dumps(parts)

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata, tensors: metadata.pop("parts"),
        lambda metadata, tensors: metadata.update(parts="{"),
        lambda metadata, tensors: tensors.pop("part.paligemma_with_expert.paligemma.lm_head.scales"),
        edit_parts(lambda parts: parts.pop("time_mlp_in")),
        edit_parts(lambda parts: parts["time_mlp_in"].update(kind="magic")),
        edit_parts(lambda parts: parts.update(nowhere={"kind": "unread", "replaced": 1})),
    ],
)
def test_a_pack_whose_parts_do_not_fit_is_refused(change, whole, tmp_path):
    save_pack(whole[0], tmp_path / "pack")
    with pytest.raises(PackError, match="pack.safetensors"):
        load_pack(changed(tmp_path / "pack", tmp_path / "changed", change))


@pytest.mark.parametrize("embodiments", ["all", "contract"])
def test_gr00t_keeps_all_embodiments_or_the_contract_s(embodiments, gr00t, tmp_path):
    recipe = replace(RTN_WHOLE, whole=WholeRecipe(embodiments=embodiments))
    quantized, result = quantize_policy(gr00t, recipe, gr00t_observations(8))
    model = quantized.model
    assert not [name for name, module in model.named_modules() if isinstance(module, EmbodimentLinear)]
    kept = {tuple(p.spec["kept"]) for _, p in stored_parts(model) if isinstance(p, QuantizedEmbodimentLinear)}
    assert kept == ({(0, 1, 2, 3, 4)} if embodiments == "all" else {(3,)})
    assert 0 < result.actions.relative < 0.6
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert left == {"action_head.model.proj_out_2"}
    assert sum(isinstance(m, QuantizedLinear) for m in model.action_head.vl_self_attention.modules()) == 2 * 6
    save_pack(quantized, tmp_path / "pack")
    loaded = load_pack(tmp_path / "pack")
    observation = gr00t_observations(1)[0]
    assert np.array_equal(loaded.infer(observation).actions, quantized.infer(observation).actions)


def test_an_embodiment_that_is_not_kept_is_refused():
    linear = EmbodimentLinear(4, 6, 5)
    part = QuantizedEmbodimentLinear.of(linear, 8, 0, (2,))
    x = torch.randn(2, 3, 6)
    assert torch.allclose(part(x, (2, 2)), linear(x, (2, 2)), atol=2e-3)
    with pytest.raises(QuantizationError, match="embodiment 1 is not in this pack, which keeps 2"):
        part(x, (1, 2))


def test_rows_of_different_embodiments_each_get_their_own_weights():
    linear = EmbodimentLinear(4, 6, 5)
    part = QuantizedEmbodimentLinear.of(linear, 8, 0, (0, 2))
    x = torch.randn(2, 3, 6)
    assert torch.allclose(part(x, (2, 0)), linear(x, (2, 0)), atol=2e-3)


def test_a_table_of_odd_width_and_with_rows_of_zeros():
    table = torch.randn(9, 7)
    table[4] = 0
    for bits, limit in ((4, 0.2), (8, 0.01)):
        part = QuantizedEmbedding.of(table, bits, 4)
        found = part(torch.tensor([[4, 1], [8, 0]]))
        assert found.shape == (2, 2, 7) and found.dtype == torch.float32
        assert (found[0, 1] - table[1]).norm() < limit * table[1].norm() and not found[0, 0].any()


def test_rows_are_quantized_alike_whatever_they_are_cut_into(monkeypatch):
    table = torch.randn(20, 8)
    codes, scales = quantize_rows(table, 4, 4)
    monkeypatch.setattr("omega_qvla_core.quant.parts._ROWS", 3)
    again = quantize_rows(table, 4, 4)
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])


def test_the_tabletop_policy_keeps_its_keypoint_encoder():
    policy = Policy.load("tabletop")
    sites = find_sites(policy.model, whole=True)
    assert {site.side for site in sites} == {"language", "action_head"}


def test_the_recipe_round_trips_and_refuses_nonsense():
    assert Recipe.from_json(json.dumps(RTN_WHOLE.to_json())) == RTN_WHOLE
    assert Recipe.preset("rtn").whole is None
    for field, value in (("embedding_bits", 3), ("embodiment_group", -1), ("embodiments", "some"), ("vison", {})):
        data = RTN_WHOLE.to_json()
        data["whole"][field] = value
        with pytest.raises(ConfigError, match=field):
            Recipe.from_json(data)

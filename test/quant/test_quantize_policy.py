"""Quantizing a whole policy: scope, report, bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from omega_qvla_core.errors import ConfigError, QuantizationError, StepContextError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import PRESETS, Override, QuantizedLinear, Recipe, find_sites, quantize_policy, report
from omega_qvla_core.quant.action_error import compare_actions
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.report import in_scope_bytes
from omega_qvla_core.quant.scope import linear_side

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_every_linear_of_both_towers_is_quantized_and_no_other(executable):
    quantized, _ = executable
    kinds = {
        name: type(m) for name, m in quantized.model.named_modules() if isinstance(m, (nn.Linear, QuantizedLinear))
    }
    in_scope = {name for name in kinds if ".layers." in name and name.endswith(LINEARS) and "vision" not in name}
    assert len(in_scope) == 2 * 2 * 7
    assert {name for name, kind in kinds.items() if kind is QuantizedLinear} == in_scope
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        assert kinds[name] is nn.Linear


def test_scope_by_name():
    tower = "paligemma_with_expert.paligemma.model.language_model.layers.3"
    assert linear_side(f"{tower}.self_attn.q_proj") == "language"
    assert linear_side(f"model.{tower}.mlp.down_proj") == "language"
    assert linear_side("paligemma_with_expert.gemma_expert.model.layers.17.mlp.up_proj") == "action_head"
    for name in (
        f"{tower}.input_layernorm.dense",
        "paligemma_with_expert.paligemma.model.vision_tower.layers.0.self_attn.q_proj",
        "paligemma_with_expert.gemma_expert.lm_head",
        "action_in_proj",
    ):
        assert linear_side(name) is None


def test_sites_group_the_readers_of_one_input(policy):
    sites = find_sites(policy.model)
    assert [site.name.rsplit(".", 1)[1] for site in sites[:4]] == ["qkv", "o", "gate_up", "down"]
    assert [name.rsplit(".", 1)[1] for name in sites[0].readers] == ["q_proj", "k_proj", "v_proj"]
    assert [site.side for site in sites] == ["language"] * 8 + ["action_head"] * 8


def test_the_given_policy_is_untouched(policy, calibration_observations, executable):
    before = policy.infer(calibration_observations[0]).actions
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    quantize_policy(policy, Recipe.preset("w8a8"), calibration_observations)
    assert policy.spec.quantization == "none" and executable[0].spec.quantization == "executable_w4a4"
    assert np.array_equal(policy.infer(calibration_observations[0]).actions, before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in policy.model.state_dict().items())


# The automatic choice tries 18 candidates for every site; its other tests have fewer sites.
SLOW = {"auto_w4a4": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in sorted(PRESETS)])
def test_every_preset_gives_actions_near_the_float_policy(name, policy, calibration_observations):
    quantized, result = quantize_policy(policy, Recipe.preset(name), calibration_observations)
    limits = {"fp16": 0.02, "w8a8": 0.03, "w4a8": 0.15, "w4a16": 0.15, "executable_w4a4": 0.25}
    assert result.actions.relative < limits.get(name, 0.6)
    assert np.isfinite(quantized.infer(calibration_observations[0]).actions).all()


def test_quantizing_twice_gives_the_same(policy, calibration_observations, executable):
    again, _ = quantize_policy(policy, Recipe.preset("executable_w4a4"), calibration_observations)
    for one, other in zip(quantized_sites(executable[0].model), quantized_sites(again.model)):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name])


def test_steps_are_kept_apart_and_another_number_is_refused(executable):
    model = executable[0].model
    steps = {site.spec.side: site.spec.steps for site in quantized_sites(model)}
    assert steps == {"language": 0, "action_head": 4}
    with pytest.raises(StepContextError, match="calibrated for 4"):
        prefix = torch.zeros(1, 5, 64)
        from omega_qvla_core.models.pi05 import Prefix

        model.sample_actions(Prefix(prefix, torch.ones(1, 5, dtype=torch.bool)), torch.zeros(1, 16, 7), 5)


def test_the_last_language_layer_is_quantized_though_no_action_depends_on_it(executable):
    reports = {site.name: site for site in executable[1].sites}
    last = reports["paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.down"]
    assert last.bits == (4, 4) and 0 < last.error < 0.3


def test_padding_does_not_change_the_calibration(policy, calibration_observations):
    """Masked tokens run through the tower but are not counted."""
    quantized, _ = quantize_policy(policy, Recipe.preset("rtn_static_absmax"), calibration_observations)
    wrecked = copy.copy(policy)
    wrecked.model = copy.deepcopy(policy.model)
    with torch.no_grad():
        # Row 0 of the table is the padding token.
        wrecked.model.paligemma_with_expert.paligemma.lm_head.weight[0] *= 1000
    other, _ = quantize_policy(wrecked, Recipe.preset("rtn_static_absmax"), calibration_observations)
    for one, two in zip(quantized_sites(quantized.model), quantized_sites(other.model)):
        assert torch.allclose(one.activation, two.activation, rtol=1e-4)


def test_bytes_count_every_table(executable):
    quantized, result = executable
    sites = list(quantized_sites(quantized.model))
    assert result.fp16_bytes == 2 * sum(site.spec.out_features * site.spec.in_features for site in sites)
    stored = sum(tensor.numel() * tensor.element_size() for site in sites for tensor in site.buffers())
    assert result.quantized_bytes == stored
    codes = sum(site.bytes["codes"] for site in result.sites)
    assert codes * 4 == result.fp16_bytes
    assert result.saved == pytest.approx(1 - stored / result.fp16_bytes) and result.saved > 0.7
    assert 0 < result.whole_saved < result.saved
    assert result.resident_bytes > stored
    assert in_scope_bytes(quantized) == stored


def test_linears_that_stay_count_as_float16(policy, executable):
    assert in_scope_bytes(policy) == executable[1].fp16_bytes


def test_the_report_has_errors_per_step_and_can_be_written(executable):
    quantized, result = executable
    data = result.to_json()
    assert len(data["sites"][0]["per_step"]) == 1 and len(data["sites"][-1]["per_step"]) == 4
    assert data["actions"]["observations"] == 8
    assert "layers.1.mlp.down" in result.to_markdown()
    assert report(quantized).sites == result.sites


def test_action_error_over_all_and_per_observation():
    theirs = torch.ones(3, 2, 2)
    ours = theirs.clone()
    ours[0] += 0.1
    ours[2] += 3.0
    found = compare_actions(ours, theirs)
    assert found.observations == 3
    assert found.median == pytest.approx(0.1)
    assert found.largest == pytest.approx(3.0)
    assert found.relative == pytest.approx(((0.01 + 9.0) / 3) ** 0.5)


def test_progress_is_reported(policy, calibration_observations):
    calls = []
    quantize_policy(policy, Recipe.preset("w8a8"), calibration_observations, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 8, "calibration") and calls[-1] == (16, 16, "")


def test_too_few_observations_are_refused(policy, calibration_observations):
    with pytest.raises(QuantizationError, match="3 calibration observations; at least 8"):
        quantize_policy(policy, Recipe.preset("w8a8"), calibration_observations[:3])


def test_a_quantized_policy_is_not_quantized_again(executable, calibration_observations):
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize_policy(executable[0], Recipe.preset("w8a8"), calibration_observations)


def test_a_weight_that_is_not_finite_is_refused(policy, calibration_observations):
    broken = copy.copy(policy)
    broken.model = copy.deepcopy(policy.model)
    name = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.down_proj"
    with torch.no_grad():
        broken.model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        quantize_policy(broken, Recipe.preset("w8a8"), calibration_observations)


def test_an_override_that_matches_nothing_is_refused_before_the_work(policy, calibration_observations):
    recipe = Recipe("x", overrides=(Override("*.down_porj", {"weight_bits": 8}),))
    with pytest.raises(ConfigError, match="down_porj"):
        quantize_policy(policy, recipe, calibration_observations)


def test_nothing_in_scope_is_refused():
    with pytest.raises(QuantizationError, match="no linear"):
        find_sites(nn.Sequential(nn.Linear(3, 3)))


def test_the_report_of_a_float_policy_is_refused(policy):
    with pytest.raises(QuantizationError, match="not quantized"):
        report(policy)


def test_an_observation_without_a_camera_is_refused(policy, calibration_observations):
    bad = Observation({"front": calibration_observations[0].images["front"]}, np.zeros(7), "touch the red cube")
    with pytest.raises(Exception, match="wrist"):
        quantize_policy(policy, Recipe.preset("w8a8"), [*calibration_observations, bad])

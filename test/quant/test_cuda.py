"""Quantizing on a GPU: the same codes as on the CPU, everything on the device, nothing brought over on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant import Recipe, calibrate, quantize_linears, quantize_policy
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.scales import search_scales
from omega_qvla_core.quant.scope import ACTION_HEAD, LANGUAGE, sites_of_linears
from omega_qvla_core.quant.solver import WeightProblem, solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")

# Float32 sums differ between the devices in their last bits, so that a few codes that lie between two values differ.
AGREEING_CODES = 0.98

RECIPES = ("executable_w4a4", "auto_w4a4", "paper_w4a4", "fast_w4a4", "fast_multiplier_w4a4", "w8a8", "rtn")


def _calibrated(device: str, steps: int) -> tuple[nn.Module, tuple, object]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.linear = nn.Linear(200, 96)
    with torch.no_grad():
        model.linear.weight.copy_(torch.randn(96, 200, generator=generator))
        model.linear.bias.copy_(torch.randn(96, generator=generator))
    model.to(device)
    sites = sites_of_linears(["linear"], ACTION_HEAD if steps else LANGUAGE)
    with torch.no_grad(), calibrate(model, sites) as calibration:
        for step in range(max(steps, 1)):
            x = torch.randn(300, 200, generator=generator) * (1 + torch.arange(200) / 50)
            if steps:
                with denoise_step(step, steps):
                    model.linear(x.to(device))
            else:
                model.linear(x.to(device))
    return model, sites, calibration


@pytest.mark.parametrize("solver", ["rtn", "gptq", "blockwise_gptq"])
def test_solvers_give_the_codes_of_the_cpu(solver):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 333, dtype=torch.float64, generator=generator)
    tokens = torch.randn(1000, 333, dtype=torch.float64, generator=generator)
    tokens[:, 7] = 0
    scales = search_scales(weight, 64, 4, "fine")
    codes = {}
    for device in ("cpu", "cuda"):
        parts = (weight.to(device), search_scales(weight.to(device), 64, 4, "fine"))
        assert torch.equal(parts[1].cpu(), scales)
        solution = solve(solver, WeightProblem("layer", *parts, 64, 4, (tokens.T @ tokens).to(device)))
        assert solution.codes.device.type == device
        codes[device] = solution.codes.cpu()
    assert (codes["cpu"] == codes["cuda"]).float().mean() > AGREEING_CODES


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_layers_come_out_as_on_the_cpu(name, steps):
    errors = {}
    for device in ("cpu", "cuda"):
        model, sites, calibration = _calibrated(device, steps)
        assert calibration["linear"].gram(0).device.type == device
        (result,) = quantize_linears(model, sites, Recipe.preset(name), calibration)
        assert {tensor.device.type for tensor in result.site.tensors().values()} == {device}
        errors[device] = result.error
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)


def test_a_device_can_be_named_and_the_layer_stays_where_it_was():
    model, sites, calibration = _calibrated("cpu", 4)
    torch.cuda.reset_peak_memory_stats()
    (result,) = quantize_linears(model, sites, Recipe.preset("executable_w4a4"), calibration, device="cuda")
    assert torch.cuda.max_memory_allocated() > 0
    assert {tensor.device.type for tensor in result.site.tensors().values()} == {"cpu"}


def test_a_policy_on_the_gpu_is_quantized_there(policy, calibration_observations):
    on_gpu = type(policy)(policy.model, policy.description, "cuda")
    try:
        quantized, report = quantize_policy(on_gpu, Recipe.preset("executable_w4a4"), calibration_observations)
        assert all(site.codes.device.type == "cuda" for site in quantized_sites(quantized.model))
        assert report.actions.relative < 0.25
    finally:
        policy.model.cpu()

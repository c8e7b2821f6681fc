"""Weight scales as an integer per group times one per row: exact integers, no worse than float16 scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omega_qvla_core.errors import ConfigError, PackError
from omega_qvla_core.kernels import backend
from omega_qvla_core.quant import Recipe, SideRecipe, load_pack, quantize_policy, save_pack
from omega_qvla_core.quant.layers_check import LayerData, quantized_layer
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.multiplier import pack_multipliers, search_multipliers, unpack_multipliers
from omega_qvla_core.quant.scales import search_scales, spread_scales
from omega_qvla_core.quant.site import dequantized, group_scales

FAST = Recipe.preset("fast_multiplier_w4a4")


def _weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Groups of very different sizes, a row of zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight *= torch.rand(columns, generator=generator, dtype=torch.float64) + 0.2
    weight[1] = 0
    weight[2, : min(64, columns)] = 0
    return weight


def _rounding_error(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    spread = spread_scales(scales.double(), 64, weight.shape[1])
    return ((weight / spread).round().clamp(-8, 7) * spread - weight).square().sum()


@pytest.mark.parametrize("columns", [64, 200, 333])
def test_multipliers_are_small_integers_that_survive_packing(columns):
    rows, multipliers = search_multipliers(_weight(9, columns), 64, 4, "fine")
    assert rows.shape == (9, 1) and rows.dtype == torch.float32 and (rows > 0).all()
    assert multipliers.min() >= 1 and multipliers.max() <= 16
    assert torch.equal(unpack_multipliers(pack_multipliers(multipliers), multipliers.shape[1]), multipliers)


def test_the_error_is_near_that_of_float16_scales_and_below_one_scale_per_row():
    weight = _weight(64, 512)
    rows, multipliers = search_multipliers(weight, 64, 4, "fine")
    found = _rounding_error(weight, rows.double() * multipliers)
    one_per_row = search_scales(weight, 0, 4, "fine").double().expand(-1, 8)
    assert found < 1.05 * _rounding_error(weight, search_scales(weight, 64, 4, "fine"))
    assert found < 0.95 * _rounding_error(weight, one_per_row)


def _layer(columns: int = 200) -> LayerData:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 96, columns, generator=generator)
    return LayerData(_weight(24, columns).float(), x, x)


def test_a_row_is_one_exact_integer_sum_of_int8():
    site = quantized_layer(_layer(), FAST).linear.site
    tensors = site.tensors()
    weight = site._grouped_weight(tensors)
    assert weight.group == 200 and weight.scales.shape == (24, 1) and weight.weight_bits == 8
    stands_for = weight.codes.float() * weight.scales
    assert torch.allclose(stands_for, dequantized(site.spec, tensors), rtol=1e-6, atol=0)
    assert group_scales(site.spec, tensors).shape == (24, 4)
    codes = torch.full((1, 5, 200), -8.0)
    cpu = backend("cpu")
    assert torch.equal(cpu.accumulators(codes, cpu.prepare(weight))[0], codes[0].long() @ weight.codes.long().T)


def test_backends_agree():
    layer = _layer()
    site = quantized_layer(layer, FAST).linear.site
    executed = site(layer.x_eval[0])
    site.set_backend("reference")
    assert torch.allclose(executed, site(layer.x_eval[0]), rtol=1e-4, atol=1e-4)


def test_token_group_activations_go_with_multipliers_too():
    side = replace(FAST.language, activation="token_group")
    layer = _layer()
    site = quantized_layer(layer, Recipe("mine", side, side)).linear.site
    assert site._grouped_weight(site.tensors()).scales.shape == (24, 4)
    y = layer.x_eval[0] @ layer.weight.T
    assert (site(layer.x_eval[0]) - y).norm() / y.norm() < 0.2


@pytest.mark.parametrize("fields", [{"group": 0}, {"weight_bits": 8}])
def test_combinations_without_an_int8_product_are_refused(fields):
    with pytest.raises(ConfigError, match="integer_multiplier"):
        SideRecipe(**{"scale_format": "integer_multiplier", "activation": "token", **fields})


def test_packs_hold_multipliers_and_refuse_to_do_without(policy, calibration_observations, tmp_path: Path):
    quantized, _ = quantize_policy(policy, FAST, calibration_observations)
    path = save_pack(quantized, tmp_path)
    again = load_pack(tmp_path)
    for one, other in zip(quantized_sites(quantized.model), quantized_sites(again.model)):
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    from safetensors import safe_open
    from safetensors.torch import save_file

    from omega_qvla_core.quant.policy import tensors_hash

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys() if not name.endswith("qkv.multipliers")}  # noqa: SIM118
    save_file(kept, path, {**metadata, "content_sha256": tensors_hash(kept)})
    with pytest.raises(PackError, match="multipliers"):
        load_pack(tmp_path)

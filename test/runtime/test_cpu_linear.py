"""Products of the CPU engine against the modules that they stand for: quantized sites bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant import QuantizedLinear, Recipe, SideRecipe, calibrate, quantize_linears
from omega_qvla_core.quant.scope import ACTION_HEAD, InputSite
from omega_qvla_core.runtime import cpu_linear
from omega_qvla_core.runtime.cpu_buffers import Buffers
from omega_qvla_core.runtime.cpu_linear import FloatProduct, Parts, SimulatedProduct, SiteProduct, merge

STEPS, WIDTH, TOKENS = 2, 192, 7
SITE = (InputSite("qkv", ACTION_HEAD, ("q", "k")),)
BASE = SideRecipe(solver="rtn", clip="absmax")


class Readers(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(width, 70, bias=False), nn.Linear(width, 34)

    def forward(self, x):
        return self.q(x), self.k(x)


def quantized(recipe, width=WIDTH):
    model = Readers(width).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    with calibrate(model, SITE) as calibration:
        for step in range(STEPS):
            with denoise_step(step, STEPS):
                model(torch.randn(40, width, generator=generator))
    quantize_linears(model, SITE, Recipe("test", recipe, recipe), calibration)
    return model


def site_output(model, x, step):
    with denoise_step(step, STEPS), torch.inference_mode():
        return torch.cat([one.clone() for one in model(x)], dim=1)


def strided(tokens=TOKENS, width=WIDTH, seed=3):
    """Rows as they lie beside their negatives in the engine."""
    return torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(seed))[:, :width]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"permutation": "serpentine"},
        {"rotation": "none"},
        {"rotation": "svd_hadamard", "per_step": False},
        {"activation": "token"},
        {"activation": "token", "group": 0},
        {"activation": "token", "scale_format": "integer_multiplier"},
        {"group": 32, "activation_group": 32},
        {"activation_bits": 8},
        {"weight_bits": 8, "activation_bits": 8, "activation": "token", "group": 0, "smoothing": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [192, 150], ids=["whole blocks", "short last block"])
def test_a_site_runs_bit_for_bit_as_its_own_code(changes, width):
    model = quantized(replace(BASE, **changes), width)
    product = merge([model.q, model.k], [None, None])
    assert isinstance(product, SiteProduct)
    run = product.bind(TOKENS, Buffers())
    for step in range(STEPS):
        x = strided(width=width, seed=step)
        assert torch.equal(run(x, step), site_output(model, x, step))


@pytest.mark.parametrize(
    "changes", [{"activation": "static_tensor"}, {"centring": True}, {"low_rank": 2}, {"activation": "static_channel"}]
)
def test_other_sites_run_their_own_code(changes):
    model = quantized(replace(BASE, **changes))
    product = merge([model.q, model.k], [None, None])
    assert isinstance(product, SimulatedProduct)
    run, x = product.bind(TOKENS, Buffers()), strided()
    with denoise_step(1, STEPS), torch.inference_mode():
        got = run(x, 1)
    assert torch.equal(got, site_output(model, x, 1))


@pytest.mark.parametrize("recipe", [BASE, replace(BASE, activation="static_tensor")], ids=["integer", "own code"])
def test_rows_can_be_reordered_and_left_out(recipe):
    model = quantized(recipe)
    order = torch.arange(34).flip(0)
    runs = [merge([model.k], [order]), merge([model.q, model.k], [None, order])]
    x = strided()
    expected = site_output(model, x, 0)
    with denoise_step(0, STEPS), torch.inference_mode():
        alone, both = (one.bind(TOKENS, Buffers())(x, 0).clone() for one in runs)
    assert torch.equal(alone, expected[:, 70:][:, order])
    assert torch.equal(both, torch.cat((expected[:, :70], expected[:, 70:][:, order]), dim=1))


def test_many_tokens_are_computed_in_blocks_with_the_same_outputs():
    model, tokens = quantized(BASE), 3000
    x = strided(tokens)
    run = merge([model.q, model.k], [None, None]).bind(tokens, Buffers())
    assert torch.equal(run(x, 1), site_output(model, x, 1))


def test_unquantized_linears_are_merged_and_agree():
    model = Readers().requires_grad_(False)
    product = merge([model.q, model.k], [torch.arange(70).flip(0), None])
    assert isinstance(product, FloatProduct) and product.copied_bytes() == 4 * WIDTH * 104
    x = strided()
    got = product.bind(TOKENS, Buffers())(x, 0)
    torch.testing.assert_close(got, torch.cat((model.q(x).flip(1), model.k(x)), dim=1), rtol=0, atol=1e-5)
    alone = merge([model.k], [None])
    assert alone.copied_bytes() == 0
    torch.testing.assert_close(alone.bind(TOKENS, Buffers())(x, 0), model.k(x), rtol=0, atol=1e-5)


def test_what_cannot_be_merged_runs_part_by_part(monkeypatch):
    model = quantized(BASE)
    plain = nn.Linear(WIDTH, 34).requires_grad_(False)
    assert isinstance(model.k, QuantizedLinear)
    mixed = merge([model.k, plain], [None, None])
    assert isinstance(mixed, Parts)
    x = strided()
    got = mixed.bind(TOKENS, Buffers())(x, 1)
    assert torch.equal(got[:, :34], site_output(model, x, 1)[:, 70:])
    torch.testing.assert_close(got[:, 34:], plain(x), rtol=0, atol=1e-5)
    # Two linears of one size share a buffer, and large ones are not copied to be merged.
    monkeypatch.setattr(cpu_linear, "_MERGED_BYTES", 0)
    pair = [nn.Linear(WIDTH, 34).requires_grad_(False) for _ in range(2)]
    large = merge(pair, [None, None])
    assert isinstance(large, Parts) and large.copied_bytes() == 0
    got = large.bind(TOKENS, Buffers())(x, 0)
    torch.testing.assert_close(got, torch.cat([one(x) for one in pair], dim=1), rtol=0, atol=1e-5)

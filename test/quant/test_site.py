"""The quantized layer in place of linears: shared inputs, steps, backends, schemes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from omega_qvla_core.errors import ConfigError, QuantizationError, StepContextError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant import (
    Override,
    QuantizedLinear,
    Recipe,
    SideRecipe,
    calibrate,
    quantize_linears,
    set_backend,
)
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.scope import ACTION_HEAD, InputSite

STEPS = 3
SITES = (InputSite("qkv", ACTION_HEAD, ("q", "k", "v")), InputSite("o", ACTION_HEAD, ("o",)))


class Block(nn.Module):
    """Linears like those of an attention layer, odd sizes, one with a bias."""

    def __init__(self, width=150):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (
            nn.Linear(width, 70, bias=False),
            nn.Linear(width, 33),
            nn.Linear(width, 33, bias=False),
        )
        self.o = nn.Linear(70, width, bias=False)

    def forward(self, x):
        return self.o(self.q(x)), self.k(x), self.v(x)


def inputs(seed=0, width=150):
    """[STEPS, 2, 40, width]; the channels' sizes and means are the same for every seed."""
    spread = torch.randn(width, generator=torch.Generator().manual_seed(99)).exp()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, 2, 40, width, generator=generator) * spread + spread


def quantized(recipe, width=150):
    model = Block(width).requires_grad_(False)
    with calibrate(model, SITES) as calibration:
        for step, x in enumerate(inputs(width=width)):
            with denoise_step(step, STEPS):
                model(x)
    results = quantize_linears(model, SITES, recipe, calibration)
    return model, results


def both(**fields):
    return Recipe("test", action_head=SideRecipe(**fields))


def error(model, width=150):
    wrong = right = 0.0
    reference = Block(width)
    for step, x in enumerate(inputs(seed=1, width=width)):
        with denoise_step(step, STEPS), torch.no_grad():
            for ours, theirs in zip(model(x), reference(x)):
                wrong += float((ours - theirs).square().sum())
                right += float(theirs.square().sum())
    return (wrong / right) ** 0.5


EIGHT = {"weight_bits": 8, "activation_bits": 8}
VARIANTS = {
    "executable": {},
    "svd_hadamard": {"rotation": "svd_hadamard"},
    "no rotation": {"rotation": "none"},
    "no rotation, no smoothing": {"rotation": "none", "smoothing": None},
    "permuted": {"permutation": "serpentine"},
    "centred": {"centring": True},
    "centred, one row": {"centring": True, "per_step": False},
    "token": {"activation": "token"},
    "static tensor": {"activation": "static_tensor"},
    "static channel": {"activation": "static_channel", "clip": "absmax"},
    "one scale per row": {"group": 0},
    "rotation block unlike the group": {"block": 32},
    "small groups": {"group": 32, "activation_group": 16},
    "not shared": {"shared_input": False},
    "low rank": {"low_rank": 8},
    "low rank, simulated": {"low_rank": 8, "activation": "static_channel", "clip": "absmax"},
    "output rotation": {"shared_input": False, "output_rotation": True},
    "output rotation per token": {
        "shared_input": False,
        "output_rotation": True,
        "activation": "token",
        "rotation": "svd",
    },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_eight_bits_are_close_to_the_float_model_whatever_the_scheme(fields):
    """At 8 bits everything but a mistake in the algebra is small."""
    model, results = quantized(both(**EIGHT, **fields))
    assert error(model) < 0.04
    assert all(result.error < 0.03 for result in results)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_four_bits_are_worse_and_still_useful(fields):
    assert 0.04 < error(quantized(both(**fields))[0]) < 0.25


def test_sixteen_bit_activations():
    assert error(quantized(both(weight_bits=8, activation_bits=16, activation="none", clip="absmax"))[0]) < 0.02


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_backends_agree_within_float32_rounding(fields):
    model, _ = quantized(both(**fields))
    x = inputs(seed=2)[0]
    with denoise_step(0, STEPS):
        set_backend(model, "reference")
        reference = model.q(x)
        set_backend(model, "cpu")
        assert torch.allclose(model.q(x), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_linears_keep_their_call_signature():
    model, _ = quantized(both())
    assert isinstance(model.q, QuantizedLinear)
    assert (model.q.in_features, model.q.out_features) == (150, 70)
    with denoise_step(0, STEPS):
        for shape in ((150,), (5, 150), (2, 3, 150), (0, 150)):
            assert model.k(torch.randn(shape)).shape == (*shape[:-1], 33)
        assert model.q(torch.randn(4, 150, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert torch.isfinite(model.q(torch.randn(150, 4).t())).all()


def test_a_step_is_needed_and_must_be_of_the_calibrated_number():
    model, _ = quantized(both())
    x = inputs()[0]
    with pytest.raises(StepContextError, match="qkv.*outside the denoise loop"):
        model.q(x)
    with denoise_step(0, STEPS + 1), pytest.raises(StepContextError, match="calibrated for 3 .* runs with 4"):
        model.q(x)


def test_without_per_step_tables_no_step_is_needed():
    model, _ = quantized(both(per_step=False))
    assert torch.isfinite(model.q(inputs()[0])).all()


def test_steps_have_tables_of_their_own():
    model, _ = quantized(both(activation="static_tensor", clip="absmax"))
    x = inputs()[0]
    outputs = []
    for step in range(STEPS):
        with denoise_step(step, STEPS):
            outputs.append(model.q(x))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sharing_an_input_never_gives_a_stale_output(mode):
    """Outputs wait for the other readers only while input, content and step are the same."""
    model, _ = quantized(both())
    alone = copy.deepcopy(model)
    with mode():
        x, other = inputs()[0].clone(), inputs()[1].clone()

        def fresh(name, x, step):
            with denoise_step(step, STEPS):
                return getattr(copy.deepcopy(alone), name)(x)

        with denoise_step(0, STEPS):
            model.q(x)
            assert torch.equal(model.k(other), fresh("k", other, 0))
            model.q(x)
            x.mul_(2)
            assert torch.equal(model.k(x), fresh("k", x, 0))
            first = model.v(x)
            assert torch.equal(model.v(x), first)
            model.q(x)
        with denoise_step(1, STEPS):
            assert torch.equal(model.v(x), fresh("v", x, 1))


def test_readers_of_one_input_run_one_product(monkeypatch):
    model, _ = quantized(both())
    calls = []
    site = model.q.site
    original = type(site).forward
    monkeypatch.setattr(type(site), "forward", lambda self, x: calls.append(1) or original(self, x))
    x = inputs()[0]
    with denoise_step(0, STEPS):
        model.k(x), model.v(x), model.q(x)
    assert len(calls) == 1 and site._shared is None


def test_an_input_that_is_not_a_number_does_not_come_out_healthy():
    for fields in ({}, {"activation": "token"}, {"activation": "static_tensor"}, {"rotation": "none"}):
        model, _ = quantized(both(**fields))
        x = inputs()[0]
        x[0, 3, 7] = float("nan")
        with denoise_step(0, STEPS):
            assert model.q(x)[0, 3].isnan().all()


def test_weights_are_really_stored_as_codes_two_per_byte():
    model, _ = quantized(both())
    site = next(iter(quantized_sites(model)))
    assert site.codes.dtype == torch.uint8 and site.codes.shape == (136, 75)
    assert site.scales.dtype == torch.float16 and site.scales.shape == (136, 3)
    assert not list(model.parameters())


def test_converting_the_model_does_not_touch_what_is_stored():
    model, _ = quantized(both())
    before = {name: tensor.clone() for name, tensor in model.q.site.tensors().items()}
    for convert in (nn.Module.half, nn.Module.double):
        convert(model)
        for name, tensor in model.q.site.tensors().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_overrides_split_a_site():
    recipe = Recipe("mixed", overrides=(Override("v", {"weight_bits": 8}),))
    model, results = quantized(recipe)
    assert [result.site.spec.name for result in results] == ["qkv[q+k]", "v", "o"]
    assert model.v.site.codes.dtype == torch.int8
    assert model.q.site is model.k.site is not model.v.site


def test_an_override_can_leave_a_linear_alone():
    keep = {"weight_bits": 16, "activation_bits": 16, "activation": "none", "clip": "absmax"}
    model, results = quantized(Recipe("mixed", overrides=(Override("o", keep),)))
    assert isinstance(model.o, nn.Linear) and [result.site.spec.name for result in results] == ["qkv"]


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="matches no linear"):
        quantized(Recipe("mixed", overrides=(Override("*.down_porj", {"weight_bits": 8}),)))


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = Block()
    with torch.no_grad(), calibrate(model, SITES) as calibration:
        for step, x in enumerate(inputs()):
            with denoise_step(step, STEPS):
                model(x)
        model.k.weight[3, 3] = float("inf")
    with pytest.raises(QuantizationError, match="^k: "):
        quantize_linears(model, SITES, both(), calibration)


def test_all_zero_inputs_and_weights_are_survived():
    model = Block()
    sites = (replace(SITES[1]),)
    with torch.no_grad(), calibrate(model, sites) as calibration:
        model.o.weight[:] = 0
        model.o(torch.zeros(40, 70))
    quantize_linears(model, sites, both(), calibration)
    assert not model.o(torch.randn(4, 70)).any()


def test_dead_channels_are_survived_and_noted():
    model = Block()
    x = inputs()[0]
    x[..., :20] = 0
    sites = SITES[:1]
    with torch.no_grad(), calibrate(model, sites) as calibration:
        model.q(x)
    result = quantize_linears(model, sites, both(rotation="none"), calibration)[0]
    assert any("20 dead input channels" in note for note in result.notes)
    assert result.error < 0.5

"""Calibration: streamed, per denoise step, each observation once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.calibrate import calibrate
from omega_qvla_core.quant.scope import ACTION_HEAD, LANGUAGE, InputSite, sites_of_linears

SITE = InputSite("block.qk", ACTION_HEAD, ("q", "k"))


class Pair(nn.Module):
    """Two linears that read one input."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        return self.q(x), self.k(x)


def test_sums_per_step_are_those_of_the_tokens():
    model, x = Pair(), torch.randn(3, 20, 6)
    with torch.no_grad(), calibrate(model, [SITE]) as calibration:
        for _ in range(2):
            for step in range(3):
                with denoise_step(step, 3):
                    model(x[step, :10])
                    model(x[step, 10:])
    found = calibration["block.qk"]
    assert found.steps == 3 and found.counts == [40, 40, 40]
    for step in range(3):
        assert torch.allclose(found.gram(step), 2 * (x[step].T @ x[step]).double(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.gram(), sum(found.gram(step) for step in range(3)))
    assert torch.allclose(found.mean().float(), x.mean(dim=1), atol=1e-6)
    assert torch.equal(found.absmax(), x.abs().amax(dim=1))
    assert torch.equal(found.tokens()[1][:20], x[1])


def test_readers_of_one_input_count_it_once_and_hooks_go_away():
    model = Pair()
    with calibrate(model, [SITE]) as calibration:
        model(torch.randn(5, 6))
    model(torch.randn(5, 6))
    assert calibration["block.qk"].counts == [5]


def test_readers_that_get_different_inputs_are_refused():
    model = Pair()
    with pytest.raises(QuantizationError, match="different"), calibrate(model, [SITE]):
        model.q(torch.randn(5, 6))
        model.k(torch.randn(5, 6))


def test_masked_tokens_do_not_count():
    model, x = Pair(), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    with calibrate(model, [SITE]) as calibration, calibration.token_mask(mask):
        model(x)
    assert calibration["block.qk"].counts == [6]
    assert torch.equal(calibration["block.qk"].absmax()[0], x[mask].abs().amax(dim=0))


def test_the_sample_is_bounded_and_reproducible():
    def run(seed):
        model, x = Pair(), torch.arange(3000.0).view(500, 6)
        with torch.no_grad(), calibrate(model, [SITE], reservoir_tokens=50, seed=seed) as calibration:
            for part in x.split(70):
                model(part)
        return calibration["block.qk"].tokens()[0]

    assert run(0).shape == (50, 6)
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    # Tokens from the whole stream, not only its start.
    assert 1000 < float(run(0)[:, 0].mean()) < 2000


def test_values_that_are_not_finite_are_refused_by_name():
    model, x = Pair(), torch.randn(5, 6)
    x[2, 2] = float("nan")
    with pytest.raises(QuantizationError, match="block.qk"), calibrate(model, [SITE]):
        model(x)


def test_two_numbers_of_steps_are_refused():
    model = Pair()
    with pytest.raises(QuantizationError, match="8 denoise steps and then with 4"), calibrate(model, [SITE]):
        for total in (8, 4):
            with denoise_step(0, total):
                model(torch.randn(5, 6))


def test_a_layer_never_seen_a_step_never_seen_and_too_few_tokens_are_refused():
    model = Pair()
    with calibrate(model, [SITE]) as calibration:
        pass
    with pytest.raises(QuantizationError, match=r"block\.qk was never seen"):
        calibration["block.qk"]
    with calibrate(model, [SITE]) as calibration, denoise_step(0, 2):
        model(torch.randn(50, 6))
    with pytest.raises(QuantizationError, match="0 tokens seen at denoise step 1 of 2"):
        calibration["block.qk"].check()
    with calibrate(model, [SITE]) as calibration:
        model(torch.randn(3, 6))
    with pytest.raises(QuantizationError, match="3 tokens seen, at least 16"):
        calibration["block.qk"].check()


def test_a_site_that_is_no_linear_is_refused():
    model = nn.Module()
    model.conv = nn.Conv2d(3, 3, 1)
    for name in ("conv", "missing"):
        with pytest.raises(QuantizationError, match=name), calibrate(model, sites_of_linears([name], LANGUAGE)):
            pass


def test_gram_matrices_are_summed_in_pieces(monkeypatch):
    monkeypatch.setattr("omega_qvla_core.quant.statistics._GRAM_ROWS", 4)
    model, x = Pair(), torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), calibrate(model, [SITE]) as calibration:
        model(x)
    assert torch.allclose(calibration["block.qk"].gram(), (x.T @ x).double(), rtol=1e-5, atol=1e-5)

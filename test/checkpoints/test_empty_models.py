"""Models that are built to be filled: no memory for weights, and no random numbers for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omega_qvla_core.checkpoints.families import build_empty, build_model
from omega_qvla_core.evaluate.bench_presets import preset
from omega_qvla_core.models.empty import on_meta_device


@pytest.fixture
def nothing_may_be_drawn(monkeypatch):
    """What every ``nn.init.normal_`` ends in; on the meta device it imports torch's compiler, which takes seconds."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("normally distributed numbers are drawn")

    monkeypatch.setattr(nn.init, "_no_grad_normal_", fail)


@pytest.mark.parametrize("family", ["pi05", "gr00t_n15"])
def test_an_empty_model_is_built_without_drawing(family, nothing_may_be_drawn):
    config = preset(family, "tiny")
    assert all(value.is_meta for value in build_empty(config, "here").parameters())
    with pytest.raises(AssertionError, match="are drawn"):
        build_model(config)


def test_only_drawing_is_left_out(nothing_may_be_drawn):
    with on_meta_device():
        layer = nn.Linear(3, 2)
        drawn = nn.init.normal_(tensor=layer.weight)
        ones = torch.ones(2) + 1
    assert drawn is layer.weight and layer.weight.shape == (2, 3) and ones.is_meta
    torch.testing.assert_close(torch.ones(2) + 1, torch.full((2,), 2.0))

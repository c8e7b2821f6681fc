"""Models that are built to be filled: no memory for weights, and no random numbers for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from omega_qvla_core.checkpoints.families import build_empty, build_model
from omega_qvla_core.evaluate.bench_presets import preset
from omega_qvla_core.models.empty import on_meta_device
from omega_qvla_core.runtime import Policy

FAMILIES = {"siglip": "pi05", "gr00t": "gr00t_n15"}


class Watched(TorchDispatchMode):
    """Names of the operators that draw normally distributed numbers, among those that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.randn):
            self.draws.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vision", ["siglip", "keypoint", "gr00t"])
def test_an_empty_model_is_built_without_drawing(vision):
    config = Policy.load("tabletop").model.config if vision == "keypoint" else preset(FAMILIES[vision], "tiny")
    with Watched() as empty:
        assert all(value.is_meta for value in build_empty(config, "here").parameters())
    with Watched() as filled:
        build_model(config)
    assert filled.draws and not empty.draws


def test_only_drawing_is_left_out():
    with on_meta_device():
        layer = nn.Linear(3, 2)
        drawn = nn.init.normal_(tensor=layer.weight)
        ones = torch.ones(2) + 1
    assert drawn is layer.weight and layer.weight.shape == (2, 3) and ones.is_meta

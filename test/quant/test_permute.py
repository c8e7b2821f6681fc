"""Orders of channels: METHOD A.2."""

from __future__ import annotations

import pytest
import torch

from omega_qvla_core.quant.permute import PERMUTATIONS, channel_score


def test_interleave_takes_largest_smallest_second_largest_second_smallest():
    score = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    assert PERMUTATIONS["interleave"](score, 64).tolist() == [2, 1, 4, 3, 0]


def test_serpentine_deals_to_and_fro():
    score = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert PERMUTATIONS["serpentine"](score, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
@pytest.mark.parametrize("channels", [1, 64, 150, 200])
def test_every_order_holds_every_channel_once(name, channels):
    score = torch.rand(channels, generator=torch.Generator().manual_seed(channels))
    assert sorted(PERMUTATIONS[name](score, 64).tolist()) == list(range(channels))


def block_spread(name, score):
    energies = score[PERMUTATIONS[name](score, 64)].view(-1, 64).sum(dim=1)
    return float(energies.max() / energies.min())


def test_serpentine_evens_out_blocks_and_interleave_does_the_opposite():
    score = torch.randn(512, generator=torch.Generator().manual_seed(0)).exp().square()
    assert block_spread("serpentine", score) < block_spread("none", score) < block_spread("interleave", score)


def test_scores():
    weight, peak = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([2.0, 3.0])
    assert channel_score(weight, peak, "weight").tolist() == [5.0, 2.0]
    assert channel_score(weight, peak, "act").tolist() == [4.0, 9.0]
    assert channel_score(weight, peak, "act_weight").tolist() == [20.0, 18.0]

"""Properties of the rotations: METHOD A.3 and A.4."""

from __future__ import annotations

import pytest
import torch

from omega_qvla_core.quant.rotation import (
    ROTATIONS,
    apply_blocks,
    hadamard_blocks,
    hadamard_matrix,
    input_rotation,
    output_rotation,
)

MODES = sorted(ROTATIONS)


def random_weight(rows=96, columns=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(columns, generator=generator, dtype=torch.float64) * 5 + 0.01
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [1, 32, 64, 200, 192, 150])
def test_every_rotation_is_orthogonal(mode, columns):
    for block in input_rotation(random_weight(columns=columns), mode, 64):
        assert torch.allclose(block @ block.T, torch.eye(block.shape[0], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_rotation_leaves_the_output_unchanged(mode):
    weight = random_weight()
    x = torch.randn(10, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    blocks = input_rotation(weight, mode, 64)
    rotated = apply_blocks(x.float(), blocks) @ apply_blocks(weight, blocks).float().T
    y = x @ weight.T
    assert (rotated - y).norm() / y.norm() < 1e-5


def test_svd_hadamard_makes_all_column_energies_of_a_block_equal():
    weight = random_weight(columns=192)
    rotated = apply_blocks(weight, input_rotation(weight, "svd_hadamard", 64))
    for block, original in zip(rotated.split(64, dim=1), weight.split(64, dim=1)):
        energies = block.square().sum(dim=0)
        assert float(energies.max() / energies.min()) == pytest.approx(1.0, abs=1e-9)
        assert float(energies[0]) == pytest.approx(float(original.square().sum()) / 64)


def test_svd_alone_and_hadamard_alone_do_not():
    weight = random_weight(columns=192)
    for mode, least in (("svd", 10.0), ("hadamard", 1.1), ("none", 10.0)):
        energies = apply_blocks(weight, input_rotation(weight, mode, 64))[:, :64].square().sum(dim=0)
        assert float(energies.max() / energies.min()) > least


@pytest.mark.parametrize("mode", ["svd", "svd_hadamard"])
def test_signs_are_reproducible(mode):
    """Rows in another order have the same Gram matrix up to rounding, and a solver is free in the signs."""
    weight = random_weight(columns=64)
    shuffled = weight[torch.randperm(96, generator=torch.Generator().manual_seed(2))]
    first, second = input_rotation(weight, mode, 64)[0], input_rotation(shuffled, mode, 64)[0]
    assert torch.allclose(first, second, atol=1e-6)


def test_eigenvectors_come_by_falling_energy():
    weight = random_weight(columns=64)
    energies = apply_blocks(weight, input_rotation(weight, "svd", 64)).square().sum(dim=0)
    assert (energies.diff() <= 1e-9).all()


def test_blocks_that_are_no_power_of_two():
    """U alone for svd_hadamard, as published; blocks of falling powers of two for hadamard."""
    weight = random_weight(columns=40)
    svd, both = (input_rotation(weight, mode, 64)[0] for mode in ("svd", "svd_hadamard"))
    assert torch.equal(svd, both)
    blocks = hadamard_blocks(40)
    assert torch.equal(blocks[:32, :32], hadamard_matrix(32)) and torch.equal(blocks[32:, 32:], hadamard_matrix(8))
    assert not blocks[:32, 32:].any()


def test_a_short_last_block_of_a_power_of_two_is_a_hadamard_matrix():
    """I = 4304 of SigLIP ends in a block of 16."""
    blocks = input_rotation(random_weight(columns=80), "hadamard", 64)
    assert [block.shape[0] for block in blocks] == [64, 16]
    assert torch.equal(blocks[1], hadamard_matrix(16))


def test_a_hadamard_order_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="48"):
        hadamard_matrix(48)


def test_the_output_rotation_is_undone_exactly():
    weight = random_weight(rows=150)
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    blocks = output_rotation(weight, 64)
    assert [block.shape[0] for block in blocks] == [64, 64, 22]
    rotated = torch.cat([block @ rows for block, rows in zip(blocks, weight.split(64))])
    restored = apply_blocks(x @ rotated.T, blocks)
    assert torch.allclose(restored, x @ weight.T, atol=1e-9)
    mixed = blocks[0].T @ weight[:64] @ weight[:64].T @ blocks[0]
    assert torch.allclose(mixed, torch.diag(mixed.diagonal()), atol=1e-6 * float(mixed.max()))

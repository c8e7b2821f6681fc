"""Storage of codes: every code survives, two per byte, at odd sizes too."""

from __future__ import annotations

import pytest
import torch

from omega_qvla_core.kernels import code_range, pack_codes, packed_columns, unpack_codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (150, 199)])
def test_codes_come_back(bits, shape):
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert packed.shape == (shape[0], packed_columns(shape[1], bits))
    assert torch.equal(unpack_codes(packed, bits, shape[1]), codes)


def test_two_codes_share_a_byte_low_nibble_first():
    codes = torch.tensor([[-8, 7, -1]], dtype=torch.int8)
    packed = pack_codes(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x78, 0x0F]]


def test_a_code_out_of_range_is_refused():
    with pytest.raises(ValueError, match="-8..7"):
        pack_codes(torch.tensor([[8]], dtype=torch.int8), 4)


def test_ranges():
    assert code_range(4) == (-8, 7)
    assert code_range(8) == (-128, 127)

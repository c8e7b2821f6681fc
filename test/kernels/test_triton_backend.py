"""Backend ``triton``: integer sums against an int64 oracle, outputs against the ``cpu`` backend."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from triton_cases import DEVICE, generator, random_codes, random_weight

from omega_qvla_core import kernels
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.kernels import BACKENDS, backend, code_range
from omega_qvla_core.kernels.base import grouped

# Of Triton's interpreter: numpy conversions, and exp of what saturates anyway.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

# tokens, columns, outputs, group: sizes of the shipped policy, odd sizes, one of each, the longest sums of Pi 0.5.
SIZES = [
    (16, 384, 128, 64),
    (3, 200, 150, 64),
    (1, 1, 1, 64),
    (7, 65, 129, 65),
    (5, 77, 20, 16),
    (70, 130, 33, 128),
    (2, 2048, 9, 64),
    (2, 16384, 40, 16384),
]


def oracle(codes, weight):
    """int64 sums [G, M, O]."""
    wide = grouped(weight.codes.long().cpu(), weight.group)
    return torch.bmm(codes.long().cpu(), wide.transpose(1, 2))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("bits", "extreme"), [(4, None), (4, (0, 0)), (4, (0, 1)), (8, None), (8, (0, 0))],
    ids=["4 random", "4 low*low", "4 low*high", "8 random", "8 low*low"],
)  # fmt: skip
def test_triton_sums_equal_an_int64_oracle_bit_for_bit(size, bits, extreme):
    tokens, columns, outputs, group = size
    limits = code_range(bits)
    weight = random_weight(outputs, columns, group, bits, None if extreme is None else limits[extreme[0]])
    codes = random_codes(tokens, columns, bits)
    if extreme is not None:
        codes = torch.full_like(codes, limits[extreme[1]])
    codes = grouped(codes.float(), group)
    triton = backend("triton")
    assert torch.equal(triton.accumulators(codes, triton.prepare(weight)).cpu(), oracle(codes, weight))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["token_group", "token", "tensor"])
def test_triton_backend_agrees_with_cpu_backend(size, kind):
    """The same exact sums times the same scales, added in the same order: a fused multiply-add is all that differs."""
    tokens, columns, outputs, group = size
    weight, codes = random_weight(outputs, columns, group), grouped(random_codes(tokens, columns).float(), group)
    groups = codes.shape[0]
    shape = {"token_group": (groups, tokens, 1), "token": (1, tokens, 1), "tensor": (1, 1, 1)}[kind]
    scales = torch.rand(shape, generator=generator(1)) + 0.1
    triton = backend("triton")
    found = triton.linear(codes, scales.to(DEVICE), triton.prepare(weight)).cpu()
    on_cpu = kernels.GroupedWeight(weight.codes.cpu(), weight.scales.cpu(), group)
    expected = BACKENDS["cpu"].linear(codes.cpu(), scales, BACKENDS["cpu"].prepare(on_cpu))
    sums = oracle(codes.abs(), kernels.GroupedWeight(on_cpu.codes.abs(), on_cpu.scales, group)).double()
    bound = (sums * scales * on_cpu.scales.double().t()[:, None]).sum(dim=0)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= bound * 2.0**-24 * (groups + 2) + 1e-30).all()


def test_triton_backend_takes_no_tokens():
    triton = backend("triton")
    prepared = triton.prepare(random_weight(9, 128, 64))
    assert triton.linear(torch.zeros(2, 0, 64), torch.ones(2, 0, 1), prepared).shape == (0, 9)


def test_triton_rows_of_zeros_stay_zero_and_leave_the_others_alone():
    triton, weight = backend("triton"), random_weight(20, 128, 64)
    codes, scales = grouped(random_codes(6, 128).float(), 64), torch.ones(2, 6, 1, device=DEVICE)
    full = triton.linear(codes, scales, triton.prepare(weight))
    codes[:, 2] = 0
    weight.codes[4] = 0
    y = triton.linear(codes, scales, triton.prepare(weight))
    keep, rows = [0, 1, 3, 4, 5], [index for index in range(20) if index != 4]
    assert not y[2].any() and not y[:, 4].any()
    assert torch.equal(y[keep][:, rows], full[keep][:, rows])


def test_triton_scale_that_is_not_a_number_shows_in_the_output():
    triton, weight = backend("triton"), random_weight(20, 128, 64)
    scales = torch.ones(2, 6, 1, device=DEVICE)
    scales[1, 3] = float("nan")
    y = triton.linear(grouped(random_codes(6, 128).float(), 64), scales, triton.prepare(weight))
    assert y[3].isnan().all() and y[2].isfinite().all()


def test_triton_backend_runs_a_quantized_layer(monkeypatch):
    """The way of a single layer: ``set_backend`` on a site."""
    from omega_qvla_core.quant.recipe import SideRecipe
    from omega_qvla_core.quant.site import QuantizedSite, Reader, SiteSpec

    weight = random_weight(24, 128, 64)
    spec = SiteSpec("layer", "language", (Reader("layer", 24),), 128, 0, SideRecipe(per_step=False))
    tensors = {
        "codes": kernels.pack_codes(weight.codes.cpu(), 4),
        "scales": weight.scales.cpu().half(),
        "activation": torch.ones(1, 2),
    }
    site, x = QuantizedSite(spec, tensors), torch.randn(5, 128, generator=generator(2))
    expected = site(x)
    site = QuantizedSite(spec, tensors).to(DEVICE)
    site.set_backend("triton")
    assert torch.allclose(site(x.to(DEVICE)).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_triton_backend_without_the_package_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        backend("triton")
    assert importlib.util.find_spec("triton") is not None


def test_unknown_backend_lists_triton():
    with pytest.raises(ConfigError, match="reference, cpu, triton"):
        backend("tritom")

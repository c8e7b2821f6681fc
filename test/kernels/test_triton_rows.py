"""Norm, rotation and codes of a token; attention; against the modules and the quantizer's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the package triton is not installed")

from triton_cases import DEVICE, FLOAT, ROTATION_RELATIVE, largest_difference, random_floats

from omega_qvla_core.kernels.triton_kernels import numerics, rows
from omega_qvla_core.kernels.triton_kernels.coding import Coding, hadamard_tail
from omega_qvla_core.kernels.triton_kernels.launch_rows import (
    AttentionBlocks,
    Heads,
    Shares,
    activate,
    attend,
    merge,
    norm,
    rotate_heads,
)
from omega_qvla_core.kernels.triton_kernels.layout import hadamard
from omega_qvla_core.models.layers import apply_rotary, rotary_angles
from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES, row_factors
from omega_qvla_core.quant.recipe import SideRecipe
from omega_qvla_core.quant.transform import InputTransform

# Of Triton's interpreter: numpy conversions, and exp of what saturates anyway.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

TOKENS = 5


def codes_of_quantizer(x, width, group, scheme, bits, ratios):
    """Codes [T, K] and scales [G or 1, T] as a quantized site makes them."""
    recipe = SideRecipe(smoothing=None, activation=scheme, activation_group=group, group=group)
    transform = InputTransform.from_tensors(recipe, width, {})
    u = transform.apply(x.cpu().float(), group if scheme == "token_group" else 64)
    codes, scales = ACTIVATION_SCHEMES[scheme].encode(u, row_factors(scheme, ratios, bits), bits)
    return codes.transpose(0, 1).reshape(x.shape[0], -1)[:, :width], scales[..., 0]


@pytest.mark.parametrize("width", [64, 192, 80, 1024])
@pytest.mark.parametrize(("scheme", "group"), [("token", 64), ("token_group", 64), ("token_group", 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_triton_codes_equal_the_quantizers(width, scheme, group, bits):
    x = random_floats(TOKENS, width)
    x[3] = 0
    groups = 1 if scheme == "token" else -(-width // group)
    ratios = torch.linspace(0.7, 1.0, groups)
    expected, expected_scales = codes_of_quantizer(x, width, group, scheme, bits, ratios)
    high = 2 ** (bits - 1) - 1
    mode = rows.TOKEN if scheme == "token" else rows.TOKEN_GROUP
    coding = Coding(mode, group, high, (ratios / high).to(DEVICE), True, hadamard_tail(width, DEVICE))
    out = torch.full((TOKENS, width), 99, dtype=torch.int8, device=DEVICE)
    scales = torch.zeros(groups, 16, device=DEVICE)
    norm(x, out, scales, coding)
    assert largest_difference(scales[:, :TOKENS].cpu(), expected_scales) < ROTATION_RELATIVE
    wrong = (out.cpu().float() - expected).abs()
    # A value at a tie may go either way: the kernel multiplies by the inverse of the scale.
    assert wrong.max() <= 1 and (wrong > 0).float().mean() < 0.002
    assert not out[3].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_triton_codes_of_values_that_are_not_finite_show_it_in_the_scale(value):
    x = random_floats(TOKENS, 128)
    x[2, 100] = value
    for mode in (rows.TOKEN, rows.TOKEN_GROUP):
        scales = torch.zeros(2 if mode == rows.TOKEN_GROUP else 1, 16, device=DEVICE)
        out = torch.zeros(TOKENS, 128, dtype=torch.int8, device=DEVICE)
        factor = torch.full((2,), 1 / 7, device=DEVICE)
        norm(x, out, scales, Coding(mode, 64, 7, factor, True))
        assert scales[-1, 2].isnan() and scales[:, 1].isfinite().all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_triton_norm_adds_the_shares_of_the_product_and_modulates(kind):
    width = 192
    x, parts = random_floats(TOKENS, width), random_floats(4, 16, 256, seed=1)
    gate, mul, add = (random_floats(width, seed=seed) for seed in (2, 3, 4))
    updated = x + gate * parts.sum(dim=0)[:TOKENS, :width]
    if kind == "rms":
        expected = F.rms_norm(updated, (width,), eps=1e-6) * mul + add
    else:
        expected = F.layer_norm(updated, (width,), eps=1e-6) * mul + add
    out = torch.zeros(TOKENS, width, dtype=FLOAT, device=DEVICE)
    chosen = rows.RMS_NORM if kind == "rms" else rows.LAYER_NORM
    norm(x, out, None, Coding(), kind=chosen, eps=1e-6, mul=mul, add=add, parts=parts, gate=gate)
    assert torch.allclose(x, updated, rtol=1e-5, atol=1e-5)
    assert largest_difference(out, expected) < 2.0**-8


HEADS = [Heads(8, 1, 64), Heads(4, 2, 32), Heads(2, 2, 48)]
# Descriptors read past the last key, where numbers must be finite.
READS = pytest.mark.parametrize(
    ("described", "unused"), [(False, float("nan")), (True, 3e4)], ids=["pointers", "descriptors"]
)


def expected_attention(q, k, v, heads, visible=None):
    """Plain attention in float32: q [T, heads * dim], k and v [K, kv * dim]."""
    tokens = q.shape[0]
    queries = q.float().view(tokens, heads.count, heads.dim).transpose(0, 1)
    keys, values = (
        one.float()
        .view(one.shape[0], heads.kv, heads.dim)
        .transpose(0, 1)
        .repeat_interleave(heads.count // heads.kv, 0)
        for one in (k, v)
    )
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    return mixed.transpose(0, 1).reshape(tokens, -1)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@READS
def test_triton_attention_sees_the_keys_that_are_there(heads, causal, described, unused):
    tokens = keys = 21
    q = random_floats(tokens, heads.count * heads.dim).to(FLOAT)
    room = 40
    k, v = (random_floats(room, heads.kv * heads.dim, seed=seed).to(FLOAT) for seed in (1, 2))
    k[keys:], v[keys:] = unused, unused
    out = torch.zeros(tokens, heads.count * heads.dim, device=DEVICE)
    count = torch.tensor([keys], dtype=torch.int32, device=DEVICE)
    attend(q, k, v, count, out, heads, tokens, causal=causal, blocks=AttentionBlocks(32, 32, described=described))
    visible = torch.ones(tokens, keys, dtype=torch.bool, device=DEVICE).tril() if causal else None
    assert largest_difference(out, expected_attention(q, k[:keys], v[:keys], heads, visible)) < 1e-2


@READS
def test_triton_attention_in_shares_with_the_newest_keys_is_joined_and_coded(described, unused):
    heads, tokens, room, keys = Heads(4, 1, 64), 7, 80, 70
    q = random_floats(16, 256).to(FLOAT)
    kv = random_floats(room + 16, 128, seed=1).to(FLOAT)
    kv[keys:room] = unused
    shares = Shares.empty(3, tokens * 4, 64, DEVICE)
    count = torch.tensor([keys], dtype=torch.int32, device=DEVICE)
    attend(q, kv, kv[:, 64:], count, shares, heads, tokens, suffix_start=room, most_keys=room,
           blocks=AttentionBlocks(32, 16, described=described))  # fmt: skip
    seen = torch.cat((kv[:keys], kv[room : room + tokens]))
    expected = expected_attention(q[:tokens], seen[:, :64], seen[:, 64:], heads)
    out = torch.zeros(tokens, 256, dtype=FLOAT, device=DEVICE)
    merge(shares, out, None, Coding(), tokens, 4)
    assert largest_difference(out, expected) < 2.0**-6
    codes, scales = torch.zeros(tokens, 256, dtype=torch.int8, device=DEVICE), torch.zeros(4, 16, device=DEVICE)
    factor = torch.full((4,), 1 / 127, device=DEVICE)
    merge(shares, codes, scales, Coding(rows.TOKEN_GROUP, 64, 127, factor, True), tokens, 4)
    back = (codes.float().view(tokens, 4, 64) * scales[:, :tokens].t()[..., None]) @ hadamard(64, DEVICE)
    assert largest_difference(back.view(tokens, 256), expected) < 0.03


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shares"])
@pytest.mark.parametrize("normed", [False, True])
def test_triton_heads_are_normed_turned_and_put_into_the_cache(normed, shared):
    heads, tokens = Heads(4, 2, 32), 6
    qkv = random_floats(3, 16, 8 * 32) if shared else random_floats(tokens, 8 * 32)
    q_out = torch.zeros(tokens, 128, device=DEVICE) if shared else qkv
    before = (qkv.sum(dim=0)[:tokens] if shared else qkv.clone()).view(1, tokens, 8, 32).transpose(1, 2)
    angles = rotary_angles(torch.arange(tokens, device=DEVICE)[None], 32, 1e4)
    cos, sin = (one[0, 0].contiguous() for one in angles)
    weights = (random_floats(32, seed=1), random_floats(32, seed=2))
    k_out, v_out = torch.zeros(tokens, 64, device=DEVICE), torch.zeros(tokens, 64, device=DEVICE)
    rotate_heads(qkv, q_out, k_out, v_out, cos, sin, heads, tokens, weights if normed else None, 1e-6)
    q, k, v = before[:, :4], before[:, 4:6], before[:, 6:]
    if normed:
        q, k = (F.rms_norm(one, (32,), weight, 1e-6) for one, weight in ((q, weights[0]), (k, weights[1])))
    flat = [one.transpose(1, 2).reshape(tokens, -1) for one in (apply_rotary(q, angles), apply_rotary(k, angles), v)]
    assert torch.allclose(q_out[:, :128], flat[0], atol=1e-5)
    assert torch.allclose(k_out, flat[1], atol=1e-5) and torch.allclose(v_out, flat[2], atol=1e-6)


ACTIVATIONS = {
    numerics.GELU: lambda x: F.gelu(x, approximate="tanh"),
    numerics.SILU: F.silu,
    numerics.RELU: F.relu,
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "silu", "relu"])
def test_triton_shares_of_a_product_are_added_activated_and_coded(activation, gated):
    width, group, up = 1100, 64, 1152 if gated else None
    parts, mul = random_floats(3, 16, 2 * 1152), random_floats(width, seed=1)
    gates, ups = parts.sum(dim=0)[:TOKENS, :width], parts.sum(dim=0)[:TOKENS, 1152 : 1152 + width]
    expected = ACTIVATIONS[activation](gates) * (ups if gated else 1.0) * mul
    plain = torch.zeros(TOKENS, 1152, dtype=FLOAT, device=DEVICE)
    activate(parts, plain, None, Coding(), TOKENS, width, up_column=up, activation=activation, mul=mul)
    assert largest_difference(plain[:, :width], expected) < 2.0**-8
    codes, scales = torch.zeros(TOKENS, 1152, dtype=torch.int8, device=DEVICE), torch.zeros(18, 16, device=DEVICE)
    coding = Coding(rows.TOKEN_GROUP, group, 127, torch.full((18,), 1 / 127, device=DEVICE))
    activate(parts, codes, scales, coding, TOKENS, width, up_column=up, activation=activation, mul=mul)
    back = codes.view(TOKENS, 18, 64) * scales[:, :TOKENS].t()[..., None]
    assert largest_difference(back.view(TOKENS, -1)[:, :width], expected) < 1 / 127


def test_triton_activation_does_not_hide_what_is_not_a_number():
    parts = random_floats(1, 16, 1088)
    parts[0, 2, 70] = float("nan")
    for activation in ACTIVATIONS:
        out = torch.zeros(TOKENS, 1088, device=DEVICE)
        activate(parts, out, None, Coding(), TOKENS, 1088, activation=activation)
        assert out[2, 70].isnan() and out.isnan().sum() == 1

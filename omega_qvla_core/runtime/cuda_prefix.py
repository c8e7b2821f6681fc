"""A language tower over the prefix: keys and values of every layer (Pi 0.5), or what comes out of the last (GR00T)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.kernels.triton_kernels import large_gemm, rows
from omega_qvla_core.kernels.triton_kernels.launch_rows import Heads, attend, rotate_heads
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.layers import GEMMA, Flavour, RMSNorm, rotary_angles
from omega_qvla_core.runtime.cuda_layers import LargeProduct, NormFactors, Workspace
from omega_qvla_core.runtime.cuda_sites import SiteReader, scaled


@dataclass(frozen=True)
class _Layer:
    norm1: NormFactors
    qkv: LargeProduct
    heads_norm: tuple[Tensor, Tensor] | None
    norm2: NormFactors | None
    out: LargeProduct | None
    gate_up: LargeProduct | None
    down: LargeProduct | None


class CudaPrefix:
    """Prefix embeddings to keys and values, and to the rows after the last layer.

    Args:
        tower: ``layers`` of ``models.layers.Block``.
        heads: Of the tower.
        eps: Of its norms.
        rope_theta: Base of its rotary frequencies.
        tuned: Block sizes.
        dtype: Of rows and unquantized weights.
        expand: See ``weights.large_weight``.
        flavour: Of the tower.
        causal: Whether a token sees those before it only.
        complete: Whether the last layer runs to its end; else nothing reads the tower's output, and it ends at its keys
            and values.

    Attributes:
        bits: Of what was read, for the name of the precision.
    """

    def __init__(
        self, tower: nn.Module, heads: Heads, eps: float, rope_theta: float, tuned: Tuning, dtype: torch.dtype,
        expand: bool, flavour: Flavour = GEMMA, causal: bool = False, complete: bool = False,
    ) -> None:  # fmt: skip
        self._flavour, self._causal = flavour, causal
        self.heads, self.eps, self.rope_theta, self.tuned, self.dtype = heads, eps, rope_theta, tuned, dtype
        self._site = SiteReader(dtype)
        self.bits = self._site.bits
        cut = len(tower.layers) if complete else len(tower.layers) - 1
        self._layers = [self._layer(index, layer, index == cut, expand) for index, layer in enumerate(tower.layers)]

    def _layer(self, index: int, layer: nn.Module, cut: bool, expand: bool) -> _Layer:
        attention, mlp, name = layer.self_attn, layer.mlp, f"language layer {index}"
        qkv = self._site(f"{name} qkv", attention.q_proj, attention.k_proj, attention.v_proj)
        norm1, heads_norm = rms_factors(layer.input_layernorm, qkv.input.unsmooth), None
        if self._flavour.qk_norm:
            heads_norm = rms_factors(attention.q_norm, None).mul, rms_factors(attention.k_norm, None).mul
        if cut:
            queries = self.heads.count * self.heads.dim
            chosen = torch.arange(queries, queries + 2 * self.heads.kv * self.heads.dim, device=norm1.mul.device)
            product = LargeProduct(qkv.input, qkv.large(chosen, expand=expand), self.tuned)
            return _Layer(norm1, product, heads_norm, None, None, None, None)
        out = self._site(f"{name} out", attention.o_proj)
        gate_up = self._site(f"{name} gate and up", mlp.gate_proj, mlp.up_proj)
        down = self._site(f"{name} down", mlp.down_proj)
        return _Layer(
            norm1,
            LargeProduct(qkv.input, qkv.large(expand=expand), self.tuned),
            heads_norm,
            rms_factors(layer.post_attention_layernorm, gate_up.input.unsmooth),
            LargeProduct(out.input, out.large(expand=expand), self.tuned),
            LargeProduct(gate_up.input, gate_up.large(gated=True, expand=expand), self.tuned),
            LargeProduct(down.input, down.large(expand=expand), self.tuned),
        )

    def weights(self) -> list[LargeProduct]:
        """All products."""
        found = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in self._layers]
        return [one for products in found for one in products if one is not None]

    def run(self, work: Workspace, x: Tensor, keys: Tensor, caches: Iterable[Tensor]) -> None:
        """Fill the caches; with ``complete``, ``x`` becomes the rows after the last layer, before the final norm.

        Args:
            work: Buffers.
            x: ``[P, width]``, consumed. Rows past ``keys`` are padding.
            keys: int32 ``[1]``: rows that count.
            caches: Per layer ``[at least P, 2 * kv * dim]``: keys, then values. May be one for all layers.
        """
        heads, tokens = self.heads, x.shape[0]
        cos, sin = self._angles(work, tokens)
        kv = heads.kv * heads.dim
        for layer, cache in zip(self._layers, caches):
            normed = layer.qkv.normed(work, "prefix in", x, rows.RMS_NORM, self.eps, layer.norm1)
            qkv = layer.qkv(normed, work.buffer("prefix qkv", tokens, layer.qkv.weight.outputs))
            if layer.out is None:
                turned = Heads(0, heads.kv, heads.dim)
                rotate_heads(qkv, qkv, cache, cache[:, kv:], cos, sin, turned, tokens, layer.heads_norm, self.eps)
                return
            rotate_heads(qkv, qkv, cache, cache[:, kv:], cos, sin, heads, tokens, layer.heads_norm, self.eps)
            mixed = work.buffer("prefix mixed", tokens, heads.count * heads.dim)
            attend(
                qkv, cache, cache[:, kv:], keys, mixed, heads, tokens, causal=self._causal, most_keys=tokens,
                blocks=self.tuned.attention,
            )  # fmt: skip
            layer.out(layer.out.coded(work, "prefix mixed", mixed), x, residual=x)
            normed = layer.gate_up.normed(work, "prefix in", x, rows.RMS_NORM, self.eps, layer.norm2)
            hidden = work.buffer("prefix hidden", tokens, layer.down.weight.columns)
            layer.gate_up(normed, hidden, large_gemm.GATED_SILU if self._flavour.silu else large_gemm.GATED_GELU)
            hidden = layer.down.coded(work, "prefix codes", hidden, layer.gate_up.weight.outputs)
            layer.down(hidden, x, residual=x)

    def _angles(self, work: Workspace, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to P - 1, float32 ``[P, dim / 2]``."""
        cos, sin = rotary_angles(torch.arange(tokens, device=work.device)[None], self.heads.dim, self.rope_theta)
        return cos[0, 0].contiguous(), sin[0, 0].contiguous()


def rms_factors(norm: RMSNorm, unsmooth: Tensor | None) -> NormFactors:
    """Weight of an RMSNorm whose output a site reads."""
    weight = norm.weight.detach().float()
    return NormFactors(scaled(1.0 + weight if norm.unit_offset else weight, unsmooth))

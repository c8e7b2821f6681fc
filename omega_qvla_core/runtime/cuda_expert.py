"""The action expert of Pi 0.5: one denoise step, five products and their producers per layer.

Per layer: norm and codes; queries, keys and values in shares; these added and turned, keys and values into the cache;
attention in shares of the keys; join and codes; output product in shares; norm and codes, which adds these shares;
gate and up with codes; down product in shares, which the next layer's norm adds. The residual stream is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels.triton_kernels import rows
from omega_qvla_core.kernels.triton_kernels.coding import Coding
from omega_qvla_core.kernels.triton_kernels.launch import padded_tokens
from omega_qvla_core.kernels.triton_kernels.launch_rows import Heads, attend, merge, norm, rotate_heads
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.pi05_prefix import StepCondition
from omega_qvla_core.runtime.cuda_layers import ActivatedInto, NormFactors, SmallProduct, Workspace
from omega_qvla_core.runtime.cuda_sites import FloatSite, SiteReader, scaled

# Four would fill the GPU, but turning the heads reads them all: 0.08 ms more per chunk on an H100.
_QKV_SHARES = 2


@dataclass(frozen=True)
class _Layer:
    """Products of a layer, and per denoise step the factors of its norms."""

    qkv: SmallProduct
    out: SmallProduct
    gate_up: SmallProduct
    down: SmallProduct
    into: ActivatedInto
    norm1: tuple[NormFactors, ...]
    norm2: tuple[NormFactors, ...]


@dataclass(frozen=True)
class Suffix:
    """What a chunk's tokens read besides the weights.

    Attributes:
        cos: float32 ``[H padded, dim / 2]`` of their positions.
        sin: Same shape.
        keys: int32 ``[1]``: keys of the prefix that are there.
        start: Row of the caches where their own keys start.
        caches: Per layer ``[start + H padded, 2 * kv * dim]``.
    """

    cos: Tensor
    sin: Tensor
    keys: Tensor
    start: int
    caches: Iterable[Tensor]


class CudaExpert:
    """Noisy chunk to velocity.

    Args:
        model: A ``Pi05``.
        heads: Of the expert.
        conditions: ``model.step_conditions(num_steps)``.
        tuned: Block sizes.
        dtype: Of unquantized weights and of the keys and values.

    Attributes:
        bits: Of what was read, for the name of the precision.
    """

    def __init__(
        self, model: nn.Module, heads: Heads, conditions: Sequence[StepCondition], tuned: Tuning, dtype: torch.dtype
    ) -> None:
        config = model.config
        self.heads, self.tuned, self.dtype = heads, tuned, dtype
        self.width, self.eps, self.tokens = config.expert_width, config.rms_norm_eps, config.action_horizon
        self.steps = len(conditions)
        self._site = SiteReader(dtype, self.steps)
        self.bits = self._site.bits
        if heads.count * heads.dim % BLOCK_OUT:
            raise EngineError(f"{heads.count} heads of {heads.dim} columns are not a multiple of {BLOCK_OUT}")
        if self.tokens > BLOCK_OUT:
            raise EngineError(f"the chunk has {self.tokens} tokens; the kernels take {BLOCK_OUT}")
        self._layers = [self._layer(i, layer, conditions) for i, layer in enumerate(model.expert.layers)]
        self._final = tuple(self._factors(one.final, None) for one in conditions)
        self._into_model, self._out_of_model = (
            self._float_product(one) for one in (model.action_in_proj, model.action_out_proj)
        )
        self.action_dim = config.action_dim

    def _float_product(self, linear: nn.Linear) -> SmallProduct:
        site = FloatSite(linear.weight.detach(), linear.bias.detach().float(), self.dtype)
        return SmallProduct(site.input, site.small(), self.tuned)

    def _layer(self, index: int, layer: nn.Module, conditions: Sequence[StepCondition]) -> _Layer:
        attention, mlp, name = layer.self_attn, layer.mlp, f"expert layer {index}"
        qkv = self._site(f"{name} qkv", attention.q_proj, attention.k_proj, attention.v_proj)
        out = self._site(f"{name} out", attention.o_proj)
        gate_up = self._site(f"{name} gate and up", mlp.gate_proj, mlp.up_proj)
        down = self._site(f"{name} down", mlp.down_proj)
        gated = SmallProduct(gate_up.input, gate_up.small(gated=True), self.tuned)
        into = SmallProduct(down.input, down.small(), self.tuned)
        return _Layer(
            qkv=SmallProduct(qkv.input, qkv.small(), self.tuned),
            out=SmallProduct(out.input, out.small(), self.tuned),
            gate_up=gated,
            down=into,
            into=ActivatedInto("expert hidden", gated, into),
            norm1=tuple(self._factors(one.layers[index][0], qkv.input.unsmooth) for one in conditions),
            norm2=tuple(self._factors(one.layers[index][1], gate_up.input.unsmooth) for one in conditions),
        )

    def _factors(self, modulation: Tensor, unsmooth: Tensor | None) -> NormFactors:
        scale, shift, gate = modulation.float().flatten().chunk(3)
        return NormFactors(scaled(1.0 + scale, unsmooth), scaled(shift, unsmooth), scaled(gate, None))

    def weights(self) -> list[SmallProduct]:
        """All products."""
        return [one for layer in self._layers for one in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    def table_bytes(self) -> int:
        """Of the norms' factors of all steps."""
        return 4 * self.width * 3 * self.steps * (2 * len(self._layers) + 1)

    def velocity_buffer(self, work: Workspace) -> Tensor:
        """float32 ``[H padded, A padded]``, where ``velocity`` leaves its result."""
        columns = self._out_of_model.weight.row_tiles * BLOCK_OUT
        return work.buffer("expert velocity", padded_tokens(self.tokens), columns, dtype=torch.float32)

    def velocity(self, work: Workspace, x_t: Tensor, step: int, suffix: Suffix) -> None:
        """``v(x_t)`` into the velocity buffer; ``x_t`` is float32 ``[H, action_dim]``."""
        tokens = padded_tokens(self.tokens)
        noisy = self._into_model.operand(work, "expert noisy", self.tokens)
        noisy.values[: self.tokens, : self.action_dim].copy_(x_t)
        width = self._into_model.weight.row_tiles * BLOCK_OUT
        x = self._into_model.plain(work, noisy, work.buffer("expert x", tokens, width, dtype=torch.float32))
        parts = gate = None
        for layer, cache in zip(self._layers, suffix.caches):
            parts, gate = self._run_layer(work, layer, cache, x, parts, gate, step, suffix)
        final, factors = self._out_of_model.operand(work, "expert final", self.tokens), self._final[step]
        norm(
            x, final.values, None, Coding(), kind=rows.RMS_NORM, eps=self.eps, mul=factors.mul, add=factors.add,
            parts=parts, gate=gate, tokens=self.tokens, width=self.width,
            settled=parts is not None, early=self.tuned.early,
        )  # fmt: skip
        self._out_of_model.plain(work, final, self.velocity_buffer(work))

    def _run_layer(
        self, work: Workspace, layer: _Layer, cache: Tensor, x: Tensor, parts: Tensor | None, gate: Tensor | None,
        step: int, suffix: Suffix,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        heads, tokens = self.heads, self.tokens
        operand = layer.qkv.operand(work, "expert in", tokens)
        self._norm(x, operand, layer.qkv, layer.norm1[step], step, parts, gate)
        queries, kv = heads.count * heads.dim, heads.kv * heads.dim
        own, q = cache[suffix.start :], work.buffer("expert queries", x.shape[0], queries)
        rotate_heads(
            layer.qkv.parts(work, "expert qkv", operand, _QKV_SHARES), q, own, own[:, kv:], suffix.cos, suffix.sin,
            heads, tokens, early=self.tuned.early,
        )  # fmt: skip
        shares = work.shares("expert", suffix.start, tokens, heads.count, heads.dim, more=1)
        attend(
            q, cache, cache[:, kv:], suffix.keys, shares, heads, tokens, suffix_start=suffix.start,
            most_keys=suffix.start, blocks=self.tuned.shared_attention, early=self.tuned.early,
        )  # fmt: skip
        operand = layer.out.operand(work, "expert mixed", tokens)
        merge(
            shares, operand.values, operand.scales, layer.out.input.coding(step), tokens, heads.count,
            layer.out.input.unsmooth, self.tuned.early,
        )  # fmt: skip
        parts = layer.out.parts(work, "expert out", operand)
        operand = layer.gate_up.operand(work, "expert in", tokens)
        self._norm(x, operand, layer.gate_up, layer.norm2[step], step, parts, layer.norm1[step].gate)
        hidden = layer.into(work, operand, tokens, step)
        return layer.down.parts(work, "expert down", hidden), layer.norm2[step].gate

    def _norm(self, x: Tensor, operand, product: SmallProduct, factors: NormFactors, step: int, parts, gate) -> None:
        norm(
            x, operand.values, operand.scales, product.input.coding(step), kind=rows.RMS_NORM, eps=self.eps,
            mul=factors.mul, add=factors.add, parts=parts, gate=gate, tokens=self.tokens, width=self.width,
            settled=parts is not None, early=self.tuned.early,
        )  # fmt: skip


def suffix_angles(keys: Tensor, tokens: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """float32 ``[H padded, dim / 2]`` of positions that follow ``keys`` (int32 ``[1]``) prefix tokens."""
    positions = keys.float() + torch.arange(padded_tokens(tokens), dtype=torch.float32, device=keys.device)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=keys.device) / dim
    angles = positions[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()

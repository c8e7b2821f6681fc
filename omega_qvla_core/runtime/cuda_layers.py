"""The two ways a transformer layer runs on a GPU: with many tokens, and with few.

``Workspace`` holds what both reuse from layer to layer: codes and their scales, and intermediate rows. Weights of any
precision run through the same sequence of kernels, so that a comparison of precisions compares nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from omega_qvla_core.kernels.triton_kernels import large_gemm, numerics, rows, small_gemm
from omega_qvla_core.kernels.triton_kernels.coding import Coding
from omega_qvla_core.kernels.triton_kernels.launch import (
    Blocks,
    Joining,
    large_linear,
    padded_tokens,
    shares,
    small_linear,
)
from omega_qvla_core.kernels.triton_kernels.launch_rows import Shares, activate, norm
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT, round_up
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.kernels.triton_kernels.weights import FLOAT_BITS, LargeWeight, SmallWeight
from omega_qvla_core.runtime.cuda_sites import InputCoding, read_site, scaled

_KEYS_PER_SHARE = 128
_MOST_SHARES = 8


@dataclass(frozen=True)
class NormFactors:
    """What a norm multiplies and adds, the site's smoothing folded in, float32 ``[K]``; None for nothing."""

    mul: Tensor | None
    add: Tensor | None = None
    gate: Tensor | None = None

    @classmethod
    def of_layer_norm(cls, norm: nn.LayerNorm, unsmooth: Tensor | None) -> NormFactors:
        """Weight and bias of a LayerNorm whose output a site reads."""
        if norm.weight is None:
            return cls(unsmooth)
        return cls(scaled(norm.weight, unsmooth), scaled(norm.bias, unsmooth))


class Workspace:
    """Buffers by name and shape, made once; the same name and shape give the same buffer."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros when new."""
        kind = self.dtype if dtype is None else dtype
        key = (name, shape, kind)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=kind, device=self.device)
        return self._buffers[key]

    def operand(self, name: str, tokens: int, weight: SmallWeight | LargeWeight, coding: Coding) -> Operand:
        """Room for the input of a product."""
        if coding.mode == rows.FLOATS:
            return Operand(self.buffer(name, tokens, weight.columns), None)
        codes = self.buffer(f"{name} codes", tokens, weight.columns, dtype=torch.int8)
        groups = 1 if coding.mode == rows.TOKEN else weight.columns // coding.group
        scales = self.buffer(f"{name} scales", groups, round_up(tokens, 16), dtype=torch.float32)
        return Operand(codes, scales)

    def shares(self, name: str, keys: int, tokens: int, heads: int, dim: int, more: int = 0) -> Shares:
        """Room for attention in shares of up to ``keys`` keys, and ``more`` shares besides."""
        count = min(_MOST_SHARES, -(-keys // _KEYS_PER_SHARE)) + more
        padded = round_up(tokens * heads, 128)
        mixed = self.buffer(f"{name} shares", count, padded, dim, dtype=torch.float32)
        peak, total = (
            self.buffer(f"{name} {kind}", count, padded, dtype=torch.float32) for kind in ("peaks", "totals")
        )
        return Shares(mixed, peak, total)

    def bytes(self) -> int:
        """Of all buffers."""
        return sum(one.numel() * one.element_size() for one in self._buffers.values())


@dataclass(frozen=True)
class Operand:
    """Input of a product: values or codes ``[T, K padded]``, and scales for codes."""

    values: Tensor
    scales: Tensor | None


class LargeProduct:
    """One site with many tokens: codes its input, multiplies.

    Args:
        read: How its input is coded.
        weight: Its weight, or chosen rows of it.
        tuned: Block sizes.
    """

    def __init__(self, read: InputCoding, weight: LargeWeight, tuned: Tuning) -> None:
        self._input = read
        self.coding = read.coding(0)
        self.unsmooth = read.unsmooth
        self.weight = weight
        self._tuned = tuned
        self._bias = None if weight.bias is None else weight.bias.to(weight.rows.dtype)

    def coded(self, work: Workspace, name: str, x: Tensor, width: int | None = None) -> Operand:
        """Rows ``[T, K or padded K]`` as an operand; the rows themselves where nothing has to be done."""
        if self.coding.mode == rows.FLOATS and x.shape[1] == self.weight.columns and x.dtype == work.dtype:
            return Operand(x, None)
        operand = work.operand(name, x.shape[0], self.weight, self.coding)
        norm(x, operand.values, operand.scales, self.coding, mul=self.unsmooth, width=width)
        return operand

    def normed(
        self, work: Workspace, name: str, x: Tensor, kind: int, eps: float, factors: NormFactors,
        added: Tensor | None = None,
    ) -> Operand:  # fmt: skip
        """Normalised rows as an operand; ``added``, float32 ``[K]``, is added to every row of ``x`` first, and kept."""
        operand = work.operand(name, x.shape[0], self.weight, self.coding)
        norm(
            x, operand.values, operand.scales, self.coding, kind=kind, eps=eps, mul=factors.mul, add=factors.add,
            parts=None if added is None else added.expand(1, x.shape[0], -1),
        )  # fmt: skip
        return operand

    def without_bias(self) -> tuple[LargeProduct, Tensor | None]:
        """The same product without its bias, and the bias, float32 ``[O padded]``: for whoever adds it later."""
        plain = LargeProduct(self._input, replace(self.weight, bias=None), self._tuned)
        return plain, self.weight.bias

    def __call__(self, operand: Operand, out: Tensor, activation: int = 0, residual: Tensor | None = None) -> Tensor:
        blocks = self._added(operand, out, residual)
        if blocks is None:
            if self.coding.mode == rows.FLOATS and self._by_library(operand, out, activation, residual):
                return out
            blocks = self._blocks(out.shape[0])
        large_linear(operand.values, operand.scales, self.weight, out, activation, residual, blocks)
        return out

    def _added(self, operand: Operand, out: Tensor, residual: Tensor | None) -> Blocks | None:
        """Blocks of a floating product with a residual that is faster here than in cuBLAS; else None."""
        weight = self.weight
        if self.coding.mode != rows.FLOATS or residual is None or weight.gated or out.dtype != operand.values.dtype:
            return None
        return self._tuned.added(out.shape[0], weight.outputs, weight.columns)

    def _blocks(self, tokens: int) -> Blocks:
        weight, tuned = self.weight, self._tuned
        if weight.bits == FLOAT_BITS:
            return tuned.floats_gated if weight.gated else tuned.floats
        return tuned.gated(tokens, weight.groups > 1) if weight.gated else tuned.int8(tokens, weight.outputs)

    def _by_library(self, operand: Operand, out: Tensor, activation: int, residual: Tensor | None) -> bool:
        """Let cuBLAS do what it does in one call, and faster than a kernel of ours; whether it did."""
        weight, x = self.weight, operand.values
        # Rows in float32 around products of another type are the kernel's.
        mixed = out.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype)
        # Padded rows of the weight are zeros, so that padded columns of ``out`` may be computed too.
        width = min(out.shape[1], weight.rows.shape[0])
        matrix, target = weight.rows[:width].t(), out[:, :width]
        bias = None if self._bias is None else self._bias[:width]
        if not x.is_cuda or mixed or weight.gated or (residual is not None and bias is not None):
            return False
        if activation == large_gemm.GELU and bias is not None:
            torch._addmm_activation(bias, x, matrix, use_gelu=True, out=target)
        elif activation != large_gemm.NO_ACTIVATION:
            return False
        elif residual is not None:
            torch.addmm(residual[:, :width], x, matrix, out=target)
        elif bias is not None:
            torch.addmm(bias, x, matrix, out=target)
        else:
            torch.mm(x, matrix, out=target)
        return True


def large_product(name: str, linear: nn.Module, tuned: Tuning, dtype: torch.dtype, expand: bool) -> LargeProduct:
    """A linear of its own, for many tokens. ``name`` is for messages, ``expand``: see ``weights.large_weight``."""
    site = read_site(name, [linear], dtype)
    return LargeProduct(site.input, site.large(expand=expand), tuned)


class SmallProduct:
    """One site with few tokens.

    Args:
        read: How its input is coded.
        weight: Its weight in tiles.
        tuned: Block sizes.
    """

    def __init__(self, read: InputCoding, weight: SmallWeight, tuned: Tuning) -> None:
        self.input = read
        self.weight = weight
        self.early = tuned.early
        self._tuned = tuned

    def with_bias(self, bias: Tensor) -> SmallProduct:
        """The same product with another bias, float32 ``[O padded]``, on the same weight."""
        return SmallProduct(self.input, replace(self.weight, bias=bias), self._tuned)

    def operand(self, work: Workspace, name: str, tokens: int) -> Operand:
        """Room for its input."""
        return work.operand(name, padded_tokens(tokens), self.weight, self.input.coding(0))

    def parts(self, work: Workspace, name: str, operand: Operand, most: int | None = None) -> Tensor:
        """The product in shares of K, at most that many: float32 ``[S, T padded, O padded]``."""
        tokens = operand.values.shape[0]
        count, columns = shares(self.weight, whole=True), self.weight.tiles.shape[0] * BLOCK_OUT
        if most is not None:
            count = min(count, most)
        out = work.buffer(name, count, tokens, columns, dtype=torch.float32)
        self._run(operand, out, small_gemm.PARTIAL)
        return out

    def plain(self, work: Workspace, operand: Operand, out: Tensor) -> Tensor:
        """``[T padded, O padded]``."""
        self._run(operand, out, small_gemm.STORE, joining=self._joining(work, operand))
        return out

    def activated(self, work: Workspace, operand: Operand, out: Tensor, activation: int) -> None:
        """The activated product, of gate and up if it is gated."""
        epilogue = small_gemm.GATED if self.weight.gate_tiles else small_gemm.ACTIVATED
        self._run(operand, out, epilogue, activation=activation, joining=self._joining(work, operand))

    def _joining(self, work: Workspace, operand: Operand) -> Joining | None:
        if shares(self.weight) == 1:
            return None
        numbers = Joining.numbers(self.weight, operand.values.shape[0])
        counter = work.buffer("joining counter", self.weight.tiles.shape[0] * 4, dtype=torch.int32)
        return Joining(work.buffer("joining", numbers, dtype=torch.float32), counter)

    def _run(self, operand: Operand, out: Tensor, epilogue: int, **more: object) -> None:
        small_linear(
            operand.values, operand.scales, self.weight, out, epilogue, stages=self._tuned.small_stages,
            early=self.early, **more,
        )  # fmt: skip


class ActivatedInto:
    """An activated product, gated or not, whose result another site reads, coded for it.

    Args:
        name: Of the buffer between them.
        first: What is activated.
        second: What reads the result.
        activation: See ``numerics.activate``.
    """

    def __init__(self, name: str, first: SmallProduct, second: SmallProduct, activation: int = numerics.GELU) -> None:
        self.name, self.first, self.second, self.activation = name, first, second, activation
        coding = second.input.coding(0)
        # Scales that span the whole row need the whole row: a kernel of its own codes it.
        self.by_shares = coding.mode != rows.TOKEN and coding.tail is None

    def __call__(self, work: Workspace, operand: Operand, tokens: int, step: int, room: int | None = None) -> Operand:
        """The coded result of ``tokens`` rows; rows up to ``room`` are zeros."""
        first, second = self.first, self.second
        out = second.operand(work, self.name, tokens if room is None else room)
        coding, width = second.input.coding(step), first.weight.outputs
        columns = first.weight.row_tiles * BLOCK_OUT
        if self.by_shares:
            parts = first.parts(work, f"{self.name} shares", operand)
            activate(
                parts, out.values, out.scales, coding, tokens, width, activation=self.activation,
                up_column=columns if first.weight.gate_tiles else None, mul=second.input.unsmooth, early=first.early,
            )  # fmt: skip
            return out
        activated = work.buffer("activated", operand.values.shape[0], columns)
        first.activated(work, operand, activated, self.activation)
        norm(
            activated, out.values, out.scales, coding, mul=second.input.unsmooth, tokens=tokens, width=width,
            early=first.early,
        )  # fmt: skip
        return out

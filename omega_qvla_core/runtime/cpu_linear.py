"""Linears of the CPU engine: what reads one input is one product, for a fixed number of tokens, into fixed buffers.

A ``Product`` holds weights and knows no shape; ``bind`` makes it a function from ``x [M, I]`` (rows may be strided) and
the index of the denoise step to ``[M, O]`` in a buffer that the next call overwrites. Rows can be put in another order,
or left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from omega_qvla_core import kernels
from omega_qvla_core.kernels import GroupedWeight, code_range
from omega_qvla_core.kernels.cpu import CpuWeight, Work, needs_blocks, product
from omega_qvla_core.quant.activation import SMALLEST_SCALE, row_factors
from omega_qvla_core.quant.linear import QuantizedLinear
from omega_qvla_core.quant.site import QuantizedSite
from omega_qvla_core.quant.transform import InputTransform
from omega_qvla_core.runtime.cpu_buffers import Buffers

Run = Callable[[Tensor, int], Tensor]

# Weights up to this size are merged with those that read the same input, at the price of a copy. A larger product gains
# nothing from it.
_MERGED_BYTES = 8 << 20

# Schemes of activation codes that run here with fixed buffers; sites of others run their own code.
_SCHEMES = frozenset({"token", "token_group"})


class Product(ABC):
    """See the module's docstring."""

    outputs: int

    @abstractmethod
    def bind(self, tokens: int, buffers: Buffers) -> Run:
        """The function for ``tokens`` rows."""

    def copied_bytes(self) -> int:
        """Bytes that the engine holds besides the model's own."""
        return 0


def merge(linears: Sequence[nn.Module], rows: Sequence[Tensor | None]) -> Product:
    """One product of everything that reads an input.

    Args:
        linears: ``nn.Linear`` or ``QuantizedLinear``, whose outputs follow each other.
        rows: Per linear the rows to compute, in their order; None for all.
    """
    sites = {id(one.site) for one in linears if isinstance(one, QuantizedLinear)}
    if len(sites) == 1 and all(isinstance(one, QuantizedLinear) for one in linears):
        return _site_product(linears, rows)
    bytes_ = sum(one.weight.numel() * one.weight.element_size() for one in linears if isinstance(one, nn.Linear))
    if not sites and (len(linears) == 1 or bytes_ <= _MERGED_BYTES):
        return FloatProduct(linears, rows)
    return Parts([merge([one], [order]) for one, order in zip(linears, rows)])


class FloatProduct(Product):
    """Unquantized linears; a single one without an order of its rows is read from the model's memory."""

    def __init__(self, linears: Sequence[nn.Linear], rows: Sequence[Tensor | None]) -> None:
        self._copied = len(linears) > 1 or rows[0] is not None
        weights = [_rows(one.weight.detach(), order) for one, order in zip(linears, rows)]
        self.weight = torch.cat(weights).t() if len(weights) > 1 else weights[0].t()
        self.bias = None
        if any(one.bias is not None for one in linears):
            zeros = [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in linears]
            self.bias = torch.cat([_rows(bias.detach(), order) for bias, order in zip(zeros, rows)])
        self.outputs = self.weight.shape[1]

    def bind(self, tokens: int, buffers: Buffers) -> Run:
        weight, bias, out = self.weight, self.bias, buffers.get("product", tokens, self.outputs)
        if bias is None:
            return lambda x, step: torch.mm(x, weight, out=out)
        return lambda x, step: torch.addmm(bias, x, weight, out=out)

    def copied_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size() if self._copied else 0


class Parts(Product):
    """Products that could not be merged."""

    def __init__(self, parts: Sequence[Product]) -> None:
        self.parts = tuple(parts)
        self.outputs = sum(part.outputs for part in parts)

    def bind(self, tokens: int, buffers: Buffers) -> Run:
        runs = [part.bind(tokens, buffers) for part in self.parts]
        out = buffers.get("parts", tokens, self.outputs)
        slices = out.split([part.outputs for part in self.parts], dim=1)

        def run(x: Tensor, step: int) -> Tensor:
            # Parts of the same size share their buffer: each is copied before the next one runs.
            for one, place in zip(runs, slices):
                place.copy_(one(x, step))
            return out

        return run

    def copied_bytes(self) -> int:
        return sum(part.copied_bytes() for part in self.parts)


class SiteProduct(Product):
    """A quantized site: transform, codes and integer sums in buffers, operation for operation as the site's own code.

    Given the same input it gives the site's outputs bit for bit.
    """

    def __init__(self, site: QuantizedSite, rows: Tensor | None) -> None:
        spec, tensors = site.spec, site.tensors()
        self.spec = spec
        self.transform = InputTransform.from_tensors(spec.recipe, spec.in_features, tensors)
        self.factors = [
            row_factors(spec.recipe.activation, row.float(), spec.recipe.activation_bits)
            for row in tensors["activation"]
        ]
        weight = site.grouped_weight()
        if rows is not None:
            weight = GroupedWeight(
                weight.codes[rows], weight.scales[rows], weight.group, weight.weight_bits, weight.activation_bits
            )
        self.outputs = weight.codes.shape[0]
        self.weight: CpuWeight = kernels.backend("cpu").prepare(weight)
        self.bias = None if "bias" not in tensors else _rows(tensors["bias"].float(), rows)

    def copied_bytes(self) -> int:
        return self.weight.route.bytes(self.weight.layout)

    def bind(self, tokens: int, buffers: Buffers) -> Run:
        transformed, blocks = self._bind_transform(tokens, buffers)
        encoded = self._bind_codes(tokens, blocks, buffers)
        weight, bias, per_step = self.weight, self.bias, self.spec.steps > 0
        groups = len(weight.scales)
        work = None
        if weight.route.writes_out and not needs_blocks(groups, tokens, weight):
            sums = buffers.get("sums", groups, tokens, self.outputs)
            work = Work(sums, sums.unbind())

        def run(x: Tensor, step: int) -> Tensor:
            codes, scales = encoded(transformed(x), step if per_step else 0)
            if work is None:
                y = kernels.backend("cpu").linear(codes, scales, weight)
            else:
                y = product(codes, scales, weight, work)
            return y if bias is None else y.add_(bias)

        return run

    def _bind_transform(self, tokens: int, buffers: Buffers) -> tuple[Callable[[Tensor], Tensor], int]:
        """The transform, and how many blocks B of columns it gives one after the other: ``[B, M, I / B]``.

        Those are the groups, or, for one long group, the blocks of the rotation. The product does not write to strided
        memory, where some CPUs (with AVX-512) round it in another way than the site's own.
        """
        transform, group, columns = self.transform, self.spec.product_group, self.spec.in_features
        blocks = transform.blocks
        fits = blocks is not None and columns % blocks.shape[1] == 0
        if not fits or (blocks.shape[1] != group and group != columns):
            return lambda x: transform.apply(x, group), -(-columns // group)
        count, size, _ = blocks.shape
        order = transform.order
        ordered = None if order is None else buffers.get("ordered", tokens, columns)
        u = buffers.get("rotated", count, tokens, size)

        def run(x: Tensor) -> Tensor:
            if order is not None:
                x = torch.index_select(x, 1, order, out=ordered)
            return torch.bmm(x.view(tokens, count, size).transpose(0, 1), blocks, out=u)

        return run, count

    def _bind_codes(self, tokens: int, blocks: int, buffers: Buffers) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        group = self.spec.product_group
        groups = -(-self.spec.in_features // group)
        by_group = self.spec.recipe.activation == "token_group" and groups > 1
        scales = buffers.get("scales", groups if by_group else 1, tokens, 1)
        dims = (-1,) if by_group else (0, 2)
        factors, (low, high) = self.factors, code_range(self.spec.recipe.activation_bits)
        if blocks == groups:
            codes = place = values = buffers.get("codes", groups, tokens, group)
        else:
            codes, values = (
                buffers.get("codes", 1, tokens, group),
                buffers.get("values", blocks, tokens, group // blocks),
            )
            place = codes.view(tokens, blocks, group // blocks).transpose(0, 1)

        def run(u: Tensor, row: int) -> tuple[Tensor, Tensor]:
            torch.amax(torch.abs(u, out=values), dims, True, out=scales)
            scales.mul_(factors[row]).clamp_min_(SMALLEST_SCALE)
            torch.clamp(torch.div(u, scales, out=values).round_(), low, high, out=place)
            return codes, scales

        return run


class SimulatedProduct(Product):
    """A quantized site that runs its own code; needs the denoise step to be declared."""

    def __init__(self, site: QuantizedSite, rows: Tensor | None) -> None:
        self.site, self.rows = site, rows
        self.outputs = site.spec.out_features if rows is None else len(rows)

    def bind(self, tokens: int, buffers: Buffers) -> Run:
        site, rows = self.site, self.rows
        if rows is None:
            return lambda x, step: site(x)
        return lambda x, step: site(x).index_select(1, rows)


def _site_product(linears: Sequence[QuantizedLinear], rows: Sequence[Tensor | None]) -> Product:
    site = linears[0].site
    widths = [reader.out_features for reader in site.spec.readers]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    chosen = [
        starts[one.index] + (torch.arange(widths[one.index]) if order is None else order)
        for one, order in zip(linears, rows)
    ]
    wanted: Tensor | None = torch.cat(chosen)
    if torch.equal(wanted, torch.arange(site.spec.out_features)):
        wanted = None
    recipe, tensors = site.spec.recipe, site.tensors()
    plain = not {"centre", "low_rank_in"} & set(tensors)
    if site.spec.executable and plain and recipe.activation in _SCHEMES and site.backend == "cpu":
        return SiteProduct(site, wanted)
    return SimulatedProduct(site, wanted)


def _rows(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values[order]

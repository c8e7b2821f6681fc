"""From the linears of a model to what the CUDA kernels read: weights in their layout, and how inputs are coded.

A site is one input and everything that reads it, as in ``quant.scope``. Unquantized linears become one floating weight,
quantized ones bring their codes, scales and transform. What the kernels do not compute raises ``EngineError``: the
model then runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels import GroupedWeight, code_range
from omega_qvla_core.kernels.triton_kernels import rows
from omega_qvla_core.kernels.triton_kernels.coding import Coding, hadamard_tail
from omega_qvla_core.kernels.triton_kernels.weights import (
    LargeWeight,
    SmallWeight,
    large_float_weight,
    large_weight,
    small_float_weight,
    small_weight,
)
from omega_qvla_core.quant.activation import row_factors
from omega_qvla_core.quant.linear import QuantizedLinear
from omega_qvla_core.quant.site import QuantizedSite

_BLOCK = 64
_MODES = {"token": rows.TOKEN, "token_group": rows.TOKEN_GROUP}
# Tensors of a site that the kernels know.
_KNOWN = {"codes", "scales", "multipliers", "smooth", "activation", "bias"}


@dataclass(frozen=True)
class InputCoding:
    """How the input of a site is coded: all that a product keeps of its site, whose weight it has in another layout.

    Attributes:
        unsmooth: float32 ``[I]``: what the input is multiplied with before the rotation; None for nothing.
        codings: One per denoise step, or one.
    """

    unsmooth: Tensor | None = None
    codings: tuple[Coding, ...] = (Coding(),)

    def coding(self, step: int) -> Coding:
        """Of a denoise step."""
        return self.codings[step if len(self.codings) > 1 else 0]


@dataclass(frozen=True)
class CodedSite:
    """A quantized site, ready for the kernels.

    Attributes:
        weight: Stacked rows of all readers, in the transformed basis.
        bias: float32 ``[O]`` or None.
        input: How its input is coded.
        bits: Of weights and activations.
    """

    weight: GroupedWeight
    bias: Tensor | None
    input: InputCoding
    bits: tuple[int, int]

    def small(self, rows_: Tensor | None = None, gated: bool = False) -> SmallWeight:
        """For few tokens, with chosen rows."""
        return small_weight(self._rows(rows_), _chosen(self.bias, rows_), gated)

    def large(self, rows_: Tensor | None = None, gated: bool = False, expand: bool = True) -> LargeWeight:
        """For many tokens, with chosen rows."""
        try:
            return large_weight(self._rows(rows_), _chosen(self.bias, rows_), gated, expand)
        except ValueError as error:
            raise EngineError(str(error)) from error

    def _rows(self, rows_: Tensor | None) -> GroupedWeight:
        one = self.weight
        if rows_ is None:
            return one
        return GroupedWeight(one.codes[rows_], one.scales[rows_], one.group, one.weight_bits, one.activation_bits)


@dataclass(frozen=True)
class FloatSite:
    """An unquantized site; ``CodedSite`` without codes."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    input: InputCoding = InputCoding()
    bits: tuple[int, int] = (16, 16)

    def small(self, rows_: Tensor | None = None, gated: bool = False) -> SmallWeight:
        """For few tokens, with chosen rows."""
        return small_float_weight(_chosen(self.weight, rows_), _chosen(self.bias, rows_), gated, self.dtype)

    def large(self, rows_: Tensor | None = None, gated: bool = False, expand: bool = True) -> LargeWeight:
        """For many tokens, with chosen rows."""
        return large_float_weight(_chosen(self.weight, rows_), _chosen(self.bias, rows_), gated, self.dtype)


Site = CodedSite | FloatSite


def read_site(name: str, linears: Sequence[nn.Module], dtype: torch.dtype, steps: int = 0) -> Site:
    """The site of linears that read one input, in the order of their stacked rows.

    Args:
        name: For messages.
        linears: ``nn.Linear`` or ``QuantizedLinear``, all of one kind; the latter all readers of one site.
        dtype: Of floating weights.
        steps: Denoise steps of the engine; 0 outside the loop.

    Raises:
        EngineError: The kernels do not compute this; the message says what.
    """
    if all(isinstance(one, nn.Linear) for one in linears):
        biases = [one.bias for one in linears]
        if any(bias is not None for bias in biases) and any(bias is None for bias in biases):
            raise EngineError(f"{name}: some linears have a bias and others none")
        bias = None if biases[0] is None else torch.cat([one.detach().float() for one in biases])
        return FloatSite(torch.cat([one.weight.detach() for one in linears]), bias, dtype)
    if not all(isinstance(one, QuantizedLinear) for one in linears):
        raise EngineError(f"{name}: linears are of kinds {', '.join(sorted({type(one).__name__ for one in linears}))}")
    site = linears[0].site
    if any(one.site is not site for one in linears) or len(site.spec.readers) != len(linears):
        raise EngineError(f"{name}: its linears are quantized apart (a recipe without shared_input, or overrides)")
    return _coded(name, site, steps)


class SiteReader:
    """Reads the sites of one part of a model.

    Args:
        dtype: See ``read_site``.
        steps: See ``read_site``.

    Attributes:
        bits: Of weights and activations of what was read, for the name of the precision. The sites themselves are not
            kept: their weights would take as much memory again.
    """

    def __init__(self, dtype: torch.dtype, steps: int = 0) -> None:
        self._dtype, self._steps = dtype, steps
        self.bits: list[tuple[int, int]] = []

    def __call__(self, name: str, *linears: nn.Module) -> Site:
        """``read_site``."""
        site = read_site(name, linears, self._dtype, self._steps)
        self.bits.append(site.bits)
        return site


def _coded(name: str, site: QuantizedSite, steps: int) -> CodedSite:
    spec, recipe, tensors = site.spec, site.spec.recipe, site.tensors()
    if not spec.executable or recipe.activation not in _MODES:
        raise EngineError(f"{name}: activation {recipe.activation!r} is simulated, or has no kernel; use token_group")
    unknown = sorted(tensors.keys() - _KNOWN)
    if unknown:
        raise EngineError(f"{name}: no kernel for {', '.join(unknown)}")
    if recipe.rotation not in ("none", "hadamard") or (recipe.rotation == "hadamard" and recipe.block != _BLOCK):
        raise EngineError(f"{name}: no kernel for rotation {recipe.rotation!r} in blocks of {recipe.block}")
    if spec.steps not in (0, steps):
        raise EngineError(f"{name} was calibrated for {spec.steps} denoise steps, not {steps}")
    group = min(recipe.activation_group, spec.in_features)
    if recipe.activation == "token_group" and (group % _BLOCK or spec.product_group != group):
        raise EngineError(f"{name}: activation_group {group} is not a multiple of {_BLOCK} that is also summed")
    device = site.codes.device
    rotate, tail = recipe.rotation == "hadamard", None
    if rotate:
        try:
            tail = hadamard_tail(spec.in_features, device)
        except ValueError as error:
            raise EngineError(f"{name}: {error}") from error
    high = code_range(recipe.activation_bits)[1]
    codings = []
    for row in tensors["activation"]:
        factor = row_factors(recipe.activation, row.float(), recipe.activation_bits).flatten().contiguous()
        codings.append(Coding(_MODES[recipe.activation], group, high, factor, rotate, tail))
    smooth = tensors.get("smooth")
    return CodedSite(
        weight=site.grouped_weight(),
        bias=tensors["bias"].float() if "bias" in tensors else None,
        input=InputCoding(None if smooth is None else (1.0 / smooth.double()).float(), tuple(codings)),
        bits=(recipe.weight_bits, recipe.activation_bits),
    )


def scaled(vector: Tensor, unsmooth: Tensor | None) -> Tensor:
    """A factor of the norm with the site's own factor folded in, float32 and contiguous."""
    vector = vector.detach().float().flatten()
    return (vector if unsmooth is None else vector * unsmooth).contiguous()


def precision_name(bits: Sequence[tuple[int, int]]) -> str:
    """``bf16``, ``w4a4`` and the like; the widest of a mixture, marked with a plus."""
    found = sorted(set(bits))
    weight, activation = found[-1]
    name = "bf16" if weight == 16 else f"w{weight}a{activation}"
    return name if len(found) == 1 else f"{name}+"


def _chosen(tensor: Tensor | None, rows_: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or rows_ is None else tensor[rows_]

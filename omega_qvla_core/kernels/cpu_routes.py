"""Ways in which a CPU can compute exact integer sums, and the choice between them.

All routes give the same integers, so that a wrong choice costs time and never changes an output:

``float32``  integers held in float32, exact below 2**24 whatever the order; one batched product for all groups. The
             best for small layers, whose time is the overhead of calls, on every CPU.
``onednn``   oneDNN's quantized linear on unsigned activation codes. About twice as fast as float32 for large layers on
             plain AVX2, faster with VNNI. With 8-bit codes on both sides it saturates on CPUs without VNNI, and is not
             offered there.
``int_mm``   ``torch._int_mm``. Fast with VNNI; 10 to 40 times slower than float32 without.
``float64``  like ``float32``, for sums that may pass 2**24: those of 8-bit codes over more than 1024 columns.

Which one is used follows from two trials on this machine, both cached: whether sums of the largest codes come out exact
(``is_exact``), and which route is fastest for the size of the layer (``fastest``).
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from omega_qvla_core.kernels.base import GroupedWeight
from omega_qvla_core.kernels.codes import code_range

_log = logging.getLogger(__name__)

# float32 represents every integer up to here, whatever the order of summation.
EXACT_FLOAT32 = 1 << 24

# Shorter sums are taken in float32. With one column, torch 2.13's int8 product returns memory it never wrote; with few,
# an integer product per group is slow.
_SHORTEST_INTEGER_SUM = 8

# Tokens, and largest columns, outputs and groups, of the trial that picks the fastest route. A chunk has 10 to 50
# tokens; beyond the other sizes the order of the routes does not change.
_TRIAL_TOKENS, _TRIAL_COLUMNS, _TRIAL_OUTPUTS, _TRIAL_GROUPS = 32, 512, 1024, 2
_TRIAL_REPEATS = 10


@dataclass(frozen=True)
class Kind:
    """All that exactness depends on.

    Attributes:
        activation_bits: Bits of the activation codes.
        weight_bits: Bits of the weight codes.
    """

    activation_bits: int
    weight_bits: int


class Route(ABC):
    """One way to the integer sums.

    Attributes:
        name: Short name.
        writes_out: Whether ``sums`` uses the buffer that it is given.
    """

    name: str
    writes_out = False

    @abstractmethod
    def prepare(self, codes: Tensor, kind: Kind, scales: Tensor) -> Any:
        """Layout of weight codes int8 ``[G, g, O]``, which are copied; ``scales`` float32 ``[G, O]``."""

    @abstractmethod
    def sums(self, codes: Tensor, layout: Any, out: Tensor | None = None) -> Tensor | list[Tensor]:
        """Sums ``[M, O]`` per group in float32, which the caller may change.

        Args:
            codes: float32 ``[G, M, g]`` holding integers.
            layout: From ``prepare``.
            out: float32 ``[G, M, O]`` that the route may write to.
        """

    @abstractmethod
    def bytes(self, layout: Any) -> int:
        """Memory of a layout."""

    @abstractmethod
    def integers(self, codes: Tensor, layout: Any) -> Tensor:
        """The same as int64 ``[G, M, O]``."""

    def scaled_sum(self, codes: Tensor, layout: Any) -> Tensor | None:
        """``sum * weight scale`` ``[M, O]`` of a weight with one group, where the route has it for nothing."""
        return None


class FloatRoute(Route):
    """Integers held in floating point."""

    writes_out = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.name = "float32" if dtype == torch.float32 else "float64"

    def prepare(self, codes: Tensor, kind: Kind, scales: Tensor) -> Tensor:
        return codes.to(self.dtype).contiguous()

    def sums(self, codes: Tensor, layout: Tensor, out: Tensor | None = None) -> Tensor:
        if self.dtype == torch.float32:
            return torch.bmm(codes, layout) if out is None else torch.bmm(codes, layout, out=out)
        sums = torch.bmm(codes.to(self.dtype), layout)
        return sums.float() if out is None else out.copy_(sums)

    def bytes(self, layout: Tensor) -> int:
        return layout.numel() * layout.element_size()

    def integers(self, codes: Tensor, layout: Tensor) -> Tensor:
        return torch.bmm(codes.to(self.dtype), layout).long()


class IntMmRoute(Route):
    """``torch._int_mm`` group by group."""

    name = "int_mm"

    def prepare(self, codes: Tensor, kind: Kind, scales: Tensor) -> tuple[Tensor, ...]:
        # The int8 product reads a transposed view fastest.
        return tuple(codes.transpose(1, 2).contiguous().transpose(1, 2))

    def sums(self, codes: Tensor, layout: tuple[Tensor, ...], out: Tensor | None = None) -> list[Tensor]:
        return [torch._int_mm(one, weight).float() for one, weight in zip(codes.char().unbind(), layout)]

    def bytes(self, layout: tuple[Tensor, ...]) -> int:
        return sum(one.numel() for one in layout)

    def integers(self, codes: Tensor, layout: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([torch._int_mm(one, weight).long() for one, weight in zip(codes.char(), layout)])


@dataclass(frozen=True)
class _OneDnnLayout:
    """Per group a packed weight; ``ones`` and ``zeros`` stand for scales and zero points ``[O]``."""

    packed: tuple[Tensor, ...]
    zero_point: int
    ones: Tensor
    zeros: Tensor
    scales: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneDnnLayout:
        """Nothing writes to it, and packed weights cannot be copied."""
        return self


class OneDnnRoute(Route):
    """oneDNN's quantized linear: activation codes become unsigned by a zero point, which oneDNN takes out again."""

    name = "onednn"

    def prepare(self, codes: Tensor, kind: Kind, scales: Tensor) -> _OneDnnLayout:
        packed = tuple(torch.ops.onednn.qlinear_prepack(one.t().contiguous(), None) for one in codes)
        outputs = codes.shape[2]
        zeros = torch.zeros(outputs, dtype=torch.int32)
        return _OneDnnLayout(packed, -code_range(kind.activation_bits)[0], torch.ones(outputs), zeros, scales)

    def sums(self, codes: Tensor, layout: _OneDnnLayout, out: Tensor | None = None) -> list[Tensor]:
        unsigned = codes.add(layout.zero_point).to(torch.uint8)
        return [_onednn(one, weight, layout, layout.ones) for one, weight in zip(unsigned.unbind(), layout.packed)]

    def bytes(self, layout: _OneDnnLayout) -> int:
        return sum(one.numel() for one in layout.packed)

    def integers(self, codes: Tensor, layout: _OneDnnLayout) -> Tensor:
        return torch.stack(self.sums(codes, layout)).long()

    def scaled_sum(self, codes: Tensor, layout: _OneDnnLayout) -> Tensor:
        unsigned = codes[0].add(layout.zero_point).to(torch.uint8)
        return _onednn(unsigned, layout.packed[0], layout, layout.scales[0])


def _onednn(codes: Tensor, packed: Tensor, layout: _OneDnnLayout, scales: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, layout.zero_point, packed, scales, layout.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


FLOAT32, FLOAT64, ONEDNN, INT_MM = FloatRoute(), FloatRoute(torch.float64), OneDnnRoute(), IntMmRoute()


def choose(weight: GroupedWeight) -> Route:
    """The fastest route whose sums are exact for this weight on this machine."""
    kind = Kind(weight.activation_bits, weight.weight_bits)
    exact_in_float32 = weight.largest_accumulator <= EXACT_FLOAT32
    if weight.codes.device.type != "cpu" or min(weight.group, weight.codes.shape[1]) < _SHORTEST_INTEGER_SUM:
        return FLOAT32 if exact_in_float32 else FLOAT64
    if exact_in_float32:
        candidates = (FLOAT32, *(route for route in (ONEDNN, INT_MM) if is_exact(route, kind)))
    else:
        candidates = (FLOAT64, *(route for route in (INT_MM,) if is_exact(route, kind)))
    groups = -(-weight.codes.shape[1] // weight.group)
    return fastest(
        candidates,
        kind,
        (min(groups, _TRIAL_GROUPS), min(weight.group, _TRIAL_COLUMNS), min(weight.codes.shape[0], _TRIAL_OUTPUTS)),
        torch.get_num_threads(),
    )


@cache
def is_exact(route: Route, kind: Kind) -> bool:
    """Whether a route gives exact sums on this CPU, tried once on codes of the largest magnitude.

    Some kernels for CPUs without VNNI add pairs of products in saturating 16-bit registers.
    """
    try:
        fault = _fault(route, kind)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        # How builds of torch say that they lack an operator, or have it for other processors.
        fault = f"this build of torch cannot run them: {error}"
    if fault is not None:
        _log.info("%s products of %s are not used on this CPU: %s", route.name, kind, fault)
    return fault is None


def _fault(route: Route, kind: Kind) -> str | None:
    """What is wrong with a route's sums of the largest codes; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    for tokens, inner, outputs in ((1, 64, 5), (16, 64, 128), (33, 200, 64)):
        left = _extreme_codes((tokens, inner), kind.activation_bits, generator)
        right = _extreme_codes((inner, outputs), kind.weight_bits, generator)
        scales = torch.rand(1, outputs, generator=generator) + 0.1
        layout = route.prepare(right[None], kind, scales)
        exact = left.long() @ right.long()
        if not torch.equal(route.integers(left[None].float(), layout)[0], exact):
            return "sums are not exact"
        scaled = route.scaled_sum(left[None].float(), layout)
        if scaled is not None and not torch.equal(scaled, exact.float() * scales[0]):
            return "scaled sums are rounded in another way"
    return None


@cache
def fastest(candidates: tuple[Route, ...], kind: Kind, size: tuple[int, int, int], threads: int) -> Route:
    """The fastest of the candidates for weights ``[G, g, O]``, timed once per size and number of threads."""
    groups, columns, outputs = size
    generator = torch.Generator().manual_seed(0)
    codes = _extreme_codes((groups, _TRIAL_TOKENS, columns), kind.activation_bits, generator).float()
    weight = _extreme_codes((groups, columns, outputs), kind.weight_bits, generator)
    times = {}
    for route in candidates:
        layout = route.prepare(weight, kind, torch.ones(groups, outputs))
        times[route] = _best_time_s(partial(route.sums, codes, layout))
    best = min(candidates, key=times.__getitem__)
    _log.debug(
        "products %s of %s: %s", size, kind, {route.name: f"{times[route] * 1e6:.0f} us" for route in candidates}
    )
    return best


def _best_time_s(call: Callable[[], Any]) -> float:
    """Shortest of a few calls after one that does not count; a call that is out of the question is made only once."""
    best = float("inf")
    for index in range(_TRIAL_REPEATS + 1):
        started_s = time.perf_counter()
        call()
        elapsed_s = time.perf_counter() - started_s
        if index or elapsed_s > 0.05:
            best = min(best, elapsed_s)
        if elapsed_s > 0.05:
            break
    return best


def _extreme_codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    """Random int8 codes with a first row of the smallest and a last row of the largest."""
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
    codes[..., 0, :], codes[..., -1, :] = low, high
    codes[..., -1] = low
    return codes

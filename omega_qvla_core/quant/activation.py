"""Activation codes: schemes that say which values share a scale and where the scale comes from (METHOD A.7, E2).

Rotated inputs come as ``u``: float32 ``[G, M, g]`` (M tokens, G groups of g columns, the last one zero-padded) for
schemes that execute, ``[M, I]`` for simulated ones. Per denoise step a scheme keeps one row of a table: scales for
static schemes, clip ratios for dynamic ones (``scale = ratio * max|u| / largest code``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla_core.kernels import code_range
from omega_qvla_core.quant.registry import Registry

CLIPS = ("absmax", "percentile", "mse", "output")

# Ratios of the largest magnitude that are tried for dynamic scales. Beyond 1 the largest value would not use the
# largest code; below 0.5 clipping always costs more than rounding on the layers that were measured.
DYNAMIC_RATIOS = tuple(round(0.5 + 0.025 * index, 3) for index in range(23))

# Static scales face outliers far above the rest, so the ratios fall geometrically, from 1 to 0.02 of the maximum.
STATIC_RATIOS = tuple(round(0.02 ** (index / 39), 6) for index in range(40))

DYNAMIC_SCHEMES = frozenset({"token", "token_group"})
"""Schemes whose scales come from the tokens themselves; their tables hold clip ratios."""

# Smallest scale of a dynamic scheme; a token of zeros gets codes of zero.
SMALLEST_SCALE = 1e-12

# Floor of a static range before it is divided by the largest code (METHOD A.7).
SMALLEST_RANGE = 1e-6


@dataclass(frozen=True)
class FitData:
    """What a row of a table is fitted on.

    Attributes:
        tokens: float32 ``[n, I]``, rotated inputs of one step (or of all).
        weight: float32 ``[O, I]``, the quantized weight in the same basis.
        group: Columns per activation scale of ``token_group``.
        bits: Bits of the activation codes.
        clip: A name in ``CLIPS``.
        percentile: For ``clip="percentile"``.
    """

    tokens: Tensor
    weight: Tensor
    group: int
    bits: int
    clip: str
    percentile: float


Encoder = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ActivationScheme:
    """One scheme.

    Attributes:
        executable: Its scales stay outside the integer sum.
        clips: The values of ``clip`` that it takes.
        fit: Row of the table from ``FitData``: float32 ``[C]``.
        encode: ``encode(u, row, bits) -> (codes, scales)``, codes as integers in float32. The row comes from
            ``row_factors``. For simulated schemes ``codes * scales`` is what the product sees.
    """

    executable: bool
    clips: tuple[str, ...]
    fit: Callable[[FitData], Tensor]
    encode: Encoder


ACTIVATION_SCHEMES: Registry[ActivationScheme] = Registry("activation")


def round_to_codes(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Nearest code of every value, as integers in float32."""
    low, high = code_range(bits)
    return (values / scales).round_().clamp_(low, high)


def row_factors(scheme: str, row: Tensor, bits: int) -> Tensor:
    """A row of the table ``[C]`` as its encoder multiplies with it.

    Clip ratios of dynamic schemes are divided by the largest code: ``[C, 1, 1]``; one static scale is ``[1, 1, 1]``;
    scales per channel stay ``[I]``.
    """
    if scheme == "static_channel":
        return row
    if scheme in DYNAMIC_SCHEMES:
        row = row / code_range(bits)[1]
    return row.view(-1, 1, 1).contiguous()


def _encode_token_group(u: Tensor, row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scales = u.abs().amax(dim=-1, keepdim=True).mul_(row).clamp_min_(SMALLEST_SCALE)
    return round_to_codes(u, scales, bits), scales


def _encode_token(u: Tensor, row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scales = u.abs().amax(dim=(0, 2), keepdim=True).mul_(row).clamp_min_(SMALLEST_SCALE)
    return round_to_codes(u, scales, bits), scales


def _encode_static_tensor(u: Tensor, row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    # The scale does not depend on the input, so that a NaN would vanish in the integer codes: carry it in the scale.
    return round_to_codes(u, row, bits), row + u.sum() * 0.0


def _encode_static_channel(u: Tensor, row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return round_to_codes(u, row, bits), row


def _encode_nothing(u: Tensor, row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return u, u.new_ones(())


def _fit_nothing(data: FitData) -> Tensor:
    return data.tokens.new_ones(1)


def _fit_token_group(data: FitData) -> Tensor:
    parts = zip(data.tokens.split(data.group, dim=1), data.weight.split(data.group, dim=1))
    return torch.stack([_best_ratio(tokens, weight, data) for tokens, weight in parts])


def _fit_token(data: FitData) -> Tensor:
    return _best_ratio(data.tokens, data.weight, data)[None]


def _fit_static_tensor(data: FitData) -> Tensor:
    absmax = data.tokens.abs().amax().clamp_min(SMALLEST_RANGE)
    high = code_range(data.bits)[1]
    if data.clip == "absmax":
        return absmax[None] / high
    if data.clip == "percentile":
        return _quantile(data.tokens.reshape(-1, 1), data.percentile).clamp_min(SMALLEST_RANGE) / high
    energy = _output_energy(data.weight, data.clip)
    errors = [_coding_error(data.tokens, (ratio * absmax / high).expand(1), energy, data) for ratio in STATIC_RATIOS]
    return absmax[None] * STATIC_RATIOS[_argmin(errors)] / high


def _fit_static_channel(data: FitData) -> Tensor:
    absmax = data.tokens.abs().amax(dim=0).clamp_min(SMALLEST_RANGE)
    high = code_range(data.bits)[1]
    if data.clip == "absmax":
        return absmax / high
    if data.clip == "percentile":
        return _quantile(data.tokens, data.percentile).clamp_min(SMALLEST_RANGE) / high
    # Channels differ in nothing but their own column of the weight, which scales all their errors alike.
    errors = torch.stack(
        [
            (round_to_codes(data.tokens, ratio * absmax / high, data.bits) * (ratio * absmax / high) - data.tokens)
            .square()
            .sum(dim=0)
            for ratio in STATIC_RATIOS
        ]
    )
    return absmax * torch.tensor(STATIC_RATIOS, device=absmax.device)[errors.argmin(dim=0)] / high


def _best_ratio(tokens: Tensor, weight: Tensor, data: FitData) -> Tensor:
    """The clip ratio with the least error over the tokens, a scalar tensor."""
    if data.clip == "absmax":
        return tokens.new_tensor(1.0)
    high = code_range(data.bits)[1]
    absmax = tokens.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_SCALE)
    energy = _output_energy(weight, data.clip)
    errors = [_coding_error(tokens, ratio * absmax / high, energy, data) for ratio in DYNAMIC_RATIOS]
    return tokens.new_tensor(DYNAMIC_RATIOS[_argmin(errors)])


def _output_energy(weight: Tensor, clip: str) -> tuple[Tensor | None, bool]:
    """What turns an error into one of the output: the weight ``[O, g]``, or ``W^T W`` (True) where that is smaller."""
    if clip != "output":
        return None, False
    rows, columns = weight.shape
    return (weight.double().T @ weight.double(), True) if rows > columns else (weight, False)


def _coding_error(tokens: Tensor, scales: Tensor, energy: tuple[Tensor | None, bool], data: FitData) -> float:
    """Squared error of coding, in the codes (``mse``) or after the weight (``output``)."""
    error = round_to_codes(tokens, scales, data.bits) * scales - tokens
    matrix, squared = energy
    if matrix is None:
        return float(error.double().square().sum())
    if squared:
        error = error.double()
        return float(((error @ matrix) * error).sum())
    return float((error @ matrix.T).double().square().sum())


def _argmin(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _quantile(tokens: Tensor, percentile: float) -> Tensor:
    """Percentile of the magnitude per column ``[I]``, linear between order statistics; any number of tokens."""
    magnitudes = tokens.abs().sort(dim=0).values.double()
    position = percentile / 100 * (magnitudes.shape[0] - 1)
    below = int(position)
    above = min(below + 1, magnitudes.shape[0] - 1)
    return torch.lerp(magnitudes[below], magnitudes[above], position - below).to(tokens.dtype)


_DYNAMIC_CLIPS = ("absmax", "mse", "output")

for _name, _scheme in {
    "none": ActivationScheme(False, CLIPS, _fit_nothing, _encode_nothing),
    "static_tensor": ActivationScheme(True, CLIPS, _fit_static_tensor, _encode_static_tensor),
    "static_channel": ActivationScheme(
        False, ("absmax", "percentile", "mse"), _fit_static_channel, _encode_static_channel
    ),
    "token": ActivationScheme(True, _DYNAMIC_CLIPS, _fit_token, _encode_token),
    "token_group": ActivationScheme(True, _DYNAMIC_CLIPS, _fit_token_group, _encode_token_group),
}.items():
    ACTIVATION_SCHEMES.register(_name)(_scheme)

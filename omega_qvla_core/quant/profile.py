"""What a site's inputs and weights look like before and after its transform, for reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla_core.quant.site import QuantizedSite, dequantized
from omega_qvla_core.quant.statistics import SiteStatistics
from omega_qvla_core.quant.transform import InputTransform

# Points of a curve of channel energies, from the strongest channel to the weakest.
CURVE_POINTS = 33

_QUANTILE = 0.999
_SMALLEST_ENERGY = 1e-30


@dataclass(frozen=True)
class SiteProfile:
    """Energies are mean squares per channel, divided by their mean, from the strongest to the weakest channel at
    ``CURVE_POINTS`` equal distances. "After" is the basis in which the codes are taken.

    Attributes:
        activations_before: Of the sampled calibration tokens.
        activations_after: The same, transformed (not centred).
        weights_before: Of the columns of the stacked weight.
        weights_after: Of the columns that the codes stand for.
        largest: Per denoise step (one entry outside the loop) the largest magnitude after the transform.
        q999: The same for the 99.9th percentile of the magnitudes.
    """

    activations_before: tuple[float, ...]
    activations_after: tuple[float, ...]
    weights_before: tuple[float, ...]
    weights_after: tuple[float, ...]
    largest: tuple[float, ...]
    q999: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: list(values) for name, values in vars(self).items()}


@torch.no_grad()
def site_profile(site: QuantizedSite, weight: Tensor, statistics: SiteStatistics) -> SiteProfile:
    """Profile of a site.

    Args:
        site: Quantized.
        weight: ``[O, I]``, the stacked weight that it stands for.
        statistics: Calibration of its input.
    """
    tensors = {name: tensor.cpu() for name, tensor in site.tensors().items()}
    transform = InputTransform.from_tensors(site.spec.recipe, site.spec.in_features, tensors)
    before = torch.zeros(site.spec.in_features, dtype=torch.float64)
    after, largest, q999 = before.clone(), [], []
    for tokens in (sample.cpu() for sample in statistics.tokens()):
        u = transform.apply_flat(tokens)
        before += tokens.double().square().sum(dim=0)
        after += u.double().square().sum(dim=0)
        magnitudes = u.abs().flatten()
        largest.append(float(magnitudes.max()) if magnitudes.numel() else 0.0)
        q999.append(_high(magnitudes))
    return SiteProfile(
        _curve(before),
        _curve(after),
        _curve(weight.detach().cpu().double().square().sum(dim=0)),
        _curve(dequantized(site.spec, tensors).double().square().sum(dim=0)),
        tuple(largest),
        tuple(q999),
    )


def _high(magnitudes: Tensor) -> float:
    """99.9th percentile, nearest rank; any number of values."""
    if not magnitudes.numel():
        return 0.0
    rank = max(1, int(_QUANTILE * magnitudes.numel()))
    return float(magnitudes.kthvalue(rank).values)


def _curve(energies: Tensor) -> tuple[float, ...]:
    falling = energies.sort(descending=True).values / energies.mean().clamp_min(_SMALLEST_ENERGY)
    points = torch.linspace(0, falling.numel() - 1, CURVE_POINTS).round().long()
    return tuple(float(value) for value in falling[points])

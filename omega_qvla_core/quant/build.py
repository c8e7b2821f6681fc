"""Quantize the linears of one input site: from weights, calibration statistics and a recipe to a ``QuantizedSite``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.kernels import pack_codes
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES, FitData
from omega_qvla_core.quant.multiplier import pack_multipliers, search_multipliers
from omega_qvla_core.quant.profile import SiteProfile
from omega_qvla_core.quant.recipe import FLOAT_SCALES, INTEGER_MULTIPLIER, SideRecipe
from omega_qvla_core.quant.rotation import output_rotation
from omega_qvla_core.quant.scales import search_scales
from omega_qvla_core.quant.site import QuantizedSite, Reader, SiteSpec, dequantized
from omega_qvla_core.quant.solver import SOLVERS_WITH_HESSIAN, WeightProblem, solve
from omega_qvla_core.quant.statistics import MIN_TOKENS, SiteStatistics
from omega_qvla_core.quant.transform import (
    InputTransform,
    block_matrices,
    build_transform,
    gram_in_basis,
    stack_blocks,
    unstack_blocks,
    weight_in_basis,
)

# Rows per block of the output rotation (METHOD A.4).
OUTPUT_BLOCK = 64


@dataclass
class SiteResult:
    """What came out for one site.

    Attributes:
        site: The quantized site.
        error: ``|y' - y| / |y|`` over the calibration sample, all steps together.
        per_step: The same per row of the tables' calibration (one entry outside the denoise loop).
        notes: What was done other than asked.
        decision: Of the automatic choice: what was tried, measured and taken; None where nothing was chosen.
        profile: Channel energies and activation ranges, if they were asked for.
    """

    site: QuantizedSite
    error: float
    per_step: list[float]
    notes: list[str] = field(default_factory=list)
    decision: dict[str, Any] | None = None
    profile: SiteProfile | None = None


def build_site(
    name: str,
    side: str,
    linears: Sequence[tuple[str, nn.Linear]],
    statistics: SiteStatistics | None,
    recipe: SideRecipe,
    min_tokens: int = MIN_TOKENS,
    device: torch.device | str | None = None,
) -> SiteResult:
    """Quantize linears that read the same input. Factorizations and sums are float64 on every device.

    Args:
        name: Of the site.
        side: ``language`` or ``action_head``.
        linears: Module name and module of each reader; they stay unchanged.
        statistics: Calibration of their input.
        recipe: Their recipe.
        min_tokens: Fewest tokens per denoise step.
        device: Where the work is done; where the weights are if None. The result lies where the weights are.

    Raises:
        QuantizationError: Anything that keeps the recipe from being carried out; the message names the layer.
    """
    device = linears[0][1].weight.device if device is None else torch.device(device)
    weight = _stacked_weight(linears, device)
    if statistics is None:
        raise QuantizationError(f"{name} was never seen in calibration; calibrate before quantizing")
    statistics.check(min_tokens)
    if statistics.columns != weight.shape[1]:
        raise QuantizationError(
            f"{name} was calibrated with {statistics.columns} channels but has {weight.shape[1]}; calibrate this model"
        )
    statistics = _OnDevice(statistics, device)
    spec = _spec(name, side, linears, statistics, recipe)
    tensors, notes = _weight_tensors(spec, weight, statistics)
    tensors["activation"] = _activation_table(spec, tensors, statistics)
    _add_biases(spec, tensors, linears, weight, statistics)
    site = QuantizedSite(spec, {key: value.contiguous() for key, value in tensors.items()})
    per_step, error = relative_errors(site, weight.float(), statistics.tokens(), statistics.steps or 0)
    if not torch.isfinite(torch.tensor(error)):
        raise QuantizationError(f"{name}: the quantized output is not finite on the calibration sample")
    site.to(linears[0][1].weight.device)
    return SiteResult(site, error, per_step, notes + _sample_notes(spec, statistics))


def relative_errors(
    site: QuantizedSite, weight: Tensor, tokens: Sequence[Tensor], steps: int
) -> tuple[list[float], float]:
    """``|y' - y| / |y|`` per row of ``tokens`` and over all.

    Args:
        site: A quantized site; biases do not count.
        weight: float32 ``[O, I]`` that it stands for.
        tokens: Per denoise step ``[n, I]``; one entry outside the loop.
        steps: Denoise steps, 0 outside the loop.
    """
    wrong, right = [], []
    bias = site.bias.float() if "bias" in site.tensors() else 0.0
    for index, x in enumerate(tokens):
        with denoise_step(index, steps) if steps else nullcontext():
            y = x.float() @ weight.T
            wrong.append(float((site(x.float()) - bias - y).double().square().sum()))
            right.append(float(y.double().square().sum()))
    per_step = [(w / max(r, 1e-30)) ** 0.5 for w, r in zip(wrong, right)]
    return per_step, (sum(wrong) / max(sum(right), 1e-30)) ** 0.5


class _OnDevice:
    """Statistics whose tensors come out on one device."""

    def __init__(self, statistics: SiteStatistics, device: torch.device) -> None:
        self._statistics, self._device = statistics, device
        self.steps, self.counts = statistics.steps, statistics.counts

    def gram(self, step: int) -> Tensor:
        return self._statistics.gram(step).to(self._device)

    def mean(self) -> Tensor:
        return self._statistics.mean().to(self._device)

    def absmax(self) -> Tensor:
        return self._statistics.absmax().to(self._device)

    def tokens(self) -> list[Tensor]:
        return [sample.to(self._device) for sample in self._statistics.tokens()]


def _stacked_weight(linears: Sequence[tuple[str, nn.Linear]], device: torch.device) -> Tensor:
    """float64 ``[O, I]`` of all readers; NaN and Inf are refused by layer name."""
    for name, linear in linears:
        if not torch.isfinite(linear.weight).all():
            raise QuantizationError(f"{name}: the weight holds NaN or Inf; check the checkpoint")
    return torch.cat([linear.weight.detach().to(device).double() for _, linear in linears])


def _spec(
    name: str, side: str, linears: Sequence[tuple[str, nn.Linear]], statistics: SiteStatistics, recipe: SideRecipe
) -> SiteSpec:
    readers = tuple(Reader(reader, linear.out_features) for reader, linear in linears)
    steps = statistics.steps if recipe.per_step and recipe.activation != "none" or _centred_steps(recipe) else 0
    return SiteSpec(name, side, readers, linears[0][1].in_features, steps or 0, recipe)


def _centred_steps(recipe: SideRecipe) -> bool:
    return recipe.centring and recipe.per_step


def _centre(spec: SiteSpec, statistics: SiteStatistics) -> Tensor | None:
    """Mean token per table row, float16 ``[T, I]``, or None."""
    if not spec.recipe.centring:
        return None
    if spec.steps:
        return statistics.mean().half()
    means = statistics.mean()
    counts = torch.tensor(statistics.counts, dtype=torch.float64, device=means.device)
    return ((means * counts[:, None]).sum(dim=0, keepdim=True) / counts.sum()).half()


def _centred_row(centre: Tensor | None, index: int) -> Tensor | float:
    return 0.0 if centre is None else centre[min(index, centre.shape[0] - 1)]


def _peak(spec: SiteSpec, statistics: SiteStatistics, centre: Tensor | None) -> Tensor:
    """Largest magnitude per channel ``[I]`` of what is coded."""
    if centre is None:
        return statistics.absmax().amax(dim=0)
    samples = [tokens - _centred_row(centre, index) for index, tokens in enumerate(statistics.tokens())]
    return torch.stack([sample.abs().amax(dim=0) for sample in samples]).amax(dim=0)


def _hessian(spec: SiteSpec, weight: Tensor, statistics: SiteStatistics, centre: Tensor | None) -> Tensor:
    """Weighted sum over the steps of the Gram matrices of what is coded, float64 ``[I, I]`` (METHOD E3)."""
    if len(statistics.counts) == 1 and centre is None:
        # Its weight is a common factor, which changes no code: at 16384 channels another copy would be 2 GB.
        return statistics.gram(0)
    total = torch.zeros(spec.in_features, spec.in_features, dtype=torch.float64, device=weight.device)
    means = statistics.mean()
    for index, count in enumerate(statistics.counts):
        gram = statistics.gram(index)
        if centre is not None:
            mean, offset = means[index].double(), _centred_row(centre, index).double()
            cross = torch.outer(mean, offset)
            gram = gram + count * (torch.outer(offset, offset) - cross - cross.T)
        if spec.recipe.hessian_weights == "output_energy":
            gram = gram / ((weight @ gram) * weight).sum().clamp_min(1e-30)
        total += gram
    return total


def _weight_tensors(spec: SiteSpec, weight: Tensor, statistics: SiteStatistics) -> tuple[dict[str, Tensor], list[str]]:
    """Transform, codes and scales."""
    recipe = spec.recipe
    centre = _centre(spec, statistics)
    tensors = build_transform(recipe, weight, _peak(spec, statistics, centre))
    matrices = [matrix.to(weight.device) for matrix in block_matrices(recipe, spec.in_features, tensors)]
    order = tensors.get("order")
    rotated = weight_in_basis(weight, order, matrices)
    if recipe.output_rotation:
        blocks = [block.half() for block in output_rotation(weight, OUTPUT_BLOCK)]
        tensors.update(stack_blocks(blocks, "output_rotation"))
        rotated = _rotate_rows(
            rotated, [block.to(weight.device) for block in unstack_blocks(tensors, "output_rotation")]
        )
    if recipe.low_rank:
        tensors.update(low_rank_factors(rotated, recipe.low_rank))
        rotated = rotated - tensors["low_rank_out"].double() @ tensors["low_rank_in"].double()
    hessian = None
    if recipe.solver in SOLVERS_WITH_HESSIAN:
        hessian = gram_in_basis(_hessian(spec, weight, statistics, centre), order, matrices)
    stored, scales = _scales(recipe, rotated)
    tensors.update(stored)
    names = ", ".join(reader.name for reader in spec.readers)
    problem = WeightProblem(
        names, rotated, scales, recipe.group, recipe.weight_bits, hessian, recipe.damping, recipe.act_order
    )
    solution = solve(recipe.solver, problem)
    tensors["codes"] = pack_codes(solution.codes, recipe.weight_bits)
    if centre is not None:
        tensors["centre"] = centre
    notes = list(solution.notes)
    if recipe.scale_format == FLOAT_SCALES and scales.dtype != torch.float16:
        notes.append("weight scales are stored in float32: they leave the range of float16")
    return tensors, notes


def _scales(recipe: SideRecipe, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What is stored of the weight scales, and the scales ``[O, G]`` themselves."""
    if recipe.scale_format == INTEGER_MULTIPLIER:
        rows, multipliers = search_multipliers(weight, recipe.group, recipe.weight_bits, recipe.scale_grid)
        stored = {"scales": rows, "multipliers": pack_multipliers(multipliers)}
        return stored, rows.double() * multipliers
    scales = search_scales(weight, recipe.group, recipe.weight_bits, recipe.scale_grid)
    return {"scales": scales}, scales


def low_rank_factors(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """The largest singular directions of a weight (METHOD A.6), ``W ~ out in``, each taking half of the values.

    Args:
        weight: float64 ``[O, I]``, in the basis in which it is coded.
        rank: At most ``min(O, I)`` are kept.

    Returns:
        ``low_rank_out`` float16 ``[O, r]`` and ``low_rank_in`` float16 ``[r, I]``.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return {
        "low_rank_out": (left[:, :rank] * root).half().contiguous(),
        "low_rank_in": (root[:, None] * right[:rank]).half().contiguous(),
    }


def _rotate_rows(weight: Tensor, blocks: list[Tensor]) -> Tensor:
    """``W[rows] <- V^-T W[rows]``: what ``y[rows] V`` undoes, exactly also for ``V`` rounded to float16."""
    parts = weight.split([block.shape[0] for block in blocks])
    return torch.cat([torch.linalg.solve(block.T, part) for block, part in zip(blocks, parts)])


def _activation_table(spec: SiteSpec, tensors: dict[str, Tensor], statistics: SiteStatistics) -> Tensor:
    """float32 ``[T, C]``: a row per denoise step, or one."""
    recipe = spec.recipe
    transform = InputTransform.from_tensors(recipe, spec.in_features, tensors, tensors["codes"].device)
    centre = tensors.get("centre")
    samples = [
        transform.apply_flat(tokens - _centred_row(centre, index)) for index, tokens in enumerate(statistics.tokens())
    ]
    if not spec.steps:
        samples = [torch.cat(samples)]
    scheme, weight = ACTIVATION_SCHEMES[recipe.activation], dequantized(spec, tensors)
    group = min(recipe.activation_group, spec.in_features)
    bits, clip, percentile = recipe.activation_bits, recipe.clip, recipe.percentile
    rows = [scheme.fit(FitData(sample, weight, group, bits, clip, percentile)) for sample in samples]
    return torch.stack(rows).float()


def _add_biases(
    spec: SiteSpec,
    tensors: dict[str, Tensor],
    linears: Sequence[tuple[str, nn.Linear]],
    weight: Tensor,
    statistics: SiteStatistics,
) -> None:
    """``bias`` float32 ``[O]`` and, with centring, ``centre_bias`` float16 ``[T, O]`` (the product of the mean)."""
    if "centre" in tensors:
        tensors["centre_bias"] = (tensors["centre"].double() @ weight.T).half()
    if any(linear.bias is not None for _, linear in linears):
        parts = [linear.bias if linear.bias is not None else torch.zeros(linear.out_features) for _, linear in linears]
        tensors["bias"] = torch.cat([part.detach().float().to(weight.device) for part in parts])


def _sample_notes(spec: SiteSpec, statistics: SiteStatistics) -> list[str]:
    """A Hessian from fewer tokens than channels is singular; damping makes up for it, and the report says so."""
    tokens = sum(statistics.counts)
    if spec.recipe.solver in SOLVERS_WITH_HESSIAN and tokens < spec.in_features:
        return [f"calibrated on {tokens} tokens for {spec.in_features} channels: the Hessian rests on damping"]
    return []

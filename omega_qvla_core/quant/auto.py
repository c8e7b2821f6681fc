"""Choose the recipe of every input site by its output error on calibration tokens that it was not made from.

Rotation spreads outliers over a block, which helps most layers and hurts those whose outputs rest on a few massive
channels or tokens (METHOD E5). Nothing in a weight tells which: so every candidate is built and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.step_context import DenoiseStep
from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES
from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.build import build_site, relative_errors
from omega_qvla_core.quant.recipe import SideRecipe
from omega_qvla_core.quant.rotation import STORED_ROTATIONS
from omega_qvla_core.quant.statistics import MIN_TOKENS, SiteStatistics

# Bits of weights and activations that a byte budget may buy.
WIDE_BITS = 8

CHOSEN_FIELDS = ("rotation", "smoothing", "permutation", "clip", "low_rank", "weight_bits", "activation_bits")
"""Fields of ``SideRecipe`` that may differ from the starting recipe."""

HALF_BYTES = 2


@dataclass(frozen=True)
class Candidate:
    """A recipe that was tried.

    Attributes:
        recipe: Of the site.
        error: ``|y' - y| / |y|`` over all held-out tokens.
        bytes: Of everything that a pack stores of the site.
    """

    recipe: SideRecipe
    error: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The chosen fields, error and bytes."""
        return {**_chosen(self.recipe), "error": self.error, "bytes": self.bytes}


@dataclass(frozen=True)
class Decision:
    """What was tried for one site and what was taken.

    Attributes:
        start: The recipe that the search started from.
        best: The least error without anything that a budget pays for.
        tried: Every candidate, ``start`` first.
    """

    start: Candidate
    best: Candidate
    tried: tuple[Candidate, ...]

    def taking(self, taken: Candidate) -> dict[str, Any]:
        """As a JSON object for the report, with ``taken`` as the outcome."""
        return {
            "taken": taken.to_json(),
            "start": self.start.to_json(),
            "tried": [candidate.to_json() for candidate in self.tried],
        }


def choose(
    name: str,
    side: str,
    linears: Sequence[tuple[str, nn.Linear]],
    statistics: SiteStatistics,
    start: SideRecipe,
    auto: AutoChoice,
) -> Decision:
    """Try the candidates of one site.

    First every rotation with every smoothing, then the permutations, then the clips, each with the best so far; with a
    byte budget also a low-rank branch and 8 bits, which ``spend`` may take.

    Args:
        name: Of the site.
        side: ``language`` or ``action_head``.
        linears: Its readers.
        statistics: Calibration of their input.
        start: Their recipe.
        auto: What to try.

    Raises:
        QuantizationError: Too few calibration tokens, or a layer that cannot be done.
    """
    folds = _folds(statistics, auto)
    weight = torch.cat([linear.weight.detach().float() for _, linear in linears])
    tried: dict[SideRecipe, Candidate] = {}

    def measured(recipe: SideRecipe) -> Candidate:
        if recipe not in tried:
            tried[recipe] = _measure(name, side, linears, weight, folds, recipe)
        return tried[recipe]

    first = best = measured(start)
    stages: tuple[Callable[[SideRecipe], Iterable[SideRecipe]], ...] = (
        lambda r: (replace(r, rotation=o, smoothing=s) for o in auto.rotations for s in auto.smoothings),
        lambda r: (replace(r, permutation=p) for p in auto.permutations),
        lambda r: (replace(r, clip=c) for c in auto.clips if c in ACTIVATION_SCHEMES[r.activation].clips),
    )
    for stage in stages:
        best = min([best, *(measured(recipe) for recipe in stage(best.recipe))], key=lambda c: c.error)
    if best.error > first.error * (1 - auto.margin):
        best = first
    if auto.byte_budget is not None:
        for recipe in {best.recipe: None, _without_stored_rotation(tried): None}:
            for extra in _extras(recipe, auto):
                measured(extra)
    return Decision(first, best, tuple(tried.values()))


def spend(decisions: Sequence[Decision], budget_bytes: int) -> list[Candidate]:
    """One candidate per site within a number of bytes, by falling gain per byte.

    Every site starts at its smallest candidate. Then, again and again, the step that takes most off the sum of squared
    relative errors per byte is taken, until none fits. All sites weigh the same.

    Args:
        decisions: Per site.
        budget_bytes: For all sites together.

    Raises:
        QuantizationError: The smallest candidates do not fit.
    """
    taken = [min(one.tried, key=lambda c: (c.bytes, c.error)) for one in decisions]
    left = budget_bytes - sum(candidate.bytes for candidate in taken)
    if left < 0:
        raise QuantizationError(
            f"the byte budget allows {budget_bytes} bytes, but the smallest recipes need {budget_bytes - left}; "
            "raise byte_budget, or use larger groups"
        )
    while True:
        steps = [
            (_gain(now, other), index, other)
            for index, (one, now) in enumerate(zip(decisions, taken))
            for other in one.tried
            if other.error < now.error and other.bytes - now.bytes <= left
        ]
        if not steps:
            return taken
        _, index, other = max(steps, key=lambda step: (step[0], -step[1]))
        left -= other.bytes - taken[index].bytes
        taken[index] = other


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gain(now: Candidate, other: Candidate) -> float:
    """Squared error taken off per byte; without limit where it costs nothing."""
    cost = other.bytes - now.bytes
    return (now.error**2 - other.error**2) / cost if cost > 0 else float("inf")


@dataclass(frozen=True)
class _Fold:
    """What a candidate is made from, and the tokens per row that it is measured on."""

    made_from: SiteStatistics
    held_out: list[Tensor]


def _folds(statistics: SiteStatistics, auto: AutoChoice) -> list[_Fold]:
    """Split the sampled tokens of every row. Gram matrices come from the sample too, so that nothing leaks."""
    statistics.check(max(MIN_TOKENS, auto.folds))
    generator = torch.Generator().manual_seed(auto.seed)
    rows = []
    for tokens in statistics.tokens():
        shuffled = tokens[torch.randperm(tokens.shape[0], generator=generator).to(tokens.device)]
        rows.append(shuffled.tensor_split(auto.folds))
    return [_fold(statistics, rows, index, auto) for index in range(auto.folds)]


def _fold(statistics: SiteStatistics, rows: list[tuple[Tensor, ...]], index: int, auto: AutoChoice) -> _Fold:
    made_from = SiteStatistics(statistics.name, statistics.columns, auto.tokens, auto.seed)
    steps = statistics.steps or 0
    for step, parts in enumerate(rows):
        kept = torch.cat([part for number, part in enumerate(parts) if number != index])
        made_from.add(kept, DenoiseStep(step, steps) if steps else None)
    return _Fold(made_from, [parts[index][: auto.tokens] for parts in rows])


def _measure(
    name: str,
    side: str,
    linears: Sequence[tuple[str, nn.Linear]],
    weight: Tensor,
    folds: Sequence[_Fold],
    recipe: SideRecipe,
) -> Candidate:
    wrong = right = 0.0
    for fold in folds:
        site = build_site(name, side, linears, fold.made_from, recipe, min_tokens=1).site
        energy = sum(float((x @ weight.T).double().square().sum()) for x in fold.held_out)
        _, error = relative_errors(site, weight, fold.held_out, fold.made_from.steps or 0)
        wrong, right = wrong + error**2 * energy, right + energy
    return Candidate(recipe, (wrong / max(right, 1e-30)) ** 0.5, stored_bytes(site.tensors().values()))


def _without_stored_rotation(tried: dict[SideRecipe, Candidate]) -> SideRecipe:
    """The best recipe whose rotation costs no bytes: its saving may buy more elsewhere."""
    free = [candidate for candidate in tried.values() if candidate.recipe.rotation not in STORED_ROTATIONS]
    return min(free or tried.values(), key=lambda c: c.error).recipe


def _extras(recipe: SideRecipe, auto: AutoChoice) -> list[SideRecipe]:
    extras = [replace(recipe, low_rank=rank) for rank in auto.low_ranks if not recipe.output_rotation]
    if auto.eight_bits and max(recipe.weight_bits, recipe.activation_bits) < WIDE_BITS:
        extras.append(replace(recipe, weight_bits=WIDE_BITS, activation_bits=WIDE_BITS))
    return extras


def _chosen(recipe: SideRecipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in CHOSEN_FIELDS}

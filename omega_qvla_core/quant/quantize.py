"""Quantize the linears of a model, site by site."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant.auto import HALF_BYTES, Decision, choose, spend
from omega_qvla_core.quant.build import SiteResult, build_site
from omega_qvla_core.quant.calibrate import Calibration
from omega_qvla_core.quant.linear import replace_linears
from omega_qvla_core.quant.profile import site_profile
from omega_qvla_core.quant.recipe import Recipe, SideRecipe
from omega_qvla_core.quant.scope import InputSite, get_linear
from omega_qvla_core.quant.statistics import MIN_TOKENS

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is next)."""


def quantize_linears(
    model: nn.Module,
    sites: Sequence[InputSite],
    recipe: Recipe,
    calibration: Calibration,
    *,
    progress: Progress | None = None,
    min_tokens: int = MIN_TOKENS,
    device: torch.device | str | None = None,
) -> list[SiteResult]:
    """Replace the linears of a model, in place.

    Linears whose recipe says 16 bits stay. Readers of one site whose recipes differ are quantized apart.

    Args:
        model: Any module.
        sites: Which linears, and which of them read the same input.
        recipe: How.
        calibration: From ``calibrate``, over the same sites.
        progress: Called before every site and at the end.
        min_tokens: Fewest calibration tokens per denoise step.
        device: Where layers are quantized, such as ``cuda``; where their weights are if None.

    Returns:
        One result per quantized site, in order.

    Raises:
        QuantizationError: A layer cannot be done as the recipe asks. The model may be partly quantized then.
        ConfigError: An override's pattern matches no linear.
    """
    check_overrides(recipe, sites)
    jobs = [_Job(site, *part) for site in sites for part in split_site(site, recipe) if part[2].quantized]
    taken = _choose(model, sites, jobs, recipe, calibration, progress) if recipe.auto is not None else {}
    results = []
    for index, site in enumerate(sites):
        if progress is not None:
            progress(index, len(sites), site.name)
        for job in (job for job in jobs if job.site is site):
            side_recipe, decision = taken.get(job.name, (job.recipe, None))
            statistics = calibration[site.name]
            linears = job.linears(model)
            result = build_site(job.name, site.side, linears, statistics, side_recipe, min_tokens, device)
            result.decision = decision
            result.profile = site_profile(result.site, torch.cat([linear.weight for _, linear in linears]), statistics)
            replace_linears(model, result.site)
            results.append(result)
    if progress is not None:
        progress(len(sites), len(sites), "")
    return results


@dataclass(frozen=True)
class _Job:
    """Linears that are quantized together."""

    site: InputSite
    name: str
    readers: tuple[str, ...]
    recipe: SideRecipe

    def linears(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        return [(reader, get_linear(model, reader)) for reader in self.readers]


def _choose(
    model: nn.Module,
    sites: Sequence[InputSite],
    jobs: Sequence[_Job],
    recipe: Recipe,
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, tuple[SideRecipe, dict[str, Any]]]:
    """Per job's name the recipe that the automatic choice takes, and the record of the choice."""
    auto = recipe.auto
    decisions: list[Decision] = []
    for index, job in enumerate(jobs):
        if progress is not None:
            progress(index, len(jobs), f"choose {job.name}")
        linears = job.linears(model)
        decisions.append(choose(job.name, job.site.side, linears, calibration[job.site.name], job.recipe, auto))
    outcomes = [one.best for one in decisions]
    if auto.byte_budget is not None:
        every = [get_linear(model, reader) for site in sites for reader in site.readers]
        quantized = [linear for job in jobs for _, linear in job.linears(model)]
        left = sum(p.numel() for linear in every if linear not in quantized for p in linear.parameters()) * HALF_BYTES
        in_float16 = sum(linear.weight.numel() for linear in quantized) * HALF_BYTES + left
        outcomes = spend(decisions, int(auto.byte_budget * in_float16) - left)
    return {
        job.name: (outcome.recipe, decision.taking(outcome))
        for job, decision, outcome in zip(jobs, decisions, outcomes)
    }


def split_site(site: InputSite, recipe: Recipe) -> list[tuple[str, tuple[str, ...], SideRecipe]]:
    """(name, readers, recipe) of what is quantized together: the readers of a site that share a recipe and sharing."""
    groups: list[tuple[SideRecipe, list[str]]] = []
    for reader in site.readers:
        resolved = recipe.resolve(reader, site.side)
        same = [readers for other, readers in groups if other == resolved and resolved.shared_input]
        if same:
            same[0].append(reader)
        else:
            groups.append((resolved, [reader]))
    if len(groups) == 1:
        return [(site.name, tuple(groups[0][1]), groups[0][0])]
    return [(_part_name(site, readers), tuple(readers), resolved) for resolved, readers in groups]


def check_overrides(recipe: Recipe, sites: Sequence[InputSite]) -> None:
    """Raise ConfigError if an override's pattern matches no linear: most likely it is misspelt."""
    names = [reader for site in sites for reader in site.readers]
    for override in recipe.overrides:
        if not fnmatch.filter(names, override.pattern):
            raise ConfigError(
                f"recipe override {override.pattern!r} matches no linear in scope; names look like {names[0]!r}"
            )


def _part_name(site: InputSite, readers: list[str]) -> str:
    """A unique name for some readers of a site: their own name, or the site's with the last parts of their names."""
    if len(readers) == 1:
        return readers[0]
    return f"{site.name}[{'+'.join(reader.rsplit('.', 1)[-1] for reader in readers)}]"

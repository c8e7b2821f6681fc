"""What it costs to quantize the input sites of a full-size model, one of each size, without its weights.

Every site is made in a process of its own, on random weights and random tokens: neither the time nor the memory of a
factorization, or of a search over grids, depends on the values.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.evaluate.bench_memory import in_own_process, process_peak_bytes
from omega_qvla_core.models.step_context import DenoiseStep
from omega_qvla_core.quant.build import build_site
from omega_qvla_core.quant.memory import meta_model
from omega_qvla_core.quant.memory_table import PI05_STEPS, full_size_gr00t, full_size_pi05
from omega_qvla_core.quant.quantize import split_site
from omega_qvla_core.quant.recipe import Recipe, SideRecipe
from omega_qvla_core.quant.scope import ACTION_HEAD, find_sites
from omega_qvla_core.quant.statistics import SiteStatistics

MODELS = {"pi05": full_size_pi05, "gr00t": full_size_gr00t}
_STEPS = {"pi05": PI05_STEPS, "gr00t": 4}
_SEED = 0


@dataclass(frozen=True)
class SiteSize:
    """Input sites of one size.

    Attributes:
        name: Of the first one.
        side: ``language`` or ``action_head``.
        count: How many of them the model has.
        outputs: Stacked rows of all that read the input.
        columns: Width of the input.
        steps: Denoise steps that it is calibrated for; 0 outside the loop.
        recipe: Its recipe.
    """

    name: str
    side: str
    count: int
    outputs: int
    columns: int
    steps: int
    recipe: SideRecipe


@dataclass(frozen=True)
class SiteCost:
    """What one site took.

    Attributes:
        wall_s: Wall clock of ``build_site``; statistics are not counted.
        cpu_s: Processor time of the same, all threads.
        peak_bytes: On the CPU the largest resident size of the process, with interpreter, torch and statistics; on a
            GPU the largest amount that was allocated.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int


def site_sizes(model: str, recipe: Recipe) -> list[SiteSize]:
    """The sizes of a full-size model's quantized sites, in the order of the model.

    Args:
        model: ``pi05`` or ``gr00t``.
        recipe: How they are quantized; sites of different recipes are told apart.

    Raises:
        QuantizationError: There is no such model.
    """
    if model not in MODELS:
        raise QuantizationError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
    skeleton = meta_model(MODELS[model]())
    found: dict[tuple[object, ...], list[SiteSize]] = {}
    for one in _sites(skeleton, recipe, _STEPS[model]):
        found.setdefault((one.side, one.outputs, one.columns, one.steps, one.recipe), []).append(one)
    return [SiteSize(**{**vars(same[0]), "count": len(same)}) for same in found.values()]


def measure_site(size: SiteSize, tokens: int, threads: int, device: str) -> SiteCost:
    """Quantize one site of a size in a new process.

    Args:
        size: Of the site.
        tokens: Calibration tokens, shared out among the denoise steps.
        threads: For torch.
        device: ``cpu`` or ``cuda``.

    Raises:
        QuantizationError: The recipe cannot be carried out with so few tokens.
        ConfigError: The process was killed.
    """
    return in_own_process(_measure, size, tokens, threads, device)


def measure_sites(
    sizes: Sequence[SiteSize], tokens: int, threads: int, device: str, progress: Callable[[int, int, str], None]
) -> Iterator[tuple[SiteSize, SiteCost]]:
    """Measure all, one after the other; see ``measure_site``."""
    for index, size in enumerate(sizes):
        progress(index, len(sizes), size.name)
        yield size, measure_site(size, tokens, threads, device)
    progress(len(sizes), len(sizes), "")


def _sites(skeleton: nn.Module, recipe: Recipe, steps: int) -> Iterator[SiteSize]:
    for site in find_sites(skeleton, whole=recipe.whole is not None):
        for name, readers, chosen in split_site(site, recipe):
            if chosen.quantized:
                linears = [skeleton.get_submodule(reader) for reader in readers]
                outputs = sum(one.out_features for one in linears)
                inside = steps if site.side == ACTION_HEAD and not name.endswith(".kv") else 0
                yield SiteSize(name, site.side, 1, outputs, linears[0].in_features, inside, chosen)


def _measure(size: SiteSize, tokens: int, threads: int, device: str) -> SiteCost:
    torch.set_num_threads(threads)
    torch.manual_seed(_SEED)
    linear = nn.Linear(size.columns, size.outputs, bias=False, device=device).requires_grad_(False)
    rows = max(size.steps, 1)
    statistics = SiteStatistics(size.name, size.columns, tokens // rows, _SEED)
    for step in range(rows):
        x = torch.randn(tokens // rows, size.columns, device=device)
        statistics.add(x, DenoiseStep(step, size.steps) if size.steps else None)
    started_s, before_s = time.perf_counter(), _cpu_s()
    with torch.no_grad():
        build_site(size.name, size.side, [(size.name, linear)], statistics, size.recipe)
    if device != "cpu":
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - started_s, _cpu_s() - before_s
    return SiteCost(wall_s, cpu_s, process_peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated())


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

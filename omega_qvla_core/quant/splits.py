"""Recipes compared over random halves of a policy's observations: paired, with standard errors, resumable."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.policy import quantize_policy
from omega_qvla_core.quant.quantizable import QuantizablePolicy
from omega_qvla_core.quant.quantize import Progress
from omega_qvla_core.quant.recipe import Recipe

MEASURES = ("relative", "median")
"""Fields of ``ActionError`` that are kept per split."""

# Distance of the noise seeds of two splits: more than anybody's number of observations.
_SEEDS_PER_SPLIT = 1000

Found = dict[str, dict[int, dict[str, float]]]
"""Per recipe and split the ``MEASURES``."""


def halves(count: int, split: int) -> tuple[Sequence[int], Sequence[int]]:
    """Two random halves of ``count`` indices, the same for every recipe."""
    order = list(range(count))
    random.Random(split).shuffle(order)
    return order[: count // 2], order[count // 2 :]


def measure_splits(
    policy: QuantizablePolicy,
    observations: Sequence[Observation],
    recipes: Sequence[Recipe],
    splits: Sequence[int],
    results: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Quantize with one half of the observations, compare actions on the other half, for every recipe and split.

    Args:
        policy: Unquantized.
        observations: To calibrate and to measure with.
        recipes: With names of their own.
        splits: Numbers of the halves; noise seeds follow from them too.
        results: JSON lines, one per recipe and split. What it holds is not measured again, the rest is appended.
        progress: Called with (done, total, what is next).

    Raises:
        ConfigError: ``results`` is not such a file.
    """
    found: Found = {recipe.name: {} for recipe in recipes}
    keys = {_key(recipe): recipe.name for recipe in recipes}
    for line in _read(results):
        if line["recipe_sha256"] in keys and line["split"] in splits:
            found[keys[line["recipe_sha256"]]][line["split"]] = {name: line[name] for name in MEASURES}
    left = [(split, recipe) for split in splits for recipe in recipes if split not in found[recipe.name]]
    for index, (split, recipe) in enumerate(left):
        if progress is not None:
            progress(index, len(left), f"split {split} {recipe.name}")
        made_from, held_out = ([observations[i] for i in part] for part in halves(len(observations), split))
        _, report = quantize_policy(policy, recipe, made_from, evaluation=held_out, seed=_SEEDS_PER_SPLIT * split)
        values = {name: getattr(report.actions, name) for name in MEASURES}
        found[recipe.name][split] = values
        if results is not None:
            line = {"recipe": recipe.name, "recipe_sha256": _key(recipe), "split": split, **values}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    if progress is not None:
        progress(len(left), len(left), "")
    return found


def splits_table(found: Found) -> str:
    """Markdown: mean and standard error per recipe, and of the paired difference from the first recipe."""
    first, *_ = found
    lines = ["| recipe | splits |" + "".join(f" {name} | {name}, difference from `{first}` |" for name in MEASURES)]
    lines.append("|" + "---|" * (2 + 2 * len(MEASURES)))
    for recipe, by_split in found.items():
        cells = [f"`{recipe}`", str(len(by_split))]
        for name in MEASURES:
            values = [one[name] for one in by_split.values()]
            cells.append(_mean(values))
            paired = [one[name] - found[first][split][name] for split, one in by_split.items() if split in found[first]]
            lower = sum(value < 0 for value in paired)
            cells.append("" if recipe == first else f"{_mean(paired)}, lower in {lower} of {len(paired)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    error = f" (standard error {stdev(values) / len(values) ** 0.5:.4f})" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{error}"


def _key(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path | None) -> list[Mapping[str, Any]]:
    if path is None or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all({"recipe_sha256", "split", *MEASURES} <= line.keys() for line in lines):
            raise ValueError("a line lacks a field")
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} holds no results of splits ({error}); give another file") from error
    return lines

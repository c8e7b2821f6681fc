"""What the tests of calibration from disk share: comparing packs and statistics, and cutting runs off."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omega_qvla_core.checkpoints.families import family_of_config
from omega_qvla_core.checkpoints.loading import describe, read_headers
from omega_qvla_core.checkpoints.strict_loading import matching_names
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import Recipe, find_sites, quantize_checkpoint, quantize_policy, save_pack
from omega_qvla_core.quant.layerwise import LayerwiseCalibration
from omega_qvla_core.quant.layerwise_files import ActivationFiles
from omega_qvla_core.quant.policy import calibrate_policy, round_unquantized
from omega_qvla_core.quant.statistics import SiteStatistics
from omega_qvla_core.quant.streaming_source import CheckpointSource
from omega_qvla_core.quant.whole import apply_whole, contract_embodiment
from omega_qvla_core.runtime import Policy


def slow(*values: object) -> list:
    """More parameters of the same kind, for `make test-slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Stopped(Exception):
    """Stands for a kill: nothing catches it."""


def contents(folder: Path) -> tuple[dict, dict]:
    """Metadata and tensors of a pack."""
    with safe_open(folder / "pack.safetensors", framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(one: Path, other: Path) -> None:
    """The same pack, bit for bit."""
    (left, ours), (right, theirs) = contents(one), contents(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert left["sites"] == right["sites"] and left["content_sha256"] == right["content_sha256"]
    assert json.loads(left.get("parts", "{}")) == json.loads(right.get("parts", "{}"))


def in_memory(checkpoint: Path, recipe: Recipe, seen: Sequence[Observation], out: Path) -> Path:
    """The pack that the quantizer in memory makes."""
    quantized, _ = quantize_policy(Policy.load(checkpoint), recipe, seen)
    return save_pack(quantized, out).parent


def stop_at_unit(checkpoint: Path, recipe: Recipe, seen: Sequence[Observation], out: Path, unit: int) -> None:
    """A run that ends before a unit of its work."""

    def stop(done: int, total: int, what: str) -> None:
        if done == unit:
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(checkpoint, recipe, out, observations=seen, progress=stop)


def stop_before_writing(
    wanted: str,
    checkpoint: Path,
    recipe: Recipe,
    seen: Sequence[Observation],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that ends when a file of activations is due."""
    write = ActivationFiles.write

    def stop(self: ActivationFiles, file: str, tensors: dict) -> None:
        if file == wanted:
            raise Stopped
        write(self, file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationFiles, "write", stop)
        with pytest.raises(Stopped):
            quantize_checkpoint(checkpoint, recipe, out, observations=seen)


def both_statistics(
    checkpoint: Path, recipe: Recipe, seen: Sequence[Observation], folder: Path, reservoir_tokens: int
) -> list[tuple[SiteStatistics, SiteStatistics]]:
    """Per site the statistics from disk and those in memory."""
    headers = read_headers(checkpoint)
    policy, description = Policy.load(checkpoint), describe(headers)
    sites = find_sites(policy.model, whole=recipe.whole is not None)
    names = matching_names(policy.model.state_dict(), headers.weights, family_of_config(headers.model))
    model = copy.deepcopy(policy.model).requires_grad_(False)
    if recipe.whole is not None:
        apply_whole(model, recipe.whole, policy.spec.num_steps, contract_embodiment(description))
    round_unquantized(model, recipe, sites)
    memory = calibrate_policy(policy.with_model(model), sites, seen, seed=5, reservoir_tokens=reservoir_tokens)
    disk = LayerwiseCalibration(
        description,
        CheckpointSource(headers.weights, names),
        recipe,
        sites,
        seen,
        folder,
        seed=5,
        reservoir_tokens=reservoir_tokens,
        parts=lambda name: copy.deepcopy(model.get_submodule(name)),
    )
    ordered = sorted(sites, key=lambda site: disk.stage_of(site.name))
    return [(disk[site.name], memory[site.name]) for site in ordered]


def assert_same_statistics(pairs: Sequence[tuple[SiteStatistics, SiteStatistics]]) -> None:
    """The same sums, and the same tokens in the samples."""
    for mine, other in pairs:
        assert (mine.steps, mine.counts) == (other.steps, other.counts), mine.name
        for one, two in ((mine.gram(), other.gram()), (mine.mean(), other.mean()), (mine.absmax(), other.absmax())):
            assert torch.equal(one, two), mine.name
        assert all(torch.equal(one, two) for one, two in zip(mine.tokens(), other.tokens(), strict=True)), mine.name

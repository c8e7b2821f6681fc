"""The benchmark's arithmetic and bookkeeping; no test looks at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.bench_model import STAGES, BenchOptions, bench, measure_saving, prefix_products
from omega_qvla_core.evaluate.bench_presets import PRESETS, preset, random_model

SHORT = BenchOptions(num_steps=2, repeats=1, present_cameras=2, prompt_tokens=5, padded_tokens=16)


@pytest.mark.parametrize("family", ["pi05", "gr00t_n15"])
def test_every_stage_is_timed_and_dropping_changes_what_it_should(family):
    model = random_model(preset(family, "tiny"), "cpu", torch.float32)
    found = measure_saving(model, SHORT)
    assert set(found.dropped.stages) == set(found.ratios) == set(STAGES)
    assert all(one.p50_ms > 0 and one.p95_ms >= one.p50_ms for one in found.dropped.stages.values())
    assert found.dropped.peak_bytes > found.dropped.weight_bytes > 0
    image_tokens = model.config.vision.num_patches
    assert found.dropped.prefix_tokens == 2 * image_tokens + 5
    if family == "pi05":
        assert found.kept.prefix_tokens == 3 * image_tokens + 16
        # Absent cameras and padding have no effect on the actions.
        assert found.largest_difference < 1e-5
    else:
        assert found.kept.prefix_tokens == 2 * image_tokens + 16
    assert 0 < found.expected["prefix"] < 1


def test_the_same_seed_gives_the_same_actions():
    runs = [bench(random_model(preset("pi05", "tiny"), "cpu", torch.float32), SHORT)[1] for _ in range(2)]
    assert torch.equal(*runs) and torch.isfinite(runs[0]).all()


def test_bfloat16_halves_the_weights():
    config = preset("gr00t_n15", "tiny")
    sizes = [
        bench(random_model(config, "cpu", dtype), replace(SHORT, dtype=dtype))[0].weight_bytes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes[0] == 2 * sizes[1]


def test_products_of_the_prefix_grow_with_tokens_and_match_the_weights():
    for config in PRESETS.values():
        assert 2 * prefix_products(config, 100) < prefix_products(config, 200) < 4 * prefix_products(config, 100)
    full = preset("pi05", "full")
    # 1.98 G weights in 18 layers; the last one stops at keys and values: 17 layers of 110.1 M, and 1.05 M.
    assert prefix_products(full, 1) == 17 * (110_100_480 + 2 * 8 * 256) + 2 * 2048 * 256


def test_full_presets_have_the_official_sizes():
    from omega_qvla_core.checkpoints.families import build_model

    for family, parameters in (("pi05", 3353433872), ("gr00t_n15", 2413522880 - 15238352)):
        with torch.device("meta"):
            model = build_model(preset(family, "full"))
        assert sum(value.numel() for value in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"repeats": 0}, "repeats is 0"), ({"present_cameras": 4}, "1 to 3"), ({"padded_tokens": 2}, "below prompt")],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SHORT, **changes)


def test_the_command_prints_json_alone():
    arguments = ["bench", "model", "--size", "tiny", "--repeats", "1", "--steps", "2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["ratios"]) == set(STAGES)
    result = CliRunner().invoke(app, [*arguments, "--family", "pi0"])
    assert result.exit_code == 1

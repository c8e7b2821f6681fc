"""What it costs to quantize the sites of a full-size model: which sizes there are, and one that is really made."""

from __future__ import annotations

import signal

import pytest
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.errors import ConfigError, QuantizationError
from omega_qvla_core.evaluate.bench_memory import in_own_process
from omega_qvla_core.evaluate.bench_sites import SiteSize, measure_site, site_sizes
from omega_qvla_core.quant.recipe import Recipe


def test_every_linear_in_scope_of_pi05_is_counted():
    sizes = site_sizes("pi05", Recipe.preset("executable_w4a4"))
    assert {(one.side, one.outputs, one.columns, one.count, one.steps) for one in sizes} == {
        ("language", 2560, 2048, 18, 0),
        ("language", 2048, 2048, 18, 0),
        ("language", 32768, 2048, 18, 0),
        ("language", 2048, 16384, 18, 0),
        ("action_head", 2560, 1024, 18, 10),
        ("action_head", 1024, 2048, 18, 10),
        ("action_head", 8192, 1024, 18, 10),
        ("action_head", 1024, 4096, 18, 10),
    }


def test_keys_and_values_of_features_are_outside_the_loop_in_gr00t():
    sizes = site_sizes("gr00t", Recipe.preset("executable_w4a4"))
    assert {one.steps for one in sizes if one.name.endswith(".kv")} == {0}
    assert {one.steps for one in sizes if one.name.endswith("attn1.q")} == {4}
    assert sum(one.count for one in sizes if one.side == "language") == 12 * 4


def test_a_site_is_made_and_its_cost_is_counted():
    recipe = Recipe.preset("executable_w4a4").action_head
    cost = measure_site(SiteSize("small", "action_head", 1, 48, 64, 2, recipe), 256, 1, "cpu")
    assert 0 < cost.cpu_s and 0 < cost.wall_s and cost.peak_bytes > 50 << 20


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(ConfigError, match="memory ran out"):
        in_own_process(signal.raise_signal, signal.SIGKILL)


def test_an_unknown_model_and_an_unknown_site_are_refused():
    with pytest.raises(QuantizationError, match="must be one of pi05, gr00t"):
        site_sizes("pi0", Recipe.preset("rtn"))
    result = CliRunner().invoke(app, ["large", "time", "--only", "nothing"])
    assert result.exit_code == 1 and "nothing" in result.output and "Traceback" not in result.output

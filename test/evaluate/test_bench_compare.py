"""The comparison of runtimes and precisions: what is run, its arithmetic and its output; no test looks at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate import bench_memory, bench_rows
from omega_qvla_core.evaluate.bench_compare import compare, default_shape
from omega_qvla_core.evaluate.bench_options import CompareOptions
from omega_qvla_core.evaluate.bench_peaks import Peaks, best_of
from omega_qvla_core.evaluate.bench_plot import draw
from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_quantize import RECIPES, quantize_randomly
from omega_qvla_core.evaluate.bench_shapes import MODELS, SHAPES, BenchShape, shaped
from omega_qvla_core.evaluate.bench_text import text
from omega_qvla_core.evaluate.bench_work import work
from omega_qvla_core.quant.linear import quantized_sites

SHORT = CompareOptions(
    model="pi05",
    shape=BenchShape(2, 5, 6, 2),
    size="tiny",
    precisions=("w8a8", "w4a4"),
    warm_ups=0,
    samples=2,
    memory=False,
)


@pytest.fixture(scope="module")
def found():
    seen = []
    comparison = compare(SHORT, lambda done, total, note: seen.append((done, total, note)))
    assert seen[-1] == (2, 2, "measuring")
    return comparison


def test_the_unquantized_rows_stand_beside_the_quantized_ones(found):
    assert [(row.precision, row.runtime) for row in found.rows] == [
        (precision, runtime) for precision in ("fp32", "w8a8", "w4a4") for runtime in ("eager", "engine")
    ]
    for row in found.rows:
        assert row.reason is None
        assert set(row.stages) == set(row.floor_ms) == {"vision", "prefix", "denoise", "chunk"}
        assert all(0 < one.p50_ms <= one.p95_ms for one in row.stages.values())
    # An engine makes fewer calls, and computes the same.
    assert all(
        found.row(one, "engine").operators < found.row(one, "eager").operators for one in ("fp32", "w8a8", "w4a4")
    )
    assert found.row("fp32", "engine").difference < 1e-5


def test_ratios_tell_fusion_from_bits(found):
    chunk = {(row.precision, row.runtime): row.stages["chunk"].p50_ms for row in found.rows}
    ratios = found.ratios()
    assert ratios["fp32 engine / fp32 eager (fusion)"] == chunk["fp32", "engine"] / chunk["fp32", "eager"]
    assert ratios["w4a4 engine / fp32 engine (bits)"] == chunk["w4a4", "engine"] / chunk["fp32", "engine"]
    assert ratios["w4a4 engine / fp32 eager"] == chunk["w4a4", "engine"] / chunk["fp32", "eager"]


def test_processor_time_is_named_where_it_was_counted(found):
    other = compare(replace(SHORT, precisions=(), samples=1, cpu_time=True))
    assert "processor time" in text(other).splitlines()[0] and "processor time" not in text(found)
    assert other.row("fp32", "engine").stages["chunk"].p50_ms > 0


def test_text_json_and_picture(found, tmp_path):
    lines = text(found).splitlines()
    assert "cameras/text/chunk/steps 2/5/6/2" in lines[0] and "GB/s" in lines[0]
    assert [line.split()[:2] for line in lines[2:8]] == [[row.precision, row.runtime] for row in found.rows]
    data = json.loads(json.dumps(found.to_json()))
    assert data["rows"][0]["stages"]["chunk"]["p50_ms"] > 0 and data["torch"] == torch.__version__
    draw(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_gr00t_has_engine_rows_on_the_cpu():
    found = compare(replace(SHORT, model="gr00t_n15", precisions=("w4a4",), samples=1))
    for precision in ("fp32", "w4a4"):
        eager, engine = found.row(precision, "eager"), found.row(precision, "engine")
        assert set(engine.stages) == {"vision", "prefix", "denoise", "chunk"}
        assert engine.operators < eager.operators
    assert found.row("fp32", "engine").difference < 1e-5


def test_a_row_without_an_engine_says_why(monkeypatch):
    monkeypatch.setattr(bench_rows, "build_engine", lambda model, device, untried: None)
    found = compare(replace(SHORT, precisions=("w4a4",), samples=1))
    empty = [row for row in found.rows if row.runtime == "engine"]
    assert len(empty) == 2 and all("no engine" in row.reason and not row.stages for row in empty)
    assert "fp32 engine was not run: there is no engine" in text(found)
    assert not found.ratios()
    assert found.row("fp32", "eager").stages["chunk"].p50_ms > 0


def test_the_tabletop_policy_is_the_trained_one():
    found = compare(replace(SHORT, model="tabletop", shape=default_shape("tabletop"), precisions=("w4a4_grouped",)))
    assert found.row("w4a4_grouped", "engine").difference is not None
    with pytest.raises(ConfigError, match="has 3 cameras; this model has 2"):
        compare(replace(SHORT, model="tabletop", shape=BenchShape(3, 6, 16, 4)))


def test_the_tabletop_policy_has_a_bfloat16_row_for_gpus():
    shape = default_shape("tabletop")
    half, whole = (
        bench_rows.build_runner(
            "eager", bench_rows.build_model("tabletop", "full", shape, precision, "cpu"), shape, "cpu"
        ).actions()
        for precision in ("bf16", "fp32")
    )
    assert 0.0 < (half - whole).abs().max() < 0.1


def test_memory_of_a_row_is_measured_in_a_process_of_its_own():
    options = replace(SHORT, precisions=(), samples=1)
    peak = bench_memory.peak_bytes(options, "fp32", "engine")
    # torch alone takes more than 100 MB; this process, with the whole suite in it, is not what counts.
    assert 50e6 < peak < 4e9


def test_what_does_not_fit_is_refused_with_the_arithmetic(monkeypatch):
    monkeypatch.setattr(bench_memory, "_memory_bytes", lambda device: 24 << 30)
    with pytest.raises(ConfigError, match=r"3\.35 G weights.*Use --size mid"):
        compare(replace(SHORT, size="full"))


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("family", ["pi05", "gr00t_n15"])
def test_random_codes_fill_every_site(family, precision):
    model = quantize_randomly(random_model(preset(family, "tiny"), "cpu", torch.float32), precision)
    sites = list(quantized_sites(model))
    assert sites and all(site.spec.executable for site in sites)
    bits = {f"w{site.spec.recipe.weight_bits}a{site.spec.recipe.activation_bits}" for site in sites}
    assert bits == {precision.removesuffix("_grouped")}
    for site in sites:
        y = site(torch.randn(3, site.spec.in_features))
        # Outputs keep the size of the inputs, so that activations stay finite at any depth.
        assert torch.isfinite(y).all() and 0.2 < float(y.square().mean().sqrt()) < 5


def test_work_is_that_of_the_published_sizes():
    """GFLOP and millions of weights of the full models, counted by hand from the towers' sizes."""
    full = work(shaped(preset("pi05", "full"), SHAPES["pi05"][0]), SHAPES["pi05"][0])
    assert [round(full[stage].linear / 1e9) for stage in ("vision", "prefix", "denoise")] == [636, 3626, 311]
    assert [round(full[stage].attention / 1e9) for stage in ("vision", "prefix", "denoise")] == [24, 130, 75]
    assert round(full["vision"].weights / 1e6, 1) == 414.1 and round(full["prefix"].weights / 1e6, 1) == 1872.8
    assert full["denoise"].weights == pytest.approx(10 * 311.5e6, rel=1e-3)
    libero = work(shaped(preset("pi05", "full"), SHAPES["pi05"][1]), SHAPES["pi05"][1])
    assert [round(libero[stage].linear / 1e9) for stage in ("vision", "prefix", "denoise")] == [424, 1996, 62]
    shape = BenchShape(2, 40, 16, 4)
    groot = work(preset("gr00t_n15", "full"), shape)
    assert [round(groot[stage].linear / 1e9) for stage in ("vision", "prefix", "denoise")] == [424, 945, 163]
    assert groot["denoise"].cache == 2 * 8 * 552 * 1536 * 4


def test_the_floor_is_computing_or_reading():
    full = work(shaped(preset("pi05", "full"), SHAPES["pi05"][0]), SHAPES["pi05"][0])
    peak, bandwidth = 990e12, 3350e9
    # An H100 by its data sheet in bf16: the prefix computes, the denoise loop reads.
    assert full["prefix"].floor_s(peak, peak, bandwidth, 2, 2) == pytest.approx(3.79e-3, rel=0.01)
    assert full["denoise"].floor_s(peak, peak, bandwidth, 2, 2) == pytest.approx(1.92e-3, rel=0.01)
    assert full["denoise"].floor_s(2 * peak, peak, bandwidth, 0.5, 2) == pytest.approx(0.52e-3, rel=0.03)


def test_ceilings_are_the_better_of_two_measurements():
    one = Peaks("device", 1, 1.0, 4.0, 5.0)
    assert best_of(one, replace(one, plain=2.0, integer=3.0, bandwidth=6.0)) == Peaks("device", 1, 2.0, 4.0, 6.0)


def test_default_shapes_and_shapes_as_text():
    assert set(SHAPES) == set(MODELS)
    assert [str(shape) for shape in SHAPES["pi05"]] == ["3/200/50/10", "2/21/10/10"]
    assert BenchShape.parse("2/20/16/4") == SHAPES["gr00t_n15"][0]
    for wrong in ("2/20/16", "a/b/c/d", "2/20/16/0"):
        with pytest.raises(ConfigError, match="shape"):
            BenchShape.parse(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "pi0"}, "model is 'pi0'"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"precisions": ("w2a2",)}, "w2a2"),
        ({"samples": 0}, "samples must be"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda", "cpu_time": True}, "cpu_time says nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SHORT, **changes)


def test_the_command(tmp_path):
    arguments = ["bench", "compare", "--model", "pi05", "--size", "tiny", "--shape", "2/5/6/2", "--precision", "w4a4"]
    arguments += ["--warm-ups", "0", "--samples", "1", "--no-memory", "--plot", str(tmp_path / "p.png")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["rows"]) == 4
    assert (tmp_path / "p.png").is_file()
    assert "w4a4 engine / fp32 engine (bits)" in CliRunner().invoke(app, arguments).stdout
    assert CliRunner().invoke(app, [*arguments, "--device", "tpu"]).exit_code == 1

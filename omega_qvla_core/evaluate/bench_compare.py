"""Side by side in one run: the model's own code and the static engine, unquantized and quantized.

The gain of an engine (fusion, fixed buffers, one graph) shows between the eager and the engine row of the unquantized
model; the gain of fewer bits between engine rows. All rows are measured in turn, sample by sample, so that what the
machine does besides hits them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from omega_qvla_core.errors import ConfigError, EngineError
from omega_qvla_core.evaluate.bench_memory import check_fits, peak_bytes
from omega_qvla_core.evaluate.bench_model import StageTime
from omega_qvla_core.evaluate.bench_options import CompareOptions
from omega_qvla_core.evaluate.bench_peaks import Peaks, best_of, measure_peaks
from omega_qvla_core.evaluate.bench_rows import DTYPES, STAGES, Runner, build_model, build_runner, config_of
from omega_qvla_core.evaluate.bench_shapes import MODELS, SHAPES, BenchShape
from omega_qvla_core.evaluate.bench_work import work
from omega_qvla_core.runtime.cpu_buffers import count_operators

Progress = Callable[[int, int, str], None]

# Bytes per number of a weight; 4-bit weights carry a float16 scale per 64 or more columns, which is not counted.
_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "w8a8": 1.0, "w4a8": 0.5, "w4a4": 0.5, "w4a4_grouped": 0.5}


@dataclass(frozen=True)
class Row:
    """What was measured of one precision and runtime.

    Attributes:
        precision: Of the model.
        runtime: ``eager``, ``engine`` or ``compile``.
        stages: Stage -> time. Stages that a runtime does not take apart are missing.
        floor_ms: Stage -> shortest time by the roofline.
        operators: Operators per chunk, views included; or kernels of a captured graph.
        peak_bytes: Largest memory: of a process that runs this row alone (CPU), or allocated for the row (CUDA). None
            if it was not measured.
        difference: Largest difference of the actions from those of the eager row of the same precision.
        reason: Why there are no figures; None where there are.
    """

    precision: str
    runtime: str
    stages: dict[str, StageTime]
    floor_ms: dict[str, float]
    operators: int | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows of one run."""

    options: CompareOptions
    peaks: Peaks
    rows: tuple[Row, ...]

    def row(self, precision: str, runtime: str) -> Row | None:
        """A row that has figures."""
        return next(
            (one for one in self.rows if (one.precision, one.runtime) == (precision, runtime) and one.stages), None
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {**asdict(self), "torch": torch.__version__, "ratios": self.ratios()}

    def ratios(self) -> dict[str, float]:
        """What is gained: p50 of whole chunks, one row over the other; below 1 is faster."""
        plain = self.options.unquantized
        eager, fused = self.row(plain, "eager"), self.row(plain, "engine")
        found = {}
        if eager and fused:
            found[f"{plain} engine / {plain} eager (fusion)"] = _chunk(fused) / _chunk(eager)
        for precision in self.options.precisions:
            row = self.row(precision, "engine")
            if row and fused:
                found[f"{precision} engine / {plain} engine (bits)"] = _chunk(row) / _chunk(fused)
            if row and eager:
                found[f"{precision} engine / {plain} eager"] = _chunk(row) / _chunk(eager)
        return found


def compare(options: CompareOptions, progress: Progress | None = None) -> Comparison:
    """Run a comparison.

    Args:
        options: What to run.
        progress: Called with rounds finished, rounds in all and what is being done.

    Raises:
        ConfigError: The model does not fit into memory, or the shape does not fit the model.
    """
    tell = progress or (lambda done, total, note: None)
    if options.threads and options.device == "cpu":
        torch.set_num_threads(options.threads)
    config = config_of(options.model, options.size, options.shape)
    check_fits(config, options)
    device = torch.device(options.device)
    peaks = measure_peaks(device, DTYPES[options.unquantized])
    rows, runners = [], []
    for precision, runtimes in _plan(options):
        tell(0, options.samples, f"building {precision}")
        for row, runner in _build(options, precision, runtimes):
            rows.append(row)
            runners.append(runner)
    times = _measure([one for one in runners if one is not None], options, tell)
    peaks = best_of(peaks, measure_peaks(device, DTYPES[options.unquantized]))
    stages = iter(times)
    floors = {precision: _floors(config, options, peaks, precision) for precision, _ in _plan(options)}
    filled = tuple(
        row if runner is None else replace(row, stages=next(stages), floor_ms=floors[row.precision])
        for row, runner in zip(rows, runners)
    )
    if options.memory and options.device == "cpu":
        filled = tuple(_with_memory(row, options, tell) for row in filled)
    return Comparison(options, peaks, filled)


def _plan(options: CompareOptions) -> list[tuple[str, tuple[str, ...]]]:
    plain = ("eager", "engine", "compile") if options.compiled else ("eager", "engine")
    return [(options.unquantized, plain), *((one, ("eager", "engine")) for one in options.precisions)]


def _build(options: CompareOptions, precision: str, runtimes: tuple[str, ...]) -> list[tuple[Row, Runner | None]]:
    before = _allocated(options)
    model = build_model(options.model, options.size, options.shape, precision, options.device)
    built: list[tuple[Row, Runner | None]] = []
    expected = None
    for runtime in runtimes:
        try:
            runner = build_runner(runtime, model, options.shape, options.device)
        except EngineError as error:
            built.append((Row(precision, runtime, {}, {}, reason=str(error)), None))
            continue
        actions = runner.actions().float().cpu()
        expected = actions if expected is None else expected
        peak = None if before is None else torch.cuda.max_memory_allocated() - before
        difference = float((actions - expected).abs().max())
        built.append((Row(precision, runtime, {}, {}, _operators(runner, runtime), peak, difference), runner))
    return built


def _operators(runner: Runner, runtime: str) -> int | None:
    engine = getattr(runner, "engine", None)
    if engine is not None:
        return engine.launches(runner.shape)
    return count_operators(runner.actions) if runtime == "eager" else None


def _allocated(options: CompareOptions) -> int | None:
    if options.device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _measure(runners: list[Runner], options: CompareOptions, tell: Progress) -> list[dict[str, StageTime]]:
    """Every stage of every runner once per round."""
    calls = [runner.stages() for runner in runners]
    times: list[dict[str, list[float]]] = [{stage: [] for stage in STAGES if stage in one} for one in calls]
    total = options.warm_ups + options.samples
    cuda = options.device != "cpu"
    clock = time.process_time if options.cpu_time else time.perf_counter
    for index in range(total):
        for one, kept in zip(calls, times):
            for stage, values in kept.items():
                elapsed_s = _timed_s(one[stage], cuda, clock)
                if index >= options.warm_ups:
                    values.append(elapsed_s * 1e3)
        tell(index + 1, total, "measuring")
    return [{stage: _percentiles(values) for stage, values in kept.items()} for kept in times]


def _timed_s(call: Callable[[], object], cuda: bool, clock: Callable[[], float]) -> float:
    if cuda:
        torch.cuda.synchronize()
    started_s = clock()
    call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - started_s


def _percentiles(values: list[float]) -> StageTime:
    p50, p95 = np.percentile(values, (50, 95))
    return StageTime(float(p50), float(p95))


def _floors(config: Any, options: CompareOptions, peaks: Peaks, precision: str) -> dict[str, float]:
    plain_bytes = _WEIGHT_BYTES[options.unquantized]
    peak = peaks.plain if precision == options.unquantized else peaks.integer
    floors = {
        stage: 1e3 * one.floor_s(peak, peaks.plain, peaks.bandwidth, _WEIGHT_BYTES[precision], plain_bytes)
        for stage, one in work(config, options.shape).items()
    }
    return {**floors, "chunk": sum(floors.values())}


def _with_memory(row: Row, options: CompareOptions, tell: Progress) -> Row:
    if not row.stages:
        return row
    tell(
        options.warm_ups + options.samples,
        options.warm_ups + options.samples,
        f"memory of {row.precision} {row.runtime}",
    )
    return replace(row, peak_bytes=peak_bytes(options, row.precision, row.runtime))


def _chunk(row: Row) -> float:
    return row.stages["chunk"].p50_ms


def default_shape(model: str) -> BenchShape:
    """The first shape of a model.

    Raises:
        ConfigError: There is no such model.
    """
    if model not in SHAPES:
        raise ConfigError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
    return SHAPES[model][0]

"""``omega-qvla bench``: how long things take on this machine."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from omega_qvla_core.commands.console import console, progress_bar, user_errors

if TYPE_CHECKING:
    from omega_qvla_core.evaluate.bench_model import BenchResult, Saving

app = typer.Typer(no_args_is_help=True, help="Times and memory on this machine.")


@app.callback()
def _group() -> None:
    """Times and memory on this machine."""


@app.command()
def model(
    family: Annotated[str, typer.Option(help="pi05 or gr00t_n15.")] = "pi05",
    size: Annotated[str, typer.Option(help="tiny, mid or full.")] = "mid",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=0, help="Denoise steps; 0: 10 for pi05, 4 for gr00t_n15.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 10,
    cameras: Annotated[int, typer.Option(min=1, max=3, help="Cameras that are there, of three.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are no padding.")] = 20,
    padded_tokens: Annotated[int, typer.Option(min=1, help="Length of the padded prompt.")] = 200,
    saving: Annotated[bool, typer.Option(help="Also time it with absent cameras and padding computed.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Vision, prefix, one denoise step, whole chunk: p50, p95 and peak memory, with random weights."""
    from omega_qvla_core.checkpoints.strict_loading import compute_dtype
    from omega_qvla_core.evaluate import bench_model as measure
    from omega_qvla_core.evaluate.bench_presets import preset, random_model

    with user_errors():
        options = measure.BenchOptions(
            device=device,
            dtype=compute_dtype(dtype),
            batch=batch,
            num_steps=steps or (10 if family == "pi05" else 4),
            repeats=repeats,
            present_cameras=cameras,
            prompt_tokens=prompt_tokens,
            padded_tokens=padded_tokens,
        )
        network = random_model(preset(family, size), device, options.dtype)
        # With --json nothing but JSON goes to the standard output.
        with nullcontext() if as_json else progress_bar("bench") as bar:
            update = None if bar is None else bar.update
            if saving:
                found = measure.measure_saving(network, options, update)
            else:
                found = measure.bench(network, options, update)[0]
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    elif saving:
        _print_saving(found)
    else:
        _print(found)


@app.command()
def compare(
    name: Annotated[str, typer.Option("--model", help="tabletop, pi05 or gr00t_n15.")] = "tabletop",
    size: Annotated[str, typer.Option(help="tiny, mid or full; the tabletop policy has one size.")] = "mid",
    shape: Annotated[str, typer.Option(help="cameras/text/chunk/steps; empty for the model's first.")] = "",
    precision: Annotated[
        list[str], typer.Option(help="w8a8, w4a8, w4a4, w4a4_grouped; may be given several times.")
    ] = ("w8a8", "w4a8", "w4a4"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch on a CPU; 0: as it finds best.")] = 0,
    warm_ups: Annotated[int, typer.Option(min=0)] = 20,
    samples: Annotated[int, typer.Option(min=1)] = 100,
    compiled: Annotated[bool, typer.Option("--compile", help="Add a row for torch.compile.")] = False,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Processor time, not wall time (CPU).")] = False,
    memory: Annotated[bool, typer.Option(help="Measure each row's peak memory in a process of its own (CPU).")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Eager and static engine, unquantized and quantized, measured in turn in one run."""
    from omega_qvla_core.evaluate import bench_compare, bench_plot, bench_text
    from omega_qvla_core.evaluate.bench_options import CompareOptions
    from omega_qvla_core.evaluate.bench_shapes import BenchShape

    with user_errors():
        options = CompareOptions(
            model=name,
            shape=BenchShape.parse(shape) if shape else bench_compare.default_shape(name),
            size=size,
            precisions=tuple(precision),
            device=device,
            threads=threads,
            warm_ups=warm_ups,
            samples=samples,
            compiled=compiled,
            cpu_time=cpu_time,
            memory=memory,
        )
        with nullcontext() if as_json else progress_bar("bench") as bar:
            found = bench_compare.compare(options, None if bar is None else bar.update)
        if plot is not None:
            bench_plot.draw(found, plot)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    # Wider than most terminals, and copied into documents: not a table that is fitted to the terminal.
    typer.echo(bench_text.text(found))


def _print(result: BenchResult) -> None:
    table = Table("stage", "p50 ms", "p95 ms", title=_title(result))
    for stage, one in result.stages.items():
        table.add_row(stage, f"{one.p50_ms:.2f}", f"{one.p95_ms:.2f}")
    console.print(table)


def _print_saving(found: Saving) -> None:
    table = Table(
        "stage", "p50 ms", "p95 ms", "p50 ms, nothing dropped", "ratio", "expected", title=_title(found.dropped)
    )
    for stage, one in found.dropped.stages.items():
        expected = f"{found.expected[stage]:.2f}" if stage in found.expected else ""
        kept = found.kept.stages[stage].p50_ms
        table.add_row(
            stage, f"{one.p50_ms:.2f}", f"{one.p95_ms:.2f}", f"{kept:.2f}", f"{found.ratios[stage]:.2f}", expected
        )
    console.print(table)
    console.print(
        f"prefix: {found.dropped.prefix_tokens} tokens instead of {found.kept.prefix_tokens}; largest difference of "
        f"the actions {found.largest_difference:.1e}",
        highlight=False,
    )


def _title(result: BenchResult) -> str:
    return (
        f"{result.family}: {result.parameters / 1e6:.1f} M parameters, {result.weight_bytes / 1e6:.0f} MB of weights, "
        f"peak {result.peak_bytes / 1e6:.0f} MB"
    )

"""``omega-qvla large``: checkpoints that do not fit into memory, and what quantized models take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla_core.quant.memory_table import MemoryRow

app = typer.Typer(no_args_is_help=True, help="Quantize layer by layer from disk; memory figures of full-size models.")


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="Unquantized checkpoint folder, any layout.")],
    out: Annotated[Path, typer.Option(help="Folder of the pack; an interrupted run goes on from there.")],
    recipe: Annotated[str, typer.Option(help="Preset name, or a recipe file (.json).")] = "rtn",
    calibration: Annotated[
        Path | None, typer.Option(help="Observation file; needed by all recipes but rtn and rtn_whole.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where layers run and are quantized: cpu or cuda.")] = "cpu",
    robot: Annotated[str | None, typer.Option(help="Known robot setup, or a JSON file with one.")] = None,
) -> None:
    """Quantize one layer after the other; the model is never in memory as a whole."""
    from omega_qvla_core.quant.recipe import Recipe
    from omega_qvla_core.quant.streaming import quantize_checkpoint
    from omega_qvla_core.runtime.observation_file import load_observations

    with user_errors(), progress_bar(f"quantize {recipe}") as bar:
        seen = None if calibration is None else load_observations(calibration).observations
        result = quantize_checkpoint(
            checkpoint,
            Recipe.load(recipe),
            out,
            robot=robot,
            observations=seen,
            device=device,
            progress=bar.update,
        )
    console.print(
        f"pack: {result.pack} ({result.file_bytes / 1e6:.1f} MB); {result.units} units, {result.resumed} of them from "
        f"an earlier run; {result.seconds:.0f} s, peak {result.peak_bytes / 2**30:.2f} GiB",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def memory(
    packs: Annotated[list[str] | None, typer.Argument(help="Packs: folders or shipped names.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bytes of Pi 0.5 and GR00T N1.5 at full size, published and ours, and of packs on disk. Needs no weights."""
    from omega_qvla_core.quant.memory_table import full_size_rows, pack_rows

    with user_errors():
        rows = full_size_rows() + pack_rows(packs or [])
    if as_json:
        typer.echo(json.dumps([_json(row) for row in rows], indent=1))
        return
    table = Table("model", "counted", "how", "float16 MB", "stored MB", "saved", "file MB")
    for row in rows:
        size = "" if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f}"
        before, after = f"{row.bytes.fp16 / 1e6:.2f}", f"{row.bytes.stored / 1e6:.2f}"
        table.add_row(row.model, row.scope, row.recipe, before, after, f"{row.bytes.saved:.2%}", size)
    console.print(table)


@app.command()
def time(
    model: Annotated[str, typer.Argument(help="pi05 or gr00t, at full size.")] = "pi05",
    recipe: Annotated[str, typer.Option(help="Preset name, or a recipe file (.json).")] = "executable_w4a4",
    only: Annotated[str, typer.Option(help="Sites whose name contains this.")] = "",
    tokens: Annotated[int, typer.Option(min=256, help="Calibration tokens of a site.")] = 1024,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time and peak memory to quantize one site of every size (O outputs, I inputs), on random weights and tokens."""
    from omega_qvla_core.evaluate.bench_sites import measure_sites, site_sizes
    from omega_qvla_core.quant.recipe import Recipe

    table = Table("side", "site", "O x I", "sites", "CPU s", "wall s", "GiB", "all, CPU min")
    with user_errors(), progress_bar(f"time {model}") as bar:
        sizes = [size for size in site_sizes(model, Recipe.load(recipe)) if only in size.name]
        if not sizes:
            raise ConfigError(f"no site of {model} has {only!r} in its name; leave --only out to see them")
        for size, cost in measure_sites(sizes, tokens, threads, device, bar.update):
            row = (size.side, ".".join(size.name.split(".")[-2:]), f"{size.outputs}x{size.columns}", str(size.count))
            peak, total = f"{cost.peak_bytes / 2**30:.1f}", f"{cost.cpu_s * size.count / 60:.1f}"
            table.add_row(*row, f"{cost.cpu_s:.1f}", f"{cost.wall_s:.1f}", peak, total)
    console.print(table)


@app.command(name="random")
def random_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a full-size Pi 0.5 with random weights (6.7 GB, bfloat16), to try this machine with."""
    from omega_qvla_core.quant.memory_table import full_size_pi05
    from omega_qvla_core.runtime.random_checkpoint import write_random_checkpoint

    with user_errors(), progress_bar("write") as bar:
        path = write_random_checkpoint(folder, full_size_pi05(), seed, bar.update)
    console.print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


def _json(row: MemoryRow) -> dict[str, Any]:
    return {
        "model": row.model,
        "scope": row.scope,
        "recipe": row.recipe,
        "fp16_bytes": row.bytes.fp16,
        "stored_bytes": row.bytes.stored,
        "saved": row.bytes.saved,
        "file_bytes": row.file_bytes,
    }

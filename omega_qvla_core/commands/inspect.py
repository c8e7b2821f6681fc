"""``omega-qvla inspect``: what a checkpoint holds, and what it would take when quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omega_qvla_core.commands.console import console, user_errors

if TYPE_CHECKING:
    from omega_qvla_core.checkpoints.inspection import Inspection, ScopedLinear
    from omega_qvla_core.quant.recipe import Recipe

_HALF_BYTES = 2
_SHARED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
_DIT_LINEAR = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_(q|k|v)$")


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or pack folder, or a shipped name.")],
    robot: Annotated[str | None, typer.Option(help="Known robot setup, or a JSON file with one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Family, layout, parameters and bytes per part, linears in scope, predicted bytes per recipe. Reads no weight."""
    from omega_qvla_core.checkpoints.folder import resolve_folder
    from omega_qvla_core.checkpoints.inspection import inspect_checkpoint

    with user_errors():
        found = inspect_checkpoint(resolve_folder(checkpoint), robot)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=1))
    else:
        _print(found)


def to_json(found: Inspection) -> dict[str, Any]:
    """The inspection with predicted bytes per recipe, as a JSON object."""
    from omega_qvla_core.quant.presets import PRESETS

    scope = {side: [one for one in found.linears if one.side == side] for side in ("language", "action_head")}
    return {
        "name": found.name,
        "family": found.family,
        "layout": found.layout,
        "files": dict(found.files),
        "parameters": found.parameters,
        "parts": {part: {"parameters": size.parameters, "bytes": size.bytes} for part, size in found.parts.items()},
        "in_scope": {
            "linears": len(found.linears),
            **{side: len(linears) for side, linears in scope.items()},
            "weights": sum(one.out_features * one.in_features for one in found.linears),
            "fp16_bytes": _fp16_bytes(found.linears),
        },
        "predicted_bytes": {
            name: predicted_bytes(found.linears, recipe, found.num_steps)
            for name, recipe in PRESETS.items()
            if found.linears
        },
        "cameras": list(found.cameras),
        "dimensions": dict(found.dimensions),
        "num_steps": found.num_steps,
        "notes": list(found.notes),
    }


def predicted_bytes(linears: Sequence[ScopedLinear], recipe: Recipe, num_steps: int) -> int:
    """Bytes of the in-scope linears when quantized: codes, scales and every table, as a pack stores them (METHOD A.11).

    Args:
        linears: In scope.
        recipe: Its overrides apply.
        num_steps: Denoise steps, for tables of the action head.
    """
    from omega_qvla_core.quant.memory import LinearSize, linears_bytes
    from omega_qvla_core.quant.scope import InputSite

    sizes = {one.name: LinearSize(one.out_features, one.in_features, one.bias) for one in linears}
    sites = [InputSite(name, group[0].side, tuple(one.name for one in group)) for name, group in _groups(linears)]
    return sum(sum(linears_bytes(site, sizes, recipe, num_steps)) for site in sites)


def _groups(linears: Iterable[ScopedLinear]) -> list[tuple[str, list[ScopedLinear]]]:
    """Linears that read the same input, by the name of that input."""
    found: dict[str, list[ScopedLinear]] = {}
    for linear in linears:
        found.setdefault(_input_name(linear.name), []).append(linear)
    return list(found.items())


def _input_name(name: str) -> str:
    parent, _, last = name.rpartition(".")
    if match := _DIT_LINEAR.search(name):
        # Even blocks attend to the features, from which only keys and values are made.
        crosses = int(match.group(1)) % 2 == 0
        return f"{parent}.{'kv' if crosses and match.group(2) != 'q' else 'q' if crosses else 'qkv'}"
    return f"{parent}.{_SHARED.get(last, last)}"


def _fp16_bytes(linears: Sequence[ScopedLinear]) -> int:
    return sum(one.out_features * one.in_features for one in linears) * _HALF_BYTES


def _print(found: Inspection) -> None:
    from rich.markup import escape
    from rich.table import Table

    data = to_json(found)
    size = sum(found.files.values())
    console.print(
        f"[bold]{escape(found.name)}[/bold]: {found.family}, layout {found.layout}, {found.parameters / 1e6:.1f} M "
        f"parameters, {size / 1e6:.1f} MB in {len(found.files)} file(s)",
        highlight=False,
    )
    parts = Table("part", "parameters", "bytes")
    for part, one in found.parts.items():
        parts.add_row(part, f"{one.parameters:,}", f"{one.bytes:,}")
    console.print(parts)
    if found.linears:
        scope = data["in_scope"]
        recipes = Table("recipe", "in-scope bytes", "saved", title=f"{scope['linears']} linears in scope")
        for name, value in data["predicted_bytes"].items():
            saved = round(1 - value / max(1, scope["fp16_bytes"]), 3) + 0.0
            recipes.add_row(name, f"{value:,}", f"{saved:.1%}")
        console.print(recipes)
    console.print(f"cameras: {escape(', '.join(found.cameras)) or 'not in the files'}", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in found.dimensions.items()), highlight=False)
    console.print(f"denoise steps: {found.num_steps}", highlight=False)
    for note in found.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)

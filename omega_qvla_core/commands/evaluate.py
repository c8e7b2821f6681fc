"""``omega-qvla eval``: success of a policy and of its quantized versions, on the same seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors
from omega_qvla_core.commands.quantize import SHIPPED_CALIBRATION, quantize_to_pack

app = typer.Typer(no_args_is_help=True, help="Closed-loop success in simulation.")

UNQUANTIZED = "unquantized"
README_ROWS = (
    UNQUANTIZED,
    "rtn_static_absmax",
    "rtn_static_absmax_hadamard",
    "static_clip",
    "static_clip_hadamard",
    "paper_w4a4",
    "executable_w4a4",
)
"""Rows of the README's table: the policy itself, then recipes from naive to ours."""
ACTION_ERROR_OBSERVATIONS = 64


@app.callback()
def _group() -> None:
    """Closed-loop success in simulation."""


@app.command()
def tabletop(
    out: Annotated[Path, typer.Option(help="Folder of results and packs; finished episodes are not run again.")],
    checkpoint: Annotated[str, typer.Option(help="Unquantized policy: folder or shipped name.")] = "tabletop",
    rows: Annotated[str, typer.Option(help="Recipes to compare, separated by commas.")] = ",".join(README_ROWS),
    seeds: Annotated[int, typer.Option(min=1, help="Fresh seeds per task kind and row.")] = 300,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    calibration: Annotated[Path, typer.Option(help="Calibration observations.")] = SHIPPED_CALIBRATION,
    execute_steps: Annotated[int, typer.Option(min=1, help="Steps executed per chunk.")] = 4,
    development: Annotated[bool, typer.Option(help="Use validation seeds: for looking while developing.")] = False,
) -> None:
    """Success by task and stage, wrong-colour picks, action error and bytes of every row; writes table.md."""
    from omega_qvla_core.envs.tabletop import KINDS
    from omega_qvla_core.envs.tabletop.seeds import EVALUATION, VALIDATION
    from omega_qvla_core.evaluate.parallel import run_rows
    from omega_qvla_core.evaluate.table import markdown_table, stage_table, summarise

    names = [name.strip() for name in rows.split(",") if name.strip()]
    with user_errors():
        folders = _policies(names, checkpoint, calibration, out / "packs", execute_steps)
        chosen = (VALIDATION if development else EVALUATION)[:seeds]
        with progress_bar("episodes") as bar:
            results = run_rows(
                folders,
                KINDS,
                chosen,
                out / "results.jsonl",
                processes=processes,
                execute_steps=execute_steps,
                progress=lambda done, total, last: bar.update(done, total, "" if last is None else last.row),
            )
        summaries = summarise(results)
        extra = _weights_and_error(folders, calibration) if len(folders) > 1 else {}
    text = "\n\n".join([markdown_table(summaries, extra), stage_table(summaries)]) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


SOURCE_FILE = "made_from.txt"


def _policies(names: Sequence[str], checkpoint: str, calibration: Path, packs: Path, execute_steps: int) -> list:
    """Quantize what is not there yet; a pack that was made from something else is refused."""
    from omega_qvla_core.checkpoints.folder import resolve_folder
    from omega_qvla_core.errors import ConfigError
    from omega_qvla_core.evaluate.fingerprint import fingerprint
    from omega_qvla_core.evaluate.parallel import Row, row_source
    from omega_qvla_core.quant import Recipe

    checkpoint_files = sorted(path for path in resolve_folder(checkpoint).iterdir() if path.is_file())
    rows = []
    for name in names:
        folder = packs / name
        if name == UNQUANTIZED:
            rows.append(Row(name, checkpoint, row_source(checkpoint, execute_steps)))
            continue
        made_from = fingerprint(*checkpoint_files, calibration, json.dumps(Recipe.load(name).to_json(), sort_keys=True))
        if not folder.exists():
            quantize_to_pack(checkpoint, name, calibration, folder)
            (folder / SOURCE_FILE).write_text(made_from, encoding="utf-8")
        elif (folder / SOURCE_FILE).read_text(encoding="utf-8") != made_from:
            raise ConfigError(f"{folder} was made from another checkpoint, calibration or recipe; give another --out")
        rows.append(Row(name, str(folder), row_source(str(folder), execute_steps)))
    return rows


def _weights_and_error(rows: Sequence, calibration: Path) -> dict[str, dict[str, str]]:
    """Columns: bytes of the in-scope weights, relative action error against the first row under equal noise."""
    from omega_qvla_core.evaluate.action_error import action_error
    from omega_qvla_core.quant.report import in_scope_bytes
    from omega_qvla_core.runtime import Policy
    from omega_qvla_core.runtime.observation_file import load_observations

    observations = load_observations(calibration).observations[:ACTION_ERROR_OBSERVATIONS]
    policies = {row.name: Policy.load(row.policy) for row in rows}
    reference = policies[rows[0].name]
    return {
        "in-scope weights": {name: f"{in_scope_bytes(policy) / 1e3:.0f} kB" for name, policy in policies.items()},
        "action error": {
            name: f"{action_error(policy, reference, observations):.3f}"
            for name, policy in policies.items()
            if policy is not reference
        },
    }

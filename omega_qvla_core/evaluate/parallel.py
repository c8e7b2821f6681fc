"""Many rollouts over many processes, resumable: every finished episode is one line of a results file."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from omega_qvla_core.checkpoints.folder import resolve_folder
from omega_qvla_core.envs.tabletop import TabletopEnv
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.fingerprint import fingerprint
from omega_qvla_core.evaluate.rollout import DEFAULT_EXECUTE_STEPS, RENDER_PX, EpisodeResult, run_episode, task_of_seed
from omega_qvla_core.runtime import Policy


@dataclass(frozen=True)
class Row:
    """One row of a results table.

    Attributes:
        name: Name of the row.
        policy: Folder of the policy to run, or a shipped name.
        source: Fingerprint of what decides its results (``row_source``), so that results of other weights or settings
            are never taken for these.
    """

    name: str
    policy: str
    source: str


def row_source(policy: str, execute_steps: int) -> str:
    """Fingerprint of a policy folder's files and of the rollout's settings."""
    files = sorted(path for path in resolve_folder(policy).iterdir() if path.suffix in {".json", ".safetensors"})
    return fingerprint(*files, f"execute_steps {execute_steps}, noise scheme 1, {RENDER_PX} px")


@dataclass(frozen=True)
class _Job:
    row: Row
    kind: str
    seed: int
    execute_steps: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.row.name, self.kind, self.seed)


class _Worker:
    """State of one worker process: one environment (one GL context) and the policies it has met."""

    env: ClassVar[TabletopEnv | None] = None
    policies: ClassVar[dict[str, Policy]] = {}


def _initialise_worker() -> None:
    # One thread per process: two processes of one thread beat one process of two on these small matrices.
    torch.set_num_threads(1)
    _Worker.env = TabletopEnv(image_size=RENDER_PX)


def _run(job: _Job) -> EpisodeResult:
    policy = _Worker.policies.get(job.row.policy)
    if policy is None:
        policy = _Worker.policies.setdefault(job.row.policy, Policy.load(job.row.policy))
    assert _Worker.env is not None, "worker was not initialised"
    task = task_of_seed(job.kind, job.seed)
    return run_episode(
        policy,
        _Worker.env,
        job.seed,
        task,
        row=job.row.name,
        source=job.row.source,
        execute_steps=job.execute_steps,
    )


def read_results(path: Path) -> list[EpisodeResult]:
    """Read a results file; a torn last line (an interrupted write) is ignored, any other bad line is an error."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    results = []
    for number, line in enumerate(lines):
        try:
            results.append(EpisodeResult(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) - 1:
                break
            raise ConfigError(f"{path}:{number + 1} is not an episode result ({error}); move the file away") from error
    return results


def _check_sources(rows: Sequence[Row], known: Iterable[EpisodeResult], path: Path) -> None:
    wanted = {row.name: row.source for row in rows}
    for result in known:
        if wanted.get(result.row, result.source) != result.source:
            raise ConfigError(
                f"{path} holds results of row {result.row!r} with other weights or settings than asked for now; "
                "give another folder, or move the file away"
            )


def _write_results(path: Path, results: Iterable[EpisodeResult]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(result.to_json()) + "\n" for result in results), encoding="utf-8")


def run_rows(
    rows: Sequence[Row],
    kinds: Sequence[str],
    seeds: Sequence[int],
    results_file: Path,
    *,
    processes: int,
    execute_steps: int = DEFAULT_EXECUTE_STEPS,
    progress: Callable[[int, int, EpisodeResult | None], None] | None = None,
) -> list[EpisodeResult]:
    """Run every row on every kind and seed; what ``results_file`` already holds is not run again.

    Args:
        rows: Policies to compare, all on the same seeds with the same noise, so that they are paired.
        kinds: Task kinds.
        seeds: Episode seeds, used for every kind.
        results_file: JSON lines; appended to as episodes end.
        processes: Worker processes, one torch thread each.
        execute_steps: Steps of each chunk that are executed before the next inference.
        progress: Called with (done, total, last result).

    Returns:
        The results of the asked rows, kinds and seeds, whatever else the file holds.

    Raises:
        ConfigError: The file holds results of a row with other weights or settings.
    """
    wanted = [_Job(row, kind, seed, execute_steps) for row in rows for kind in kinds for seed in seeds]
    known = {(r.row, r.kind, r.seed): r for r in read_results(results_file)}
    _check_sources(rows, known.values(), results_file)
    _write_results(results_file, known.values())
    missing = [job for job in wanted if job.key not in known]
    done = len(wanted) - len(missing)
    if progress is not None:
        progress(done, len(wanted), None)
    if missing:
        context = multiprocessing.get_context("spawn")
        with (
            context.Pool(min(processes, len(missing)), initializer=_initialise_worker) as pool,
            results_file.open("a", encoding="utf-8") as file,
        ):
            for result in pool.imap_unordered(_run, missing):
                known[(result.row, result.kind, result.seed)] = result
                file.write(json.dumps(result.to_json()) + "\n")
                file.flush()
                done += 1
                if progress is not None:
                    progress(done, len(wanted), result)
    return [known[job.key] for job in wanted]

"""Demonstrations of the scripted expert: recorded with disturbances, stored in shards of safetensors.

The executed command is disturbed, the stored action is the expert's clean answer to the state that the disturbance has
led to (DART: Laskey et al., "DART: Noise Injection for Robust Imitation Learning", 2017). So the data shows how to
come back, which undisturbed demonstrations never do.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from omega_qvla_core.envs.tabletop.disturbance import Disturbance
from omega_qvla_core.envs.tabletop.env import TabletopEnv
from omega_qvla_core.envs.tabletop.expert import Expert
from omega_qvla_core.envs.tabletop.privileged import PrivilegedState, yaw_of
from omega_qvla_core.envs.tabletop.scene import CAMERAS, CONTROL_HZ, JOINT_NAMES
from omega_qvla_core.envs.tabletop.seeds import DEMONSTRATIONS
from omega_qvla_core.envs.tabletop.tasks import TASKS, Task
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.images import resize_area
from omega_qvla_core.whole_file import write_whole

_LOG = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Changes whenever a stored array, or the scene or the expert behind it, changes its meaning."""

RENDER_PX = 128
"""Rendered image size."""

STORED_PX = 64
"""Stored image size: the rendered image, averaged over 2 x 2 pixels."""

SHARD_SEEDS = 25
"""Seeds per shard."""

# Steps kept after success, so that a policy learns to come to rest.
_TAIL_STEPS = 7

# A disturbed episode may take longer than the evaluation's cut-off.
_CUT_OFF_FACTOR = 1.5


@dataclass(frozen=True)
class Episode:
    """One recorded episode of ``T`` control periods.

    Attributes:
        seed: Its seed.
        task: What was asked.
        instruction: In which words.
        success: The task was done.
        steps: Arrays with one row per control period, the state being the one BEFORE the action:
            ``front``, ``wrist``: uint8 ``[T, 64, 64, 3]``;
            ``state``: float32 ``[T, 7]``, measured joints;
            ``action``: float32 ``[T, 7]``, the expert's clean target;
            ``executed``: float32 ``[T, 7]``, the disturbed target that was sent;
            ``burst``: bool ``[T]``, the executed target was led away on purpose: no observation to learn from, and no
            chunk of targets should reach across it;
            ``after_success``: bool ``[T]``, recorded after the task was done;
            ``cube_position`` float32 ``[T, 3, 3]`` (red, green, blue), ``cube_yaw`` ``[T, 3]`` (modulo a quarter turn),
            ``plate_position`` ``[T, 3]``, ``tool_position`` ``[T, 3]``, ``tool_rotation`` ``[T, 3, 3]``: metres and
            rad, base frame;
            ``front_uv``, ``wrist_uv``: float32 ``[T, 4, 2]``, image coordinates (u right, v down, 0..1 inside) of the
            centres of the red, green and blue cube and the plate;
            ``front_inside``, ``wrist_inside``: bool ``[T, 4]``, the point lies inside the image;
            ``front_visible``, ``wrist_visible``: bool ``[T, 4]``, inside and nothing in front of it.
    """

    seed: int
    task: Task
    instruction: str
    success: bool
    steps: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.steps["action"])


class Recorder:
    """Records episodes. Holds one environment, hence one OpenGL context: use one per process.

    Args:
        images: Whether to render; without, the episode has no ``front`` and ``wrist``.
    """

    def __init__(self, images: bool = True) -> None:
        self._env = TabletopEnv(image_size=RENDER_PX)
        self._expert = Expert()
        self._images = images

    def record(self, seed: int, task: Task, noise: bool = True) -> Episode:
        """Records one episode.

        Args:
            seed: Fixes the scene, the wording and the disturbance.
            task: What to do.
            noise: Whether commands are disturbed.
        """
        env = self._env
        env.reset(seed, task)
        disturbance = Disturbance(seed, self._expert) if noise else None
        rows: dict[str, list[np.ndarray]] = {}
        tail, success = 0, False
        for _ in range(round(task.max_steps * _CUT_OFF_FACTOR)):
            state = env.privileged()
            action = self._expert.action(state, task)
            executed, burst = (action, False) if disturbance is None else disturbance.apply(state, action, tail > 0)
            row = {"state": state.joint_positions, "action": action, "executed": executed}
            row |= {"burst": np.bool_(burst), "after_success": np.bool_(success)} | self._labels(state)
            if self._images:
                row |= {name: resize_area(env.render(name), STORED_PX, STORED_PX) for name in CAMERAS}
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
            success = env.step(executed).success
            tail += success
            if tail > _TAIL_STEPS:
                break
        steps = {key: _compact(np.stack(values)) for key, values in rows.items()}
        return Episode(seed=seed, task=task, instruction=task.wording(seed), success=success, steps=steps)

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._env.close()

    def _labels(self, state: PrivilegedState) -> dict[str, np.ndarray]:
        labels = {
            "cube_position": state.cube_positions,
            "cube_yaw": np.array([yaw_of(rotation) for rotation in state.cube_rotations]),
            "plate_position": state.plate_position,
            "tool_position": state.tool_position,
            "tool_rotation": state.tool_rotation,
        }
        points = np.concatenate([state.cube_positions, state.plate_position[None]])
        for name in CAMERAS:
            uv, inside = state.cameras[name].project(points)
            labels[f"{name}_uv"] = uv
            labels[f"{name}_inside"] = inside
            labels[f"{name}_visible"] = inside & self._env.line_of_sight(name)
        return labels


def record_episode(seed: int, task: Task, noise: bool = True) -> Episode:
    """Records a single episode with an environment of its own; see ``Recorder.record``."""
    recorder = Recorder()
    try:
        return recorder.record(seed, task, noise)
    finally:
        recorder.close()


@dataclass(frozen=True)
class Summary:
    """What ``generate`` has made or found.

    Attributes:
        shards: Files in order of their seeds.
        attempted: Episodes tried.
        kept: Episodes that ended in success; only these are stored.
        steps: Control periods stored.
    """

    shards: tuple[Path, ...]
    attempted: int
    kept: int
    steps: int


def generate(
    out_dir: str | Path,
    episodes: int,
    processes: int = 1,
    seeds: range = DEMONSTRATIONS,
    progress: Callable[[int, int], None] | None = None,
    noise: bool = True,
    tasks: Sequence[Task] = TASKS,
) -> Summary:
    """Records demonstrations in parallel processes. Shards that are there already are kept, so it can be interrupted.

    A shard depends on its seeds only, not on the number of processes. Episode ``i`` has seed ``seeds[i]`` and task
    ``tasks[i % len(tasks)]``.

    Args:
        out_dir: Folder, made if missing.
        episodes: Number of episodes to try; those without success are left out.
        processes: Number of processes; with 1, this process does the work.
        seeds: Where the seeds come from, see ``seeds``.
        progress: Called with (episodes tried so far, episodes) after each shard, in this process.
        noise: Whether commands are disturbed.
        tasks: Tasks in rotation.

    Raises:
        ConfigError: Too few seeds, or the folder holds shards made with other settings.
    """
    if not 0 < episodes <= len(seeds):
        raise ConfigError(f"{episodes} episodes: choose between 1 and the {len(seeds)} seeds of this range")
    if processes < 1:
        raise ConfigError(f"{processes} processes: choose at least 1")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    jobs, found = [], {}
    for index, first in enumerate(range(0, episodes, SHARD_SEEDS)):
        chosen = tuple(range(first, min(first + SHARD_SEEDS, episodes)))
        job = _Job(
            path=folder / f"shard_{index:05d}.safetensors",
            seeds=tuple(seeds[i] for i in chosen),
            tasks=tuple(str(tasks[i % len(tasks)]) for i in chosen),
            noise=noise,
        )
        header = _finished(job)
        if header is None:
            jobs.append(job)
        else:
            found[job.path] = header
    done = episodes - sum(len(job.seeds) for job in jobs)
    if progress is not None:
        progress(done, episodes)
    for job, header in _run(jobs, processes):
        found[job.path] = header
        done += len(job.seeds)
        if progress is not None:
            progress(done, episodes)
    shards = tuple(sorted(found))
    return Summary(
        shards=shards,
        attempted=episodes,
        kept=sum(found[path]["kept"] for path in shards),
        steps=sum(found[path]["steps"] for path in shards),
    )


def load_shard(path: str | Path) -> list[Episode]:
    """Reads one shard back.

    Raises:
        ConfigError: The file is missing, truncated, or of another format version.
    """
    header = _read_header(Path(path))
    arrays = load_file(str(path))
    ends = arrays.pop("episode_end")
    episodes = []
    for number, end in enumerate(ends):
        start = 0 if number == 0 else ends[number - 1]
        episodes.append(
            Episode(
                seed=header["episode_seeds"][number],
                task=Task.parse(header["episode_tasks"][number]),
                instruction=header["instructions"][number],
                success=True,
                steps={key: array[start:end] for key, array in arrays.items()},
            )
        )
    return episodes


@dataclass(frozen=True)
class _Job:
    path: Path
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    noise: bool

    def settings(self) -> dict[str, object]:
        return {
            "format_version": FORMAT_VERSION,
            "seeds": list(self.seeds),
            "tasks": list(self.tasks),
            "noise": self.noise,
            "image_px": STORED_PX,
            "control_hz": CONTROL_HZ,
            "joint_names": list(JOINT_NAMES),
        }


# One recorder per process: opening an OpenGL context is slow, and several in one process can destroy each other.
_recorder: Recorder | None = None


def _make_shard(job: _Job) -> dict:
    global _recorder
    if _recorder is None:
        _recorder = Recorder()
    pairs = zip(job.seeds, job.tasks, strict=True)
    episodes = [_recorder.record(seed, Task.parse(task), job.noise) for seed, task in pairs]
    kept = [episode for episode in episodes if episode.success]
    for episode in episodes:
        if not episode.success:
            _LOG.info("seed %d, %s: no success, left out", episode.seed, episode.task)
    if not kept:
        raise ConfigError(
            f"no episode of seeds {job.seeds[0]} to {job.seeds[-1]} succeeded; the expert cannot do these"
        )
    arrays = {key: np.concatenate([episode.steps[key] for episode in kept]) for key in kept[0].steps}
    arrays["episode_end"] = np.cumsum([len(episode) for episode in kept])
    header = job.settings() | {
        "kept": len(kept),
        "steps": int(arrays["episode_end"][-1]),
        "episode_seeds": [episode.seed for episode in kept],
        "episode_tasks": [str(episode.task) for episode in kept],
        "instructions": [episode.instruction for episode in kept],
    }
    write_whole(job.path, lambda partial: save_file(arrays, partial, metadata={"shard": json.dumps(header)}))
    return header


def _run(jobs: list[_Job], processes: int) -> Iterator[tuple[_Job, dict]]:
    if processes == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _make_shard(job)
        return
    # Spawned, not forked: a forked OpenGL context does not work.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(processes, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(_make_shard, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _read_header(path: Path) -> dict:
    try:
        with safe_open(str(path), framework="numpy") as shard:
            header = json.loads((shard.metadata() or {}).get("shard", "{}"))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"shard {path} cannot be read ({error}); delete it and generate again") from error
    if header.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"shard {path} has format version {header.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "generate into a new folder"
        )
    return header


def _finished(job: _Job) -> dict | None:
    """The header of a shard that is there already, or None.

    Raises:
        ConfigError: It is there but was made with other settings.
    """
    if not job.path.exists():
        return None
    header = _read_header(job.path)
    for key, value in job.settings().items():
        if header.get(key) != value:
            raise ConfigError(
                f"shard {job.path} was made with another '{key}' than asked for now; "
                "generate into a new folder or with the same settings"
            )
    return header


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array

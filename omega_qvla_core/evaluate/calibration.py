"""Calibration observations: recorded in the middle of rollouts, where the quantized policy will have to work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from omega_qvla_core.envs.tabletop import KINDS, TabletopEnv
from omega_qvla_core.evaluate.rollout import RENDER_PX, run_episode, task_of_seed
from omega_qvla_core.processing.images import resize_area
from omega_qvla_core.runtime import Observation, Policy
from omega_qvla_core.runtime.observation_file import save_observations


def record_calibration(
    policy: Policy,
    seeds: Sequence[int],
    path: Path,
    *,
    per_episode: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Run the policy and keep a few observations of every episode, spread evenly over its inferences.

    Images are stored at the size that the network sees, so that the file is small and processing leaves them as they
    are.

    Args:
        policy: The unquantized policy.
        seeds: Episode seeds; the task kind rotates with the position in the list.
        path: File to write.
        per_episode: Observations kept per episode.
        progress: Called with (episodes done, episodes).

    Returns:
        Number of observations written.
    """
    size = {camera.key: (camera.height, camera.width) for camera in policy.spec.cameras}
    env = TabletopEnv(image_size=RENDER_PX)
    observations: list[Observation] = []
    sources: list[str] = []
    for number, seed in enumerate(seeds):
        task = task_of_seed(KINDS[number % len(KINDS)], seed // len(KINDS))
        seen: list[tuple[int, Observation]] = []
        run_episode(policy, env, seed, task, on_observation=lambda step, o, seen=seen: seen.append((step, o)))
        count = min(per_episode, len(seen))
        for i in range(count):
            step, observation = seen[(2 * i + 1) * len(seen) // (2 * count)]
            small = {key: resize_area(image, *size[key]) for key, image in observation.images.items() if key in size}
            observations.append(replace(observation, images=small))
            sources.append(f"{task.kind}:{task.colour} seed {seed} step {step}")
        if progress is not None:
            progress(number + 1, len(seeds))
    env.close()
    save_observations(path, observations, sources)
    return len(observations)

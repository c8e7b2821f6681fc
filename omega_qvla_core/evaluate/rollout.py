"""Synchronous rollouts of a policy in the tabletop environment: the arm waits while the policy thinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from omega_qvla_core.envs.tabletop import CAMERAS, COLOURS, TabletopEnv, Task
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.runtime import Observation, Policy

DEFAULT_EXECUTE_STEPS = 4
"""Steps of a chunk that are executed before the next inference: 200 ms at 20 Hz."""
RENDER_PX = 128
"""Side of the rendered camera images; processing resizes them to what the network sees."""


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended.

    ``steps`` counts 50 ms control periods; ``source`` tells which weights and settings it was run with.
    """

    row: str
    kind: str
    colour: str
    seed: int
    wording: str
    success: bool
    stage: str
    wrong_colour: bool
    steps: int
    source: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for one line of a results file."""
        return asdict(self)


def task_of_seed(kind: str, seed: int) -> Task:
    """The task of an evaluation seed: colours rotate with the seed so that each is asked equally often."""
    return Task(kind=kind, colour=COLOURS[seed % len(COLOURS)])


def observe(env: TabletopEnv, instruction: str) -> Observation:
    """What the policy may see: camera images, joint positions, words."""
    images = {camera: env.render(camera) for camera in CAMERAS}
    return Observation(images=images, state=env.joint_positions(), instruction=instruction)


def run_episode(
    policy: Policy,
    env: TabletopEnv,
    seed: int,
    task: Task,
    *,
    row: str = "policy",
    source: str = "",
    execute_steps: int = DEFAULT_EXECUTE_STEPS,
    on_observation: Callable[[int, Observation], None] | None = None,
) -> EpisodeResult:
    """Run one episode until success or the task's cut-off.

    Args:
        policy: Gives absolute joint targets at the environment's control rate.
        env: Environment; it is reset here.
        seed: Fixes start poses and wording.
        task: What is asked.
        row: Label that goes into the result.
        source: Fingerprint of weights and settings that goes into the result.
        execute_steps: Steps of each chunk that are executed, 1 to the policy's horizon.
        on_observation: Called with the step index and the observation before each inference.

    Raises:
        ValueError: ``execute_steps`` is out of range.
    """
    if not 1 <= execute_steps <= policy.spec.horizon:
        raise ValueError(f"execute_steps {execute_steps} is not within 1..{policy.spec.horizon} (the chunk's horizon)")
    env.reset(seed, task)
    instruction = task.wording(seed)
    status, step = env.status(), 0
    while step < task.max_steps and not status.success:
        observation = observe(env, instruction)
        if on_observation is not None:
            on_observation(step, observation)
        chunk = policy.infer(observation, seed=inference_seed(seed, step // execute_steps))
        for action in chunk.actions[: min(execute_steps, task.max_steps - step)]:
            status = env.step(action)
            step += 1
            if status.success:
                break
    return EpisodeResult(
        row=row,
        kind=task.kind,
        colour=task.colour,
        seed=seed,
        wording=instruction,
        success=bool(status.success),
        stage=str(status.stage),
        wrong_colour=bool(status.wrong_colour),
        steps=step,
        source=source,
    )

"""Replaying a bag through a policy, without a robot: what would it have planned, and how far is that from the run?

The observations are those of ``playback``; the noise is the run's where a trace tells its seeds, else that of a fresh
run. Compared are the chunks of the trace, the commands in the bag, and another policy under equal noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from omega_qvla_core.errors import ConfigError, RecordingError
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.policy_types import ActionChunk, Observation, PolicySpec
from omega_qvla_ros.bags.command_track import CommandTrack, merged
from omega_qvla_ros.bags.playback import Moment, Playback, Progress
from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.trace import ChunkRecord, Trace

AGAINST_TRACE, AGAINST_COMMANDS, AGAINST_POLICY = "trace", "commands", "policy"


class ReplayPolicy(Protocol):
    """What a replay needs of ``omega_qvla_core.runtime.Policy``."""

    spec: PolicySpec

    def infer(self, observation: Observation, noise: np.ndarray | None = None, seed: int = 0) -> ActionChunk:
        """Plan one chunk."""


@dataclass(frozen=True)
class ReplayOptions:
    """When to plan.

    Attributes:
        rate_hz: Inferences per second of the bag where there is no trace; 0: one per execution horizon of the contract.
        max_inferences: End after so many.
        seed: Seed of the noise where there is no trace.
    """

    rate_hz: float = 0.0
    max_inferences: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate_hz < 0 or self.max_inferences < 1:
            raise ConfigError(f"rate {self.rate_hz} Hz and {self.max_inferences} inferences: both must be positive")


@dataclass(frozen=True)
class Replayed:
    """One inference of a replay. Arrays are in contract order, rad and m.

    Attributes:
        observation_ns: Newest stamp of the observation.
        instruction: What the arm was told.
        seed: Noise.
        targets: ``[steps, joints]`` position targets of the policy.
        other: The same of the other policy, None without one.
        traced: The same of the trace's chunk, None without one.
        commanded: ``[steps, joints]`` commands at the steps' times; NaN where nothing was commanded.
    """

    observation_ns: int
    instruction: str
    seed: int
    targets: np.ndarray
    other: np.ndarray | None
    traced: np.ndarray | None
    commanded: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Per joint, over all steps that could be compared: mean and largest absolute difference, and root mean square.

    ``count`` steps of at least one joint; a joint of which nothing is known has NaN.
    """

    count: int
    mean: np.ndarray
    rms: np.ndarray
    largest: np.ndarray


def replay(
    playback: Playback,
    policy: ReplayPolicy,
    options: ReplayOptions,
    other: ReplayPolicy | None = None,
    trace: Trace | None = None,
    progress: Progress | None = None,
) -> list[Replayed]:
    """Run a policy on a bag.

    Args:
        playback: Bag and contract, made with this policy's description.
        policy: What is replayed.
        options: When and with what noise.
        other: Another policy for the same robot, run on the same observations with the same noise.
        trace: Of the same run: gives the times, the measured joints and the noise of its inferences.
        progress: Called with (messages read, messages).

    Raises:
        ConfigError: The other policy is for another robot.
        RecordingError: The bag has no such moment.
    """
    _check_other(policy, other)
    commands = read_commands(playback)
    found: list[Replayed] = []
    for moment, record in _chosen(playback, policy, options, trace, progress):
        seed = inference_seed(options.seed, len(found)) if record is None else record.noise_seed
        observation = playback.observation(moment)
        chunk = policy.infer(observation, seed=seed)
        found.append(
            Replayed(
                observation_ns=moment.snapshot.stamp_ns,
                instruction=moment.instruction,
                seed=seed,
                targets=_targets(playback, chunk.actions, moment),
                other=None
                if other is None
                else _targets(playback, other.infer(observation, seed=seed).actions, moment),
                traced=None if record is None or not record.actions else _targets(playback, record.chunk(), moment),
                commanded=_commanded(commands, chunk, moment.snapshot.stamp_ns, len(playback.contract.joints)),
            )
        )
        if len(found) >= options.max_inferences:
            break
    if not found:
        raise RecordingError(
            f"{playback.bag.path} has no moment to plan at"
            + (f" that is in the trace {trace.path}; are they of the same run?" if trace is not None else "")
        )
    return found


def read_commands(playback: Playback) -> list[CommandTrack]:
    """The commands of a bag, one track per topic."""
    tracks = []
    for topic in playback.command_topics():
        tracks.append(CommandTrack(playback.contract.joint_names))
        for recorded in playback.bag.messages({topic}):
            tracks[-1].add(recorded)
    return tracks


def differences(found: Sequence[Replayed], steps: int) -> dict[str, Difference]:
    """Compare a replay with everything there is.

    Args:
        found: From ``replay``.
        steps: Steps of a chunk that are executed; commands are compared for those only.

    Returns:
        ``trace``, ``commands`` and ``policy``, each where there is something to compare.
    """
    pairs = {
        AGAINST_TRACE: [(one.targets, one.traced) for one in found if one.traced is not None],
        AGAINST_COMMANDS: [(one.targets[:steps], one.commanded[:steps]) for one in found],
        AGAINST_POLICY: [(one.targets, one.other) for one in found if one.other is not None],
    }
    return {name: made for name, both in pairs.items() if (made := _difference(both)) is not None}


def _difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Difference | None:
    if not pairs:
        return None
    gaps = np.abs(np.concatenate([ours - theirs for ours, theirs in pairs]))
    known = np.isfinite(gaps)
    counts = known.sum(axis=0)
    if not counts.any():
        return None
    gaps = np.where(known, gaps, 0.0)
    with np.errstate(invalid="ignore"):  # 0 of 0 is NaN: nothing is known of that joint
        mean, square = gaps.sum(axis=0) / counts, (gaps**2).sum(axis=0) / counts
    largest = np.where(counts > 0, gaps.max(axis=0), np.nan)
    return Difference(int(known.any(axis=1).sum()), mean, np.sqrt(square), largest)


def _chosen(
    playback: Playback, policy: ReplayPolicy, options: ReplayOptions, trace: Trace | None, progress: Progress | None
) -> Iterator[tuple[Moment, ChunkRecord | None]]:
    """The moments at which a policy plans: those of the trace, else at a steady rate."""
    if trace is not None:
        if trace.header.joints != playback.contract.joint_names:
            raise ConfigError(f"the trace {trace.path} is of another robot: its joints are {trace.header.joints}")
        records = {record.observation_ns: record for record in trace.records}
        for moment in playback.moments(progress):
            record = records.pop(moment.snapshot.stamp_ns, None)
            if record is not None:
                # The joint sample nearest to an image may have come a moment after the node planned.
                positions = np.array(record.positions)
                yield replace(moment, snapshot=replace(moment.snapshot, positions=positions)), record
        return
    steps = playback.contract.chunk.execution_horizon_steps
    period_ns = nanoseconds(1.0 / options.rate_hz if options.rate_hz else steps / policy.spec.control_hz)
    # A quarter of a step of slack, as the node's scheduler has: cameras do not tick exactly at the policy's rate.
    slack_ns = nanoseconds(0.25 / policy.spec.control_hz)
    next_ns = 0
    for moment in playback.moments(progress):
        if moment.snapshot.stamp_ns >= next_ns - slack_ns:
            next_ns = moment.snapshot.stamp_ns + period_ns
            yield moment, None


def _check_other(policy: ReplayPolicy, other: ReplayPolicy | None) -> None:
    if other is None:
        return
    ours, theirs = policy.spec, other.spec
    for name in ("action_names", "state_names", "horizon", "control_hz", "first_action_delay_s"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"{theirs.name!r} cannot be compared with {ours.name!r}: {name} is {getattr(theirs, name)}, not "
                f"{getattr(ours, name)}"
            )
    keys = [sorted(camera.key for camera in spec.cameras) for spec in (ours, theirs)]
    if keys[0] != keys[1]:
        raise ConfigError(f"{theirs.name!r} has the cameras {keys[1]}, {ours.name!r} has {keys[0]}")


def _targets(playback: Playback, actions: np.ndarray, moment: Moment) -> np.ndarray:
    return playback.binding.targets(actions, moment.snapshot.positions)


def _commanded(commands: Sequence[CommandTrack], chunk: ActionChunk, observation_ns: int, joints: int) -> np.ndarray:
    first_ns = observation_ns + nanoseconds(chunk.first_action_delay_s)
    times_ns = [first_ns + k * nanoseconds(chunk.period_s) for k in range(len(chunk.actions))]
    return np.array([merged(commands, time_ns, joints) for time_ns in times_ns])

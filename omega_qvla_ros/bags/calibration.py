"""Calibration observations from a bag: the plug-in that ``omega-qvla quantize --calibration BAG`` finds.

Declared in ``setup.py`` as entry point ``bag`` of the group ``omega_qvla.observation_sources``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omega_qvla_core.errors import ConfigError, RecordingError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.runtime.observation_file import ObservationSet
from omega_qvla_core.runtime.observation_sources import ObservationRequest
from omega_qvla_ros.bags.playback import Moment, Playback, PlaybackOptions, evenly
from omega_qvla_ros.bags.reader import Bag, is_bag
from omega_qvla_ros.contract import load_contract
from omega_qvla_ros.resources import resolve_contract

MAX_OBSERVATION_BYTES = 4 * 1024**3
"""Decoded images that are kept at once; a mistyped number must not fill the memory."""


@dataclass(frozen=True)
class BagSource:
    """Reads observations from ``ros2 bag`` recordings, MCAP and sqlite3."""

    def recognises(self, path: Path) -> bool:
        """A folder of a bag, or one of its files."""
        return is_bag(path)

    def load(self, path: Path, request: ObservationRequest) -> ObservationSet:
        """Observations of a bag, thinned out evenly, exactly as the policy node would have had them.

        Raises:
            ConfigError: No contract was given, or it does not fit the checkpoint, or too much is asked for.
            RecordingError: The bag is damaged, lacks a topic, or has no complete observation.
        """
        if not request.contract:
            raise ConfigError(
                f"{path} is a bag: --contract FILE says which of its topics are cameras and joints (or the name of a "
                "shipped robot, such as tabletop)"
            )
        contract = load_contract(resolve_contract(request.contract))
        options = PlaybackOptions(request.namespace, request.remaps, request.instruction)
        with Bag(path) as bag:
            playback = Playback(bag, contract, request.spec, options)
            chosen = _choose(playback, request)
            return _collect(playback, chosen, request)


def _choose(playback: Playback, request: ObservationRequest) -> Sequence[int]:
    """Numbers of the moments to keep. Going through the bag twice keeps one undecoded image per camera in memory."""
    count, largest = 0, 0
    for moment in playback.moments(_part(request, 0)):
        count += 1
        largest = max(largest, _decoded_bytes(moment))
    if not count:
        why = ", ".join(f"{kind} {number}" for kind, number in sorted(playback.refused.items()))
        raise RecordingError(
            f"{playback.bag.path} has no moment at which all cameras and joints of {playback.contract.name!r} were "
            f"fresh and fitted together; refused samples: {why or 'none'}. See timeouts and sync_tolerance_s of the "
            "contract"
        )
    candidates = range(0, count, request.every)
    chosen = [candidates[index] for index in evenly(len(candidates), request.max_observations)]
    needed = len(chosen) * largest
    if needed > MAX_OBSERVATION_BYTES:
        raise ConfigError(
            f"{len(chosen)} observations of {largest / 1e6:.1f} MB are {needed / 1e9:.1f} GB, more than "
            f"{MAX_OBSERVATION_BYTES / 1e9:.1f}; choose --max {MAX_OBSERVATION_BYTES // largest} or fewer"
        )
    return chosen


def _collect(playback: Playback, chosen: Sequence[int], request: ObservationRequest) -> ObservationSet:
    wanted = set(chosen)
    observations: list[Observation] = []
    sources: list[str] = []
    for number, moment in enumerate(playback.moments(_part(request, 1))):
        if number in wanted:
            observations.append(playback.observation(moment))
            sources.append(f"{playback.bag.path.name} {moment.snapshot.stamp_ns} ns")
            if len(observations) == len(wanted):
                break
    return ObservationSet(tuple(observations), tuple(sources))


def _decoded_bytes(moment: Moment) -> int:
    return sum(3 * int(image.height) * int(image.width) for image in moment.snapshot.images.values())


def _part(request: ObservationRequest, half: int):
    """Progress of one of two passes as progress of the whole."""
    report = request.progress
    return None if report is None else lambda done, total: report(half * total + done, 2 * total)


SOURCE = BagSource()
"""The object that the entry point names."""

"""Where calibration observations come from: our own observation files, and recordings that installed plug-ins read.

A plug-in is an entry point of the group ``omega_qvla.observation_sources`` that names an ``ObservationSource``. The ROS
package brings one for bags; the library knows nothing about ROS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

from omega_qvla_core.errors import ConfigError, ObservationError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_core.runtime.observation_file import ObservationSet, load_observations

GROUP = "omega_qvla.observation_sources"
OBSERVATION_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ObservationRequest:
    """What is wanted from a recording.

    Attributes:
        spec: The policy that the observations are for.
        contract: Robot contract, a file or the name of a shipped one; empty if none was given.
        every: Take every so many-th observation; 1 takes all.
        max_observations: More than these are thinned out evenly.
        instruction: What the arm is told; empty: as recorded.
        namespace: Namespace of the robot in the recording.
        remaps: Contract's topic -> recorded topic.
        progress: Called with (done, total).
    """

    spec: PolicySpec
    contract: str = ""
    every: int = 1
    max_observations: int = 128
    instruction: str = ""
    namespace: str = ""
    remaps: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.max_observations < 1:
            raise ConfigError(f"every is {self.every}, max is {self.max_observations}; both must be at least 1")


class ObservationSource(Protocol):
    """One kind of recording."""

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` is a recording of this kind."""

    def load(self, path: Path, request: ObservationRequest) -> ObservationSet:
        """Read observations; raises ``OmegaQVLAError`` for a recording that does not have what is wanted."""


def read_observations(path: Path, request: ObservationRequest) -> ObservationSet:
    """Observations from a file or a recording.

    Args:
        path: An observation file, or anything that a plug-in recognises.
        request: What is wanted of a recording. An observation file is taken as it is.

    Raises:
        ObservationError: Nothing reads ``path``; the message lists the plug-ins.
        ConfigError: A plug-in is installed but cannot be loaded; the message names what it lacks.
    """
    if path.suffix == OBSERVATION_SUFFIX and not path.is_dir():
        return load_observations(path)
    if not path.exists():
        raise ObservationError(f"{path} does not exist; give an observation file ({OBSERVATION_SUFFIX}) or a recording")
    found = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    for point in found:
        source = _load(point)
        if source.recognises(path):
            return source.load(path, request)
    names = ", ".join(point.name for point in found)
    raise ObservationError(
        f"{path} is not an observation file ({OBSERVATION_SUFFIX}), and "
        + (f"none of the installed readers of recordings takes it ({names})" if names else _NO_READER)
    )


def remaps_from(arguments: Sequence[str]) -> dict[str, str]:
    """``contract_topic:=recorded_topic`` arguments as a mapping.

    Raises:
        ConfigError: One has no ``:=`` in it.
    """
    remaps = {}
    for argument in arguments:
        name, found, target = argument.partition(":=")
        if not found or not name or not target:
            raise ConfigError(f"--remap {argument!r} must be CONTRACT_TOPIC:=RECORDED_TOPIC")
        remaps[name.strip("/")] = target
    return remaps


_NO_READER = (
    f"no reader of recordings is installed (entry points of the group {GROUP!r}): bags are read by the ROS package, "
    "install it with pip install 'omega_qvla_ros[tools]'"
)


def _load(point: EntryPoint) -> ObservationSource:
    try:
        return point.load()
    except ImportError as error:
        raise ConfigError(
            f"the reader {point.name!r} of recordings cannot be loaded: {error}; "
            "install what it needs with pip install 'omega_qvla_ros[tools]'"
        ) from error

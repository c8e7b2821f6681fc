"""A bag as the policy node would have seen it: the same buffer, decoding and joint order, message by message.

Messages pass through ``ObservationBuffer`` in the order in which they were recorded. Every image that completes a newer
set of samples gives a ``Moment``; its observation is decoded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omega_qvla_core.errors import RecordingError
from omega_qvla_core.policy_types import Observation, PolicySpec
from omega_qvla_ros.bags.reader import DRY_RUN, Bag, BagMessage, resolve_topic
from omega_qvla_ros.bags.topics import COMMAND_TYPE, IMAGE_TYPES, JOINT_STATE_TYPE, STATUS_TYPES, STRING_TYPE
from omega_qvla_ros.contract import (
    TRAJECTORY_OUTPUTS,
    CameraContract,
    PolicyBinding,
    RobotContract,
    check_policy,
)
from omega_qvla_ros.intake import Intake, stamp_ns, to_rgb
from omega_qvla_ros.notices import Notices
from omega_qvla_ros.observation import NotReady, ObservationBuffer, Snapshot
from omega_qvla_ros.splines import NS_PER_S

OTHER_CLOCK_NS = 10 * NS_PER_S
"""A recorder whose clock is further from the stamps than this had another clock: wall time beside simulated time."""
STATUS_NAMES = (": policy", ": status")
"""How the policy node names its reports, behind ``<namespace>/<node>``, on /diagnostics and on ~/status."""
PROGRESS_EVERY = 50
"""Messages between two reports of progress."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PlaybackOptions:
    """How a bag is matched with a contract.

    Attributes:
        namespace: Namespace of the robot in the bag.
        remaps: Contract's topic -> recorded topic.
        instruction: What the arm is told; empty: as recorded on ``~/instruction``, ``~/status`` or ``/diagnostics``,
            else the contract's default.
    """

    namespace: str = ""
    remaps: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""


@dataclass(frozen=True)
class Moment:
    """One consistent set of samples, at the image that completed it.

    Attributes:
        snapshot: Samples as the buffer gave them; images are undecoded messages.
        instruction: What the arm was told then.
        now_ns: Time of the node's clock at that moment.
    """

    snapshot: Snapshot
    instruction: str
    now_ns: int


class Playback:
    """One bag with one contract and one checkpoint.

    Args:
        bag: Open bag.
        contract: The robot that was recorded.
        spec: The checkpoint that is to see it.
        options: Names and instruction.

    Attributes:
        refused: Reason -> number of images and joint states that the node would have refused.

    Raises:
        ConfigError: Contract and checkpoint do not fit.
        RecordingError: A topic of the contract is not in the bag.
    """

    def __init__(
        self, bag: Bag, contract: RobotContract, spec: PolicySpec, options: PlaybackOptions | None = None
    ) -> None:
        self.bag = bag
        self.contract = contract
        self.binding: PolicyBinding = check_policy(contract, spec)
        self._options = options or PlaybackOptions()
        self._rules = {camera.key: camera for camera in contract.cameras}
        self._sizes = {camera.key: (camera.height, camera.width) for camera in spec.cameras}
        where = f"the contract {contract.name!r}"
        self._cameras: dict[str, CameraContract] = {}
        for camera in contract.cameras:
            msgtype = IMAGE_TYPES[camera.transport]
            self._cameras[self._resolve(camera.topic, msgtype, f"camera {camera.key!r} of {where}")] = camera
        # Several topics of the contract may have been recorded as one, by remapping.
        self._joint_topics: dict[str, list[str]] = {}
        for topic in contract.sensors.joint_topics:
            self._joint_topics.setdefault(self._resolve(topic, JOINT_STATE_TYPE, where), []).append(topic)
        self._told = self._instruction_topics()
        self.refused: dict[str, int] = {}

    def _resolve(self, topic: str, msgtype: str, where: str) -> str:
        return resolve_topic(self.bag, topic, msgtype, where, self._options.namespace, self._options.remaps)

    def command_topics(self) -> list[str]:
        """Recorded trajectories of the contract's outputs, where there are any; of a dry run only if nothing else."""
        names = [output.name for output in self.contract.outputs if output.type in TRAJECTORY_OUTPUTS]
        found = []
        for name in names:
            with suppress(RecordingError):
                found.append(self._resolve(name, COMMAND_TYPE, "the comparison"))
        dry = [topic for topic in self.bag.topics if DRY_RUN in topic and self.bag.topics[topic].count]
        return found or dry[:1]

    def _instruction_topics(self) -> dict[str, str]:
        """Topics that say what the arm is told, with their types."""
        if self._options.instruction:
            return {}
        prefix = f"/{self._options.namespace.strip('/')}/" if self._options.namespace.strip("/") else "/"
        found: dict[str, str] = {}
        for topic in self.bag.topics.values():
            own = topic.name.startswith(prefix) and topic.count
            if own and topic.msgtype == STRING_TYPE and topic.name.endswith("/instruction"):
                found[topic.name] = topic.msgtype
            if own and topic.msgtype == STATUS_TYPES[0] and topic.name.endswith("/status"):
                found[topic.name] = topic.msgtype
        if STATUS_TYPES[0] not in found.values():
            # Once a second, so up to a second late: only where the node's own status was not recorded.
            found |= {t.name: t.msgtype for t in self.bag.topics.values() if t.msgtype == STATUS_TYPES[1] and t.count}
        return found

    def moments(self, progress: Progress | None = None) -> Iterator[Moment]:
        """Every new consistent set of samples.

        Args:
            progress: Called with (messages read, messages in these topics).

        Raises:
            RecordingError: The bag is damaged, or nobody says what the arm was told.
        """
        buffer = ObservationBuffer(self.contract)
        intake = Intake(self.contract, self._sizes, buffer, Notices(), threaded=False)
        self.refused = {}
        told = _Told(self._options.instruction or self.contract.default_instruction, self._options.namespace)
        clock = _Clock()
        topics = {*self._cameras, *self._joint_topics, *self._told}
        total = self.bag.count(topics)
        newest_ns = -1
        for number, recorded in enumerate(self.bag.messages(topics), 1):
            if progress is not None and (number % PROGRESS_EVERY == 0 or number == total):
                progress(number, total)
            if recorded.topic in self._told:
                told.hear(recorded.message, self._told[recorded.topic])
                continue
            now_ns = clock.now_ns(recorded)
            if recorded.topic in self._joint_topics:
                for topic in self._joint_topics[recorded.topic]:
                    intake.on_joint_states(recorded.message, now_ns, topic)
                continue
            intake.on_image(self._cameras[recorded.topic].key, recorded.message, now_ns)
            if not told.instruction:
                continue
            snapshot = buffer.assemble(now_ns)
            if isinstance(snapshot, NotReady) or snapshot.stamp_ns <= newest_ns:
                continue
            newest_ns = snapshot.stamp_ns
            yield Moment(snapshot, told.instruction, now_ns)
        for kind, count in buffer.counters.items():
            self.refused[kind] = self.refused.get(kind, 0) + count
        if not told.instruction:
            raise RecordingError(
                f"{self.bag.path} does not say what the arm was told: no message on ~/instruction, ~/status or "
                "/diagnostics has it, and the contract has no default_instruction; give --instruction"
            )

    def observation(self, moment: Moment) -> Observation:
        """Decode a moment into what the policy gets."""
        images = {key: self._decode(key, sample) for key, sample in moment.snapshot.images.items()}
        return moment.snapshot.observation(images, moment.instruction, self.binding)

    def _decode(self, key: str, sample: Any) -> np.ndarray:
        """As the node, whose raw images go through cv_bridge where that gives the same pixels."""
        camera = self._rules[key]
        return to_rgb(sample, camera.topic, camera.resize, *self._sizes[key])


class _Clock:
    """The node's clock at a recorded message: the recorder's, unless that was another clock than the stamps'."""

    def __init__(self) -> None:
        self._stamps_only: bool | None = None
        self._newest_ns = 0

    def now_ns(self, recorded: BagMessage) -> int:
        header_ns = stamp_ns(recorded.message)
        if self._stamps_only is None and header_ns:
            self._stamps_only = abs(recorded.log_ns - header_ns) > OTHER_CLOCK_NS
        if not self._stamps_only:
            return recorded.log_ns
        self._newest_ns = max(self._newest_ns, header_ns)
        return self._newest_ns


class _Told:
    """The instruction in force. The newest of all topics counts."""

    def __init__(self, instruction: str, namespace: str) -> None:
        self.instruction = instruction
        self._prefix = f"{namespace.strip('/')}/" if namespace.strip("/") else ""

    def hear(self, message: Any, msgtype: str) -> None:
        if msgtype == STRING_TYPE:
            self._set(message.data)
        elif msgtype == STATUS_TYPES[0]:
            self._status(message)
        else:
            for status in message.status:
                self._status(status)

    def _status(self, status: Any) -> None:
        if status.name.endswith(STATUS_NAMES) and status.name.startswith(self._prefix):
            for pair in status.values:
                if pair.key == "instruction":
                    self._set(pair.value)

    def _set(self, instruction: str) -> None:
        if instruction.strip():
            self.instruction = instruction


def evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of ``wanted`` of ``count`` things, spread evenly over them; all if there are not more."""
    if count <= wanted:
        return np.arange(count)
    return (2 * np.arange(wanted) + 1) * count // (2 * wanted)

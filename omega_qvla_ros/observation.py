"""The latest samples of every stream, and one consistent observation from them, or the reason why there is none.

Samples are judged by their header stamp, in nanoseconds of the node's clock, which the caller passes in. Images are
kept as they came; decoding them is the inference thread's work.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from omega_qvla_core.policy_types import Observation
from omega_qvla_ros.contract import PolicyBinding, RobotContract
from omega_qvla_ros.splines import nanoseconds, seconds
from omega_qvla_ros.stream import Stream

IMAGE_HISTORY = 3
"""Images kept per camera: enough to pair two cameras that tick half a period apart."""
JOINT_HISTORY = 64
"""Joint samples kept, 0.64 s at 100 Hz: more than an image may be old."""

VELOCITY_SPAN_NS = 50_000_000
"""Span of the difference that is a joint's velocity: 1 mrad of noise is then 0.02 rad/s."""


class _Joints(NamedTuple):
    """Positions of all joints at the stamp of ``joint_states_topic``, and the stamp of the oldest among them."""

    stamp_ns: int
    positions: np.ndarray
    oldest_ns: int


_Sample = TypeVar("_Sample", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Snapshot:
    """One consistent set of samples.

    Attributes:
        images: Camera key -> sample as it was given to ``add_image``.
        positions: float64 ``[joints]`` in contract order.
        joints_ns: Stamp of the oldest position, whatever source it has.
        stamp_ns: Newest stamp in the set; the chunk's time line starts here.
        image_stamps_ns: Camera key -> stamp.
    """

    images: Mapping[str, Any]
    positions: np.ndarray
    joints_ns: int
    stamp_ns: int
    image_stamps_ns: Mapping[str, int]

    def observation(self, images: Mapping[str, np.ndarray], instruction: str, binding: PolicyBinding) -> Observation:
        """The policy's input, with the decoded images and the state in the checkpoint's order and units."""
        return Observation(images=images, state=binding.state(self.positions), instruction=instruction)


@dataclass(frozen=True)
class NotReady:
    """Why there is no observation. ``stream`` is a topic name; ``lacking`` are joints that never came."""

    stream: str
    reason: str
    lacking: tuple[str, ...] = ()


class ObservationBuffer:
    """Collects the streams of one robot. Methods may be called from several threads.

    Args:
        contract: Cameras, joints, timeouts and tolerances.
        stamp_source: ``header``: a sample is as old as its stamp says. ``receive``: it is as old as its arrival, for
            drivers whose clock cannot be synchronized; stamps then serve to find repeated and late samples only.
    """

    def __init__(self, contract: RobotContract, stamp_source: Literal["header", "receive"] = "header") -> None:
        sensors = contract.sensors
        self._by_receipt = stamp_source == "receive"
        self._image_timeout_s: float | None = None
        self._max_clock_skew_s = sensors.max_clock_skew_s
        self._joint_names = contract.joint_names
        self._joint_topic = sensors.joint_states_topic
        self._joint_index = joint_indices(contract)
        self.slow_joints = np.ones(len(self._joint_names), dtype=bool)
        """``[joints]``: those of other sources than ``joint_states_topic``, whose speed is not known."""
        self.slow_joints[list(self._joint_index[self._joint_topic].values())] = False
        self._joint_timeouts_ns = {source.topic: nanoseconds(source.timeout_s) for source in sensors.joint_sources}
        self._sync_ns = nanoseconds(sensors.sync_tolerance_s)
        self._max_future_ns = nanoseconds(sensors.max_future_stamp_s)
        self._keys = {camera.key: camera.topic for camera in contract.cameras}
        self._cameras = contract.cameras
        self._resume_after = sensors.resume_after_samples
        self._contract_joint_timeout_s = sensors.joint_states_timeout_s
        self._joint_timeouts_ns[self._joint_topic] = nanoseconds(sensors.joint_states_timeout_s)
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        self._not_before_ns = 0
        self._reset_streams()

    def _reset_streams(self) -> None:
        self._streams = {
            camera.key: Stream(camera.topic, self._image_timeout_ns(camera.timeout_s), self._resume_after)
            for camera in self._cameras
        }
        self._joint_streams = {
            topic: Stream(topic, self._joint_timeouts_ns[topic], self._resume_after) for topic in self._joint_index
        }
        self._headers: dict[str, tuple[int, int]] = {}
        self._images: dict[str, deque[tuple[int, Any]]] = {key: deque(maxlen=IMAGE_HISTORY) for key in self._keys}
        self._joints: deque[_Joints] = deque(maxlen=JOINT_HISTORY)
        self._joint_positions = np.full(len(self._joint_names), np.nan)
        self._joint_stamps = np.full(len(self._joint_names), -1, dtype=np.int64)

    def _image_timeout_ns(self, contract_s: float) -> int:
        limit_s = contract_s if self._image_timeout_s is None else min(contract_s, self._image_timeout_s)
        return nanoseconds(limit_s)

    def tighten(self, image_timeout_s: float | None, joint_states_timeout_s: float | None) -> None:
        """Shorter timeouts than the contract's, None for the contract's. A longer one has no effect.

        The joints' is that of ``joint_states_topic``; other sources of joints are slower by nature.
        """
        with self._lock:
            self._image_timeout_s = image_timeout_s
            for camera in self._cameras:
                self._streams[camera.key].timeout_ns = self._image_timeout_ns(camera.timeout_s)
            contract_s = self._contract_joint_timeout_s
            limit_s = contract_s if joint_states_timeout_s is None else min(contract_s, joint_states_timeout_s)
            self._joint_timeouts_ns[self._joint_topic] = nanoseconds(limit_s)
            self._joint_streams[self._joint_topic].timeout_ns = nanoseconds(limit_s)

    @property
    def joint_topic(self) -> str:
        """Topic of the joint states, that of most joints."""
        return self._joint_topic

    def clear(self, not_before_ns: int = 0) -> None:
        """Forget everything; samples stamped before ``not_before_ns`` are not taken any more (an older episode's)."""
        with self._lock:
            self._not_before_ns = not_before_ns
            self._reset_streams()

    def add_image(self, key: str, image: Any, stamp_ns: int, now_ns: int) -> str | None:
        """Store an image.

        Args:
            key: Camera key of the contract.
            image: Kept as it is.
            stamp_ns: Header stamp; 0 (a driver that does not stamp) is replaced by ``now_ns``.
            now_ns: The node's clock.

        Returns:
            None, or why the image was dropped: ``future``, ``old`` (out of order), ``repeated`` (same stamp).
        """
        with self._lock:
            self._streams[key].offered(stamp_ns, now_ns)
            stamp_ns = self._sample_ns(key, stamp_ns, now_ns)
            reason = self._drop_reason(key, self._streams[key], stamp_ns, self._streams[key].newest_ns, now_ns)
            if reason is None:
                self._images[key].append((stamp_ns, image))
                self._streams[key].received(stamp_ns, now_ns)
            return reason

    def add_joints(
        self,
        names: Sequence[str],
        positions: Sequence[float],
        stamp_ns: int,
        now_ns: int,
        topic: str | None = None,
    ) -> str | None:
        """Merge a joint state message by name. Joints may be split over messages, reordered, or not ours.

        Args:
            names: Of the joints in the message.
            positions: Theirs.
            stamp_ns: Header stamp; 0 is replaced by ``now_ns``.
            now_ns: The node's clock.
            topic: The contract's topic that it came on, None: ``joint_states_topic``. Joints that belong to another
                one are ignored.

        Returns:
            None, or why the message was dropped: ``future``, ``old``, ``repeated``, ``length`` (fewer positions than
            names), ``not_finite`` (followed by the joint's name), ``foreign`` (none of our joints).
        """
        topic = topic or self._joint_topic
        with self._lock:
            # Counters and headers of a source that is called so must not be taken for those of the main topic.
            main = topic == self._joint_topic and "joint_states" not in self._joint_index
            label = "joint_states" if main else topic
            stream, owned = self._joint_streams[topic], self._joint_index[topic]
            if len(positions) != len(names):
                stream.refused = f"{len(positions)} positions for {len(names)} names"
                return self._count(label, "length")
            ours = [(owned[name], value) for name, value in zip(names, positions) if name in owned]
            if not ours:
                stream.refused = (
                    f"it has none of the joints {', '.join(owned)}, but {', '.join(names) or 'none at all'}"
                )
                return self._count(label, "foreign")
            stream.offered(stamp_ns, now_ns)
            stamp_ns = self._sample_ns(label, stamp_ns, now_ns)
            index = np.array([k for k, _ in ours])
            values = np.array([value for _, value in ours], dtype=np.float64)
            if not np.isfinite(values).all():
                name = self._joint_names[index[np.flatnonzero(~np.isfinite(values))[0]]]
                self._count(label, "not_finite")
                stream.refused = f"joint {name!r} is not finite"
                return f"not_finite: joint {name!r}"
            newest = int(self._joint_stamps[index].max())
            reason = self._drop_reason(label, stream, stamp_ns, newest if newest >= 0 else None, now_ns)
            if reason is None:
                self._joint_positions[index] = values
                self._joint_stamps[index] = stamp_ns
                self._merge_joints(topic, now_ns)
            return reason

    def _merge_joints(self, topic: str, now_ns: int) -> None:
        """Make one sample of all joints; it is as old as the oldest one of ``joint_states_topic``.

        Those of other sources are taken as they are: how old they may be is their own timeout's affair.
        """
        stream, own_ns = self._joint_streams[topic], self._oldest_joint_ns(topic)
        if own_ns < 0:
            return
        if stream.newest_ns != own_ns:
            stream.received(own_ns, now_ns)
        if (self._joint_stamps < 0).any() or (topic != self._joint_topic and self._joints):
            return
        merged_ns = self._oldest_joint_ns(self._joint_topic)
        sample = _Joints(merged_ns, self._joint_positions.copy(), int(self._joint_stamps.min()))
        if self._joints and self._joints[-1].stamp_ns == merged_ns:
            self._joints[-1] = sample
        else:
            self._joints.append(sample)

    def _oldest_joint_ns(self, topic: str) -> int:
        """Stamp of the oldest joint that comes on a topic, below 0 while one is missing."""
        return int(self._joint_stamps[list(self._joint_index[topic].values())].min())

    def _sample_ns(self, name: str, stamp_ns: int, now_ns: int) -> int:
        """The time of a sample. By receipt, a stamp that was there before keeps the time that it got then."""
        if stamp_ns == 0:
            self._count(name, "zero_stamp")
            return now_ns
        if not self._by_receipt:
            return stamp_ns
        newest_ns, received_ns = self._headers.get(name, (0, 0))
        if stamp_ns <= newest_ns:
            return received_ns - (stamp_ns < newest_ns)
        self._headers[name] = (stamp_ns, now_ns)
        return now_ns

    def _drop_reason(self, name: str, stream: Stream, stamp_ns: int, newest_ns: int | None, now_ns: int) -> str | None:
        kind, text = None, ""
        if stamp_ns > now_ns + self._max_future_ns:
            ahead_s = seconds(stamp_ns - now_ns)
            kind, text = "future", f"it is stamped {ahead_s:.3f} s in the future; synchronize the clocks"
        elif stamp_ns < self._not_before_ns:
            kind, text = "before_restart", "it was stamped before the restart"
        elif newest_ns is not None and stamp_ns == newest_ns:
            kind, text = "repeated", "its stamp is that of the message before"
        elif newest_ns is not None and stamp_ns < newest_ns:
            kind, text = "old", "its stamp is older than that of the message before"
        if kind is None:
            return None
        stream.refused = text
        return self._count(name, kind)

    def refuse_image(self, key: str, reason: str) -> None:
        """Note an image that cannot be decoded; it counts as none."""
        with self._lock:
            self._streams[key].refused = reason
            self._count(key, "undecodable")

    def _count(self, name: str, kind: str) -> str:
        self.counters[f"{name}:{kind}"] += 1
        return kind

    def problem(self, now_ns: int) -> NotReady | None:
        """The first stream that is missing or stale, or None. Call it at every control tick."""
        with self._lock:
            return self._problem(now_ns)

    def _problem(self, now_ns: int) -> NotReady | None:
        for stream in self._all_streams():
            stream.update(now_ns)
        for topic, owned in self._joint_index.items():
            missing = [name for name, k in owned.items() if self._joint_stamps[k] < 0]
            if missing and len(missing) < len(owned):
                text = f"{topic!r} lacks joint {missing[0]!r} (missing: {', '.join(missing)})"
                return NotReady(topic, text, tuple(missing))
        for stream in self._all_streams():
            reason = stream.problem(now_ns)
            if reason is None:
                continue
            owned = self._joint_index.get(stream.topic)
            if owned is not None and stream.newest_ns is not None:
                reason = f"{reason} (joint {min(owned, key=lambda name: self._joint_stamps[owned[name]])!r})"
            return NotReady(stream.topic, reason)
        return None

    def _all_streams(self) -> tuple[Stream, ...]:
        """Joint states first: without them nothing is known of the arm."""
        return (*self._joint_streams.values(), *self._streams.values())

    def assemble(self, now_ns: int) -> Snapshot | NotReady:
        """One observation: the newest set of images that belong together, with the joints of that moment.

        The reference is the camera that is furthest behind; the others give the image nearest to it.
        """
        with self._lock:
            problem = self._problem(now_ns)
            if problem is not None:
                return problem
            reference_ns = min(history[-1][0] for history in self._images.values())
            chosen = {key: _nearest(history, reference_ns) for key, history in self._images.items()}
            joints = _nearest(self._joints, reference_ns)
            stamps = {self._keys[key]: stamp for key, (stamp, _) in chosen.items()}
            stamps[self._joint_topic] = joints.stamp_ns
            spread_ns = max(stamps.values()) - min(stamps.values())
            if spread_ns > self._sync_ns:
                oldest = min(stamps, key=lambda topic: stamps[topic])
                return NotReady(
                    oldest,
                    f"{oldest!r} is {seconds(spread_ns):.3f} s behind the other streams, "
                    f"tolerance {seconds(self._sync_ns):.3f} s",
                )
            images = {key: image for key, (_, image) in chosen.items()}
            return Snapshot(
                images=images,
                positions=joints.positions.copy(),
                joints_ns=joints.oldest_ns,
                stamp_ns=max(stamps.values()),
                image_stamps_ns={key: stamp for key, (stamp, _) in chosen.items()},
            )

    def newest_images(self) -> dict[str, Any]:
        """Camera key -> newest sample, for those that have one."""
        with self._lock:
            return {key: history[-1][1] for key, history in self._images.items() if history}

    def joint_positions(self, now_ns: int) -> np.ndarray | None:
        """The newest joint positions ``[joints]``, or None if they are missing or stale."""
        with self._lock:
            for stream in self._joint_streams.values():
                stream.update(now_ns)
            if not self._joints or any(stream.problem(now_ns) for stream in self._joint_streams.values()):
                return None
            return self._joints[-1].positions.copy()

    def joint_sample(self) -> tuple[int, np.ndarray] | None:
        """The newest joint sample, stamp and ``[joints]``, however old."""
        with self._lock:
            return (self._joints[-1].stamp_ns, self._joints[-1].positions.copy()) if self._joints else None

    def joint_velocities(self) -> np.ndarray | None:
        """Velocities ``[joints]`` by difference over ``VELOCITY_SPAN_NS`` before the newest sample, None without it.

        By difference, because drivers may leave the velocities out. 0 for joints of other sources, which are too slow
        for it.
        """
        with self._lock:
            if not self._joints:
                return None
            newest_ns, newest, _ = self._joints[-1]
            before_ns, before, _ = _nearest(self._joints, newest_ns - VELOCITY_SPAN_NS)
            span_ns = newest_ns - before_ns
            if not VELOCITY_SPAN_NS // 2 <= span_ns <= 2 * VELOCITY_SPAN_NS:
                return None
            velocities = (newest - before) / float(seconds(span_ns))
            velocities[self.slow_joints] = 0.0
            return velocities

    def clock_skew(self) -> str | None:
        """The stream whose stamps are furthest from the node's clock, in words with the remedy; None if all agree."""
        if self._by_receipt:
            return None
        with self._lock:
            offsets = {stream.topic: stream.offset_s for stream in self._all_streams()}
        topic, offset_s = max(
            ((topic, value) for topic, value in offsets.items() if value is not None),
            key=lambda item: abs(item[1]),
            default=("", 0.0),
        )
        if abs(offset_s) <= self._max_clock_skew_s:
            return None
        side = "behind" if offset_s > 0 else "ahead of"
        return (
            f"the stamps of {topic!r} are {abs(offset_s):.2f} s {side} this node's clock: synchronize the clocks "
            "(chrony, PTP; use_sim_time on both sides), or set stamp_source to 'receive'"
        )

    def ages_s(self, now_ns: int) -> dict[str, float]:
        """Topic -> age of its newest sample; infinity where none came."""
        with self._lock:
            return {
                stream.topic: float("inf") if stream.newest_ns is None else float(seconds(now_ns - stream.newest_ns))
                for stream in self._all_streams()
            }


def joint_indices(contract: RobotContract) -> dict[str, dict[str, int]]:
    """Topic -> its joints -> their places in contract order; ``joint_states_topic`` with what is left comes first."""
    places = {name: k for k, name in enumerate(contract.joint_names)}
    others = {source.topic: {name: places[name] for name in source.joints} for source in contract.sensors.joint_sources}
    elsewhere = {name for owned in others.values() for name in owned}
    own = {name: k for name, k in places.items() if name not in elsewhere}
    return {contract.sensors.joint_states_topic: own, **others}


def _nearest(history: deque[_Sample], stamp_ns: int) -> _Sample:
    """Of samples that begin with their stamp."""
    return min(reversed(history), key=lambda sample: abs(sample[0] - stamp_ns))

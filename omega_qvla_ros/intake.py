"""Sensor messages -> ``ObservationBuffer``: the same code for a topic's callback and for a message of a recorded bag.

Messages are duck-typed (rclpy's classes and rosbags' have the same fields). Raw images are checked by their header and
kept as they are; compressed ones are decoded at once, on a thread of their own while topics are live, because only a
decoded picture is known to be one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from omega_qvla_core.errors import ObservationError
from omega_qvla_ros.contract import CameraContract, RobotContract
from omega_qvla_ros.image_decoding import check_encoding, check_image, compressed_to_rgb, image_to_rgb, to_aspect
from omega_qvla_ros.notices import EVENT_NS, Notices, once_per
from omega_qvla_ros.observation import ObservationBuffer
from omega_qvla_ros.splines import NS_PER_S

log = logging.getLogger(__name__)

REPEAT_NS = 10 * NS_PER_S
"""The same complaint about the same stream is logged once in this time while its cause lasts."""


def stamp_ns(message: Any) -> int:
    """Header stamp in nanoseconds."""
    return int(message.header.stamp.sec) * NS_PER_S + int(message.header.stamp.nanosec)


class Intake:
    """Takes the messages of one robot.

    Args:
        contract: Cameras and joints.
        image_size: Camera key -> smallest height and width in px that the policy takes.
        buffer: Where samples go.
        notices: What the operator should know.
        threaded: Decode compressed images on a thread; False decodes in ``on_image``.
        on_decoded: Called on that thread after an image was stored.
    """

    def __init__(
        self,
        contract: RobotContract,
        image_size: Mapping[str, tuple[int, int]],
        buffer: ObservationBuffer,
        notices: Notices,
        threaded: bool = True,
        on_decoded: Callable[[], None] = lambda: None,
    ) -> None:
        self._cameras = {camera.key: camera for camera in contract.cameras}
        self._image_size = dict(image_size)
        self._buffer = buffer
        self._notices = notices
        self._on_decoded = on_decoded
        self._sizes: dict[str, tuple[int, int]] = {}
        self._refused: dict[str, str] = {}
        self._due = once_per(REPEAT_NS)
        compressed = any(camera.transport == "compressed" for camera in contract.cameras)
        self._decoder = LatestOnly(self._decode, "decoder") if threaded and compressed else None

    def close(self) -> None:
        """End the decoding thread."""
        if self._decoder is not None:
            self._decoder.close()

    def on_image(self, key: str, message: Any, now_ns: int) -> None:
        """Take an image message, raw or compressed as the contract says.

        Args:
            key: Camera key of the contract.
            message: ``sensor_msgs/Image`` or ``sensor_msgs/CompressedImage``.
            now_ns: The node's clock.
        """
        camera = self._cameras[key]
        if camera.frame_id is not None and message.header.frame_id != camera.frame_id:
            self._note_frame(camera, message.header.frame_id, now_ns)
        if camera.transport == "compressed":
            if self._decoder is not None:
                self._decoder.put(key, (message, now_ns))
            else:
                self._decode(key, (message, now_ns))
            return
        try:
            check_encoding(message.encoding, camera.encoding, camera.topic)
            check_image(message, camera.topic, *self._image_size[key])
        except ObservationError as error:
            self._refuse(key, str(error))
            return
        self._store(camera, message, (message.height, message.width), stamp_ns(message), now_ns)

    def _note_frame(self, camera: CameraContract, frame_id: str, now_ns: int) -> None:
        """Cameras whose cables were swapped still send pictures; their frames tell."""
        self._notices.set(
            f"frame.{camera.key}",
            f"{camera.topic!r} comes from the frame {frame_id!r}, the contract says {camera.frame_id!r}; are the "
            "cameras swapped?",
            now_ns + EVENT_NS,
        )

    def _decode(self, key: str, item: tuple[Any, int]) -> None:
        """May run on the decoding thread; whatever a broken picture does must end here."""
        message, now_ns = item
        camera = self._cameras[key]
        try:
            rgb = compressed_to_rgb(message, camera.topic, *self._image_size[key])
        except ObservationError as error:
            self._refuse(key, str(error))
            return
        self._store(camera, rgb, rgb.shape[:2], stamp_ns(message), now_ns)
        self._on_decoded()

    def _store(self, camera: CameraContract, image: Any, size: tuple[int, int], stamp: int, now_ns: int) -> None:
        self._refused.pop(camera.key, None)
        before = self._sizes.setdefault(camera.key, size)
        if before != size:
            self._sizes[camera.key] = size
            self._notices.set(
                f"size.{camera.key}",
                f"{camera.topic!r} changed from {before[1]}x{before[0]} to {size[1]}x{size[0]} px; it is resized as "
                "before, but the policy may see less or another aspect",
                now_ns + EVENT_NS,
            )
        self._note(camera.topic, stamp, self._buffer.add_image(camera.key, image, stamp, now_ns), now_ns)

    def _refuse(self, key: str, reason: str) -> None:
        """One error per stream and cause, again after it was good in between."""
        self._buffer.refuse_image(key, reason)
        kind = reason.split(":")[-1][:40]
        if self._refused.get(key) != kind:
            self._refused[key] = kind
            log.error("image dropped: %s", reason)

    def on_joint_states(self, message: Any, now_ns: int, topic: str | None = None) -> None:
        """Take a ``sensor_msgs/JointState``; ``topic`` is the contract's, None: ``joint_states_topic``."""
        stamp, topic = stamp_ns(message), topic or self._buffer.joint_topic
        dropped = self._buffer.add_joints(message.name, message.position, stamp, now_ns, topic)
        if dropped is not None and dropped.startswith("not_finite") and self._due(f"not_finite.{topic}", now_ns):
            log.error("joint state dropped, %s", dropped)
        self._note(topic, stamp, dropped, now_ns)

    def _note(self, topic: str, stamp: int, dropped: str | None, now_ns: int) -> None:
        if stamp == 0:
            text = f"messages on {topic!r} carry no stamp: the time of receipt is used; let the driver stamp them"
            self._notices.set(f"zero.{topic}", text, now_ns + EVENT_NS)
        if dropped == "future":
            ahead_s = (stamp - now_ns) / NS_PER_S
            text = f"{topic!r} is stamped {ahead_s:.3f} s in the future and dropped: synchronize the clocks"
            self._notices.set(f"future.{topic}", text, now_ns + EVENT_NS)


class LatestOnly:
    """Works on the newest item of each key, on one thread; older ones that were not begun are forgotten.

    Args:
        work: Key, item -> nothing; must not raise.
        name: Of the thread.
    """

    def __init__(self, work: Callable[[str, Any], None], name: str) -> None:
        self._work = work
        self._waiting: dict[str, Any] = {}
        self._condition = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, key: str, item: Any) -> None:
        """Replace what waits under ``key``. Never blocks on work."""
        with self._condition:
            self._waiting.pop(key, None)
            self._waiting[key] = item
            self._condition.notify()

    def close(self, timeout_s: float = 1.0) -> None:
        """Forget what waits and end the thread."""
        with self._condition:
            self._closed = True
            self._waiting.clear()
            self._condition.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                key = next(iter(self._waiting))
                item = self._waiting.pop(key)
            self._work(key, item)


def to_rgb(sample: Any, topic: str, rule: str = "checkpoint", height: int = 1, width: int = 1) -> np.ndarray:
    """The picture of a sample that ``Intake`` stored.

    Args:
        sample: A message, or an array that was decoded before.
        topic: For error messages.
        rule: ``resize`` of the camera's contract.
        height: The network's image height.
        width: The network's image width.

    Returns:
        uint8 ``[H, W, 3]`` RGB.

    Raises:
        ObservationError: It cannot be decoded.
    """
    rgb = sample if isinstance(sample, np.ndarray) else image_to_rgb(sample, topic)
    return to_aspect(rgb, rule, height, width)

"""Pictures for people: ``~/debug/image`` and ``~/debug/trajectory``. Off the control path, and only if looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import Point
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import Image

from omega_qvla_core.errors import OmegaQVLAError
from omega_qvla_ros import msgs
from omega_qvla_ros.intake import LatestOnly
from omega_qvla_ros.kinematics import Chain, chain_from_urdf
from omega_qvla_ros.nodes import qos
from omega_qvla_ros.nodes.parameters import value
from omega_qvla_ros.session import PolicySession
from omega_qvla_ros.splines import nanoseconds
from omega_qvla_ros.trajectory import Plan

PERIOD_S = 0.2
"""A person sees five pictures per second well enough."""
LINE_PX = 14
FONT_SCALE = 0.4
MIN_WIDTH_PX = 320
"""Smaller pictures are enlarged, so that the text fits."""
WHITE, RED = (255, 255, 255), (255, 80, 80)


@dataclass(frozen=True)
class Scene:
    """What is drawn: image samples side by side, and lines of text under them."""

    samples: dict[str, Any]
    lines: tuple[str, ...]
    alarmed: bool
    stamp_ns: int


class DebugOutputs:
    """Both pictures of one session.

    Args:
        node: Owner of publishers and timer.
        session: What is shown.
        now: The node's time in ns.
        decode: Image sample, camera key -> uint8 ``[H, W, 3]`` RGB; called on a thread of its own.
        urdf: The robot's description, None without one.
    """

    def __init__(
        self,
        node: Node,
        session: PolicySession,
        now: Callable[[], int],
        decode: Callable[[Any, str], np.ndarray],
        urdf: str | None,
    ) -> None:
        self._node = node
        self._session = session
        self._now = now
        self._decode = decode
        self._images = node.create_publisher(Image, "~/debug/image", qos.DEBUG)
        self._painter = LatestOnly(self._paint, "painter")
        self._chain, self._markers, self._types = self._trajectory_marker(urdf)
        self._timer = node.create_timer(PERIOD_S, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _trajectory_marker(self, urdf: str | None) -> tuple[Chain | None, Any, ModuleType | None]:
        """Chain, publisher and message types; nothing of it where it cannot be drawn, and then the log says why."""
        if not value(self._node, "debug_trajectory"):
            return None, None, None
        try:
            from visualization_msgs import msg as types  # optional: everything else works without
        except ImportError:
            self._node.get_logger().warning(
                "no ~/debug/trajectory: visualization_msgs is not installed (ros-$ROS_DISTRO-visualization-msgs)"
            )
            return None, None, None
        if urdf is None:
            self._node.get_logger().warning("no ~/debug/trajectory: no URDF came on robot_description")
            return None, None, None
        try:
            names = self._session.contract.joint_names
            chain = chain_from_urdf(urdf, names, str(value(self._node, "tip_link")))
        except OmegaQVLAError as error:
            self._node.get_logger().warning(f"no ~/debug/trajectory: {error}")
            return None, None, None
        return chain, self._node.create_publisher(types.MarkerArray, "~/debug/trajectory", qos.DEBUG), types

    def _tick(self) -> None:
        now_ns = self._now()
        if value(self._node, "debug_image") and self._images.get_subscription_count():
            self._painter.put("scene", self._scene(now_ns))
        if self._chain is not None and self._markers.get_subscription_count():
            self._markers.publish(self._trajectory(now_ns))

    def _scene(self, now_ns: int) -> Scene:
        session = self._session
        safety = session.safety
        ages = ", ".join(f"{topic} {age:.2f} s" for topic, age in session.buffer.ages_s(now_ns).items())
        p50_ms, p95_ms = (1e3 * session.latency_s.get(percent) for percent in (50, 95))
        left_s = session.motion.queue_s(now_ns)
        lines = (
            f"task {session.scheduler.task}: {session.instruction or '(no instruction)'}",
            f"{safety.state.name} {'; '.join(safety.reasons)}",
            f"inference p50 {p50_ms:.0f} ms, p95 {p95_ms:.0f} ms, plan left {left_s:.2f} s",
            f"ages: {ages}",
            *session.notices.texts,
        )
        return Scene(session.buffer.newest_images(), lines, not safety.may_move, now_ns)

    def _paint(self, _: str, scene: Scene) -> None:
        """On the painter's thread."""
        pictures = []
        for key, sample in scene.samples.items():
            try:
                pictures.append(self._decode(sample, key))
            except OmegaQVLAError:
                continue  # the state says it already
        self._images.publish(msgs.rgb_to_image(annotate(pictures, scene.lines, scene.alarmed), scene.stamp_ns, "debug"))

    def _trajectory(self, now_ns: int) -> Any:
        assert self._chain is not None and self._types is not None
        names = self._session.contract.joint_names
        positions = predicted(self._session.motion.plan, now_ns)
        marker = self._types.Marker(
            header=msgs.header(now_ns, self._chain.root),
            ns=self._chain.tip,
            type=self._types.Marker.LINE_STRIP,
            action=self._types.Marker.ADD if len(positions) > 1 else self._types.Marker.DELETE,
        )
        marker.scale.x = 0.005  # m, thickness of the line
        marker.color.g = marker.color.a = 1.0
        marker.pose.orientation.w = 1.0
        for row in positions:
            x, y, z = self._chain.tip_position(dict(zip(names, row.tolist())))
            marker.points.append(Point(x=float(x), y=float(y), z=float(z)))
        return self._types.MarkerArray(markers=[marker])

    def destroy(self) -> None:
        """Free publishers, timer and thread."""
        self._node.destroy_timer(self._timer)
        self._painter.close()
        self._node.destroy_publisher(self._images)
        if self._markers is not None:
            self._node.destroy_publisher(self._markers)


def predicted(plan: Plan | None, now_ns: int) -> np.ndarray:
    """What the arm does if nothing new comes: ``[M, joints]`` every 20 ms to the plan's end, empty without one."""
    if plan is None or now_ns >= plan.end_ns:
        return np.empty((0, 0))
    times_ns = np.append(np.arange(now_ns, plan.end_ns, nanoseconds(0.02)), plan.end_ns)
    return np.stack([plan.sample(int(time_ns))[0] for time_ns in times_ns])


def annotate(pictures: list[np.ndarray], lines: tuple[str, ...], alarmed: bool) -> np.ndarray:
    """Pictures side by side with lines of text under them.

    Args:
        pictures: uint8 ``[H, W, 3]`` each, any sizes; brought to the height of the first.
        lines: Text; characters outside ASCII become ``?``, which is all that OpenCV's font has.
        alarmed: Write in red.

    Returns:
        uint8 ``[H', W', 3]`` RGB.
    """
    height = pictures[0].shape[0] if pictures else LINE_PX
    row = [cv2.resize(p, (round(p.shape[1] * height / p.shape[0]), height)) for p in pictures]
    image = np.hstack(row) if row else np.zeros((height, MIN_WIDTH_PX, 3), np.uint8)
    if image.shape[1] < MIN_WIDTH_PX:
        factor = MIN_WIDTH_PX / image.shape[1]
        image = cv2.resize(image, (MIN_WIDTH_PX, round(image.shape[0] * factor)), interpolation=cv2.INTER_NEAREST)
    width = image.shape[1]
    per_line = max(1, int(width / (LINE_PX * FONT_SCALE * 1.35)))
    wrapped = [line[k : k + per_line] for line in lines for k in range(0, max(len(line), 1), per_line)]
    strip = np.zeros((LINE_PX * len(wrapped) + 4, width, 3), np.uint8)
    for k, line in enumerate(wrapped):
        text = line.encode("ascii", "replace").decode("ascii")
        place = (2, LINE_PX * (k + 1) - 2)
        cv2.putText(strip, text, place, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, RED if alarmed else WHITE, 1, cv2.LINE_AA)
    return np.vstack([image, strip])

"""ROS messages <-> numpy and the package's own dataclasses. Besides ``nodes/`` the only module that imports ROS.

Images: cv_bridge converts what it gets right, which is contiguous little-endian 8-bit data. It ignores padded rows
(wrong pixels without an error) and fails or errs on messages marked big-endian, so those go to ``image_decoding``.
"""

from __future__ import annotations

import array
import math
from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Duration, Time
from cv_bridge import CvBridge
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg
from trajectory_msgs.msg import JointTrajectoryPoint as JointTrajectoryPointMsg

from omega_qvla_ros import image_decoding
from omega_qvla_ros.splines import NS_PER_S
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

_bridge = CvBridge()


def stamp_to_ns(stamp: Time) -> int:
    """ROS time in nanoseconds."""
    return stamp.sec * NS_PER_S + stamp.nanosec


def ns_to_stamp(time_ns: int) -> Time:
    """Nanoseconds as a ROS time."""
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def duration_to_ns(duration: Duration) -> int:
    """A ROS duration in nanoseconds."""
    return duration.sec * NS_PER_S + duration.nanosec


def ns_to_duration(duration_ns: int) -> Duration:
    """Nanoseconds as a ROS duration."""
    return Duration(sec=duration_ns // NS_PER_S, nanosec=duration_ns % NS_PER_S)


def header(stamp_ns: int, frame_id: str = "") -> Header:
    """A message header."""
    return Header(stamp=ns_to_stamp(stamp_ns), frame_id=frame_id)


def image_to_rgb(message: Image, topic: str = "image") -> np.ndarray:
    """Decode an image.

    Args:
        message: ``rgb8``, ``bgr8``, ``rgba8``, ``bgra8`` or ``mono8``, with or without row padding, any endianness.
        topic: Its topic, for error messages.

    Returns:
        uint8 ``[height, width, 3]`` RGB, contiguous and writable.

    Raises:
        ObservationError: See ``image_decoding.check_image``.
    """
    image_decoding.check_image(message, topic)
    contiguous = message.step == message.width * image_decoding.CHANNELS[message.encoding]
    if contiguous and not message.is_bigendian:
        return _with_cv_bridge(message)
    return image_decoding.image_to_rgb(message, topic)


def _with_cv_bridge(message: Image) -> np.ndarray:
    # The colour conversion returns its own array; without one it is a view of the message.
    rgb = _bridge.imgmsg_to_cv2(message, desired_encoding="rgb8")
    return np.array(rgb, dtype=np.uint8, order="C", copy=message.encoding == "rgb8" or None)


def rgb_to_image(rgb: np.ndarray, stamp_ns: int, frame_id: str) -> Image:
    """Encode an image.

    Args:
        rgb: uint8 ``[height, width, 3]``.
        stamp_ns: Time of exposure.
        frame_id: Optical frame.
    """
    height, width = rgb.shape[:2]
    return Image(
        header=header(stamp_ns, frame_id),
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        # array.array is taken over as it is; any other sequence would be checked byte by byte.
        data=array.array("B", np.ascontiguousarray(rgb).tobytes()),
    )


def camera_info(height: int, width: int, fovy_rad: float, stamp_ns: int, frame_id: str) -> CameraInfo:
    """Pinhole camera without distortion and with square pixels.

    Args:
        height: Image height in pixels.
        width: Image width in pixels.
        fovy_rad: Vertical field of view; the focal length is ``height / 2 / tan(fovy / 2)`` pixels.
        stamp_ns: Stamp of the image.
        frame_id: Optical frame.
    """
    focal_px = height / 2.0 / math.tan(fovy_rad / 2.0)
    cx, cy = (width - 1) / 2.0, (height - 1) / 2.0
    return CameraInfo(
        header=header(stamp_ns, frame_id),
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=[focal_px, 0.0, cx, 0.0, focal_px, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[focal_px, 0.0, cx, 0.0, 0.0, focal_px, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )


def joint_state(names: Sequence[str], positions: np.ndarray, velocities: np.ndarray, stamp_ns: int) -> JointState:
    """A joint state message; positions and velocities ``[joints]``."""
    return JointState(
        header=header(stamp_ns),
        name=list(names),
        position=array.array("d", np.asarray(positions, dtype=np.float64).tobytes()),
        velocity=array.array("d", np.asarray(velocities, dtype=np.float64).tobytes()),
    )


def joint_positions_by_name(message: JointState) -> dict[str, float]:
    """Name -> position. A message with fewer positions than names gives those that it has."""
    return dict(zip(message.name, message.position))


def joint_velocities_by_name(message: JointState) -> dict[str, float]:
    """Name -> velocity; empty if the driver sends none."""
    return dict(zip(message.name, message.velocity))


def trajectory_to_msg(trajectory: JointTrajectory) -> JointTrajectoryMsg:
    """The package's trajectory as a message."""
    return JointTrajectoryMsg(
        header=header(trajectory.stamp_ns),
        joint_names=list(trajectory.joint_names),
        points=[_point_to_msg(point) for point in trajectory.points],
    )


def trajectory_from_msg(message: JointTrajectoryMsg) -> JointTrajectory:
    """A message as the package's trajectory; nothing is checked here."""
    return JointTrajectory(
        joint_names=tuple(message.joint_names),
        stamp_ns=stamp_to_ns(message.header.stamp),
        points=tuple(
            TrajectoryPoint(
                positions=np.array(point.positions),
                time_from_start_ns=duration_to_ns(point.time_from_start),
                velocities=np.array(point.velocities),
                accelerations=np.array(point.accelerations),
                effort=np.array(point.effort),
            )
            for point in message.points
        ),
    )


def _point_to_msg(point: TrajectoryPoint) -> JointTrajectoryPointMsg:
    def doubles(values: np.ndarray) -> array.array[float]:
        return array.array("d", np.asarray(values, dtype=np.float64).tobytes())

    return JointTrajectoryPointMsg(
        positions=doubles(point.positions),
        velocities=doubles(point.velocities),
        accelerations=doubles(point.accelerations),
        effort=doubles(point.effort),
        time_from_start=ns_to_duration(point.time_from_start_ns),
    )

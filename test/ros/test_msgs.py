"""ROS messages <-> numpy: our own image path against cv_bridge, pixel for pixel, and what it refuses."""

from __future__ import annotations

import array
import math

import numpy as np
import pytest
from cv_bridge import CvBridge
from sensor_msgs.msg import Image, JointState

from omega_qvla_core.errors import ObservationError
from omega_qvla_ros import image_decoding, msgs
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 5, 7


def image(encoding: str, pad: int = 0, bigendian: bool = False, last_pad: bool = True) -> tuple[Image, np.ndarray]:
    """A random image in an encoding, and its samples ``[H, W, channels]``."""
    channels = image_decoding.CHANNELS[encoding]
    samples = RNG.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)
    rows = np.full((HEIGHT, WIDTH * channels + pad), 170, dtype=np.uint8)
    rows[:, : WIDTH * channels] = samples.reshape(HEIGHT, -1)
    data = rows.tobytes()
    message = Image(height=HEIGHT, width=WIDTH, encoding=encoding, is_bigendian=int(bigendian), step=rows.shape[1])
    message.data = array.array("B", data if last_pad or not pad else data[:-pad])
    return message, samples


def expected(encoding: str, samples: np.ndarray) -> np.ndarray:
    if encoding == "mono8":
        return np.repeat(samples, 3, axis=2)
    return samples[:, :, :3] if encoding.startswith("rgb") else samples[:, :, 2::-1]


@pytest.mark.parametrize("encoding", image_decoding.CHANNELS)
def test_own_path_and_cv_bridge_agree_pixel_for_pixel(encoding: str) -> None:
    message, samples = image(encoding)
    by_cv_bridge = CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8")
    by_us = image_decoding.image_to_rgb(message)
    np.testing.assert_array_equal(by_us, by_cv_bridge)
    np.testing.assert_array_equal(msgs.image_to_rgb(message), by_cv_bridge)
    np.testing.assert_array_equal(by_us, expected(encoding, samples))


@pytest.mark.parametrize("bigendian", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 3, 4])
@pytest.mark.parametrize("encoding", image_decoding.CHANNELS)
def test_padded_and_big_endian_images_are_decoded(encoding: str, pad: int, bigendian: bool) -> None:
    for last_pad in (True, False):
        message, samples = image(encoding, pad, bigendian, last_pad)
        rgb = msgs.image_to_rgb(message)
        np.testing.assert_array_equal(rgb, expected(encoding, samples))
        assert rgb.flags.writeable and rgb.flags.c_contiguous and rgb.dtype == np.uint8


def test_padded_rows_are_what_cv_bridge_gets_wrong() -> None:
    """The reason for our own path; if this fails, cv_bridge has learned to read ``step``."""
    message, samples = image("rgb8", pad=1)
    assert not np.array_equal(CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8"), samples)


def test_decoded_image_is_no_view_of_the_message() -> None:
    for encoding in image_decoding.CHANNELS:
        message, _ = image(encoding)
        rgb = msgs.image_to_rgb(message)
        before = rgb.copy()
        message.data[:] = array.array("B", bytes(len(message.data)))
        np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "rgb16", "yuv422", "bayer_rggb8", "", "RGB8"])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    message, _ = image("rgb8")
    message.encoding = encoding
    with pytest.raises(ObservationError, match=f"'front/image_raw': encoding '{encoding}' is not understood; .*rgb8"):
        msgs.image_to_rgb(message, "front/image_raw")


def test_damaged_headers_are_refused() -> None:
    message, _ = image("rgb8")
    message.data = message.data[:-1]
    with pytest.raises(ObservationError, match="104 bytes of data, 105 needed"):
        msgs.image_to_rgb(message)
    message, _ = image("rgb8")
    message.step = 20
    with pytest.raises(ObservationError, match="step 20 is less than the 21 bytes"):
        msgs.image_to_rgb(message)
    message.height = 2**31
    with pytest.raises(ObservationError, match="header is damaged"):
        msgs.image_to_rgb(message)
    with pytest.raises(ObservationError, match="0x0"):
        msgs.image_to_rgb(Image(encoding="rgb8"))


def test_image_smaller_than_the_network_is_refused() -> None:
    message, _ = image("rgb8")
    with pytest.raises(ObservationError, match="7x5 px, the policy needs at least 64x64"):
        image_decoding.check_image(message, "front", 64, 64)


def test_numpy_to_image_and_back() -> None:
    rgb = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    message = msgs.rgb_to_image(rgb[:, ::-1], 1_500_000_000, "front_optical_frame")
    assert (message.height, message.width, message.step, message.encoding) == (4, 6, 18, "rgb8")
    assert message.header.frame_id == "front_optical_frame" and message.header.stamp.nanosec == 500_000_000
    np.testing.assert_array_equal(msgs.image_to_rgb(message), rgb[:, ::-1])


def test_camera_info_is_a_pinhole_of_the_given_field_of_view() -> None:
    info = msgs.camera_info(128, 256, math.radians(90.0), 0, "f")
    assert info.k[0] == pytest.approx(64.0) and info.k[4] == pytest.approx(64.0)
    assert (info.k[2], info.k[5]) == (127.5, 63.5)
    assert list(info.p[:3]) == list(info.k[:3]) and info.distortion_model == "plumb_bob"


@pytest.mark.parametrize("time_ns", [0, 1, 999_999_999, 1_000_000_000, 12_345_678_901_234_567])
def test_stamps_are_exact(time_ns: int) -> None:
    if time_ns < 2**31 * 10**9:
        assert msgs.stamp_to_ns(msgs.ns_to_stamp(time_ns)) == time_ns
        assert msgs.duration_to_ns(msgs.ns_to_duration(time_ns)) == time_ns


def test_negative_duration_is_exact() -> None:
    assert msgs.duration_to_ns(msgs.ns_to_duration(-1)) == -1


def test_joint_state_by_name_survives_missing_arrays() -> None:
    message = msgs.joint_state(["a", "b"], np.array([1.0, 2.0]), np.array([3.0, 4.0]), 5)
    assert msgs.joint_positions_by_name(message) == {"a": 1.0, "b": 2.0}
    assert msgs.joint_velocities_by_name(message) == {"a": 3.0, "b": 4.0}
    bare = JointState(name=["a", "b"], position=[1.0, float("nan")])
    assert msgs.joint_velocities_by_name(bare) == {}
    assert math.isnan(msgs.joint_positions_by_name(bare)["b"])


def test_trajectory_round_trip() -> None:
    points = (
        TrajectoryPoint(np.array([0.1, 0.2]), 0, np.array([1.0, 2.0])),
        TrajectoryPoint(np.array([0.3, np.nan]), 1_250_000_000, np.zeros(2), np.ones(2), np.ones(2)),
    )
    back = msgs.trajectory_from_msg(msgs.trajectory_to_msg(JointTrajectory(("a", "b"), 7_000_000_001, points)))
    assert back.joint_names == ("a", "b") and back.stamp_ns == 7_000_000_001
    for ours, theirs in zip(points, back.points):
        assert ours.time_from_start_ns == theirs.time_from_start_ns
        for name in ("positions", "velocities", "accelerations", "effort"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))

"""Pictures that cannot be used, and what an operator is told although nothing has to stop."""

from __future__ import annotations

import array
import logging
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from fault_checks import run_until
from robot_fixtures import PERIOD_NS, contract_dict
from sensor_msgs.msg import CompressedImage, Image
from session_rig import Rig

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros import msgs
from omega_qvla_ros.contract import contract_from_dict
from omega_qvla_ros.image_decoding import to_aspect
from omega_qvla_ros.intake import Intake
from omega_qvla_ros.safety_state import State

SIZES = {"front": (64, 64), "wrist": (64, 64)}
TOPIC = "front/image_raw"


class PictureRig(Rig):
    """A session whose front camera sends what the test wants, through the node's own intake."""

    def __init__(self, **camera: object) -> None:
        data = contract_dict()
        data["cameras"][0].update(camera)
        contract = contract_from_dict(data)
        super().__init__(contract)
        self.intake = Intake(contract, SIZES, self.session.buffer, self.session.notices, threaded=False)
        self.sensors.discard("front")
        self.message: Image | CompressedImage | None = raw()
        self.stamp_offset_ns: int | None = 0

    def feed(self) -> None:
        super().feed()
        if self.message is not None:
            stamp_ns = 0 if self.stamp_offset_ns is None else self.now + self.stamp_offset_ns
            self.message.header.stamp = msgs.ns_to_stamp(stamp_ns)
            self.intake.on_image("front", self.message, self.now)

    @property
    def notices(self) -> str:
        return "; ".join(self.session.notices.texts)


def raw(encoding: str = "rgb8", height: int = 64, width: int = 64, channels: int = 3) -> Image:
    data = np.random.default_rng(0).integers(0, 256, height * width * channels, dtype=np.uint8)
    return Image(
        height=height, width=width, encoding=encoding, step=width * channels, data=array.array("B", data.tobytes())
    )


def jpeg() -> CompressedImage:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", picture)[1].tobytes()
    return CompressedImage(format="jpeg", data=array.array("B", data))


@pytest.fixture
def rig() -> Iterator[PictureRig]:
    made = PictureRig()
    made.run(10)
    assert made.state is State.OK and made.speed > 0.0
    yield made
    made.close()


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "yuv422", "bayer_rggb8", "", "RGB8"])
def test_fault_04_wrong_encoding_is_one_error_and_counts_as_stale(
    rig: PictureRig, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.message = raw(encoding, channels=2)
    with caplog.at_level(logging.ERROR):
        ticks = run_until(rig, State.HOLD)
        rig.run(20)
    assert 5 <= len(ticks) <= 6  # 0.25 s and one control period
    errors = [record.getMessage() for record in caplog.records if "image dropped" in record.getMessage()]
    assert len(errors) == 1 and TOPIC in errors[0] and repr(encoding) in errors[0]
    assert TOPIC in rig.session.safety.reasons[0] and rig.speed == 0.0
    assert rig.session.buffer.counters["front:undecodable"] > 20
    rig.message = raw()
    rig.run(10)
    assert rig.state is State.OK
    rig.message = raw(encoding, channels=2)
    with caplog.at_level(logging.ERROR):
        rig.run(3)
    assert len([record for record in caplog.records if "image dropped" in record.getMessage()]) == 2


def test_fault_06_change_of_size_is_said_once_and_the_arm_goes_on(
    rig: PictureRig, caplog: pytest.LogCaptureFixture
) -> None:
    accepted = rig.session.scheduler.accepted
    rig.message = raw(height=96, width=128)
    with caplog.at_level(logging.WARNING):
        rig.run(20)
    assert rig.state is State.OK and rig.session.scheduler.accepted > accepted
    said = [record.getMessage() for record in caplog.records if "changed from" in record.getMessage()]
    assert len(said) == 1 and TOPIC in said[0] and "64x64" in said[0] and "128x96" in said[0]


def test_fault_06_picture_is_brought_to_the_aspect_by_the_contracts_rule() -> None:
    wide = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cut = to_aspect(wide, "crop", 64, 64)
    assert cut.shape == (64, 64, 3)
    np.testing.assert_array_equal(cut, wide[:, 16:80])
    padded = to_aspect(wide, "pad", 64, 64)
    assert padded.shape[0] == padded.shape[1] == 96
    np.testing.assert_array_equal(to_aspect(wide, "checkpoint", 64, 64), wide)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: bytes(500), lambda data: b"\xff\xd8\xff"],
    ids=["cut", "empty", "zeros", "head only"],
)
def test_fault_07_corrupt_jpeg_is_dropped_and_counted_and_never_raises(damage) -> None:
    rig = PictureRig(transport="compressed", topic="front/image_raw/compressed")
    rig.message = jpeg()
    rig.run(10)
    assert rig.state is State.OK and rig.speed > 0.0
    good = bytes(rig.message.data)
    rig.message = CompressedImage(format="jpeg", data=array.array("B", damage(good)))
    rig.run(12)
    assert rig.session.buffer.counters["front:undecodable"] == 12
    assert rig.state is State.HOLD and "front/image_raw/compressed" in rig.session.safety.reasons[0]
    assert rig.session.safety.consecutive_errors == 0  # the camera's fault, not the policy's
    rig.message = jpeg()
    rig.run(10)
    assert rig.state is State.OK
    rig.close()


def look_with(rig: PictureRig, picture: np.ndarray) -> None:
    """The session's decode gives this picture for every camera."""
    rig.session._decode = lambda message, key: picture


def test_fault_07_black_picture_is_a_warning_only(rig: PictureRig) -> None:
    look_with(rig, np.zeros((64, 64, 3), np.uint8))
    rig.run(20)
    assert rig.state is State.OK and rig.speed > 0.0
    assert f"'{TOPIC}' is black" in rig.notices
    look_with(rig, np.full((64, 64, 3), 90, np.uint8))
    rig.run(10)
    assert "black" not in rig.notices


def test_fault_09_zero_stamp_is_a_warning_with_the_topic(rig: PictureRig) -> None:
    rig.stamp_offset_ns = None
    rig.run(10)
    assert rig.state is State.OK
    assert f"'{TOPIC}' carry no stamp" in rig.notices and "time of receipt" in rig.notices
    assert rig.session.buffer.counters["front:zero_stamp"] == 10


def test_fault_09_future_stamp_is_dropped_and_its_skew_is_said(rig: PictureRig) -> None:
    rig.stamp_offset_ns = 300_000_000
    rig.run(10)
    assert rig.state is State.HOLD and rig.session.buffer.counters["front:future"] == 10
    assert f"'{TOPIC}'" in rig.notices and "0.300 s" in rig.notices and "synchronize" in rig.notices


def test_fault_03_same_bytes_under_new_stamps_are_a_warning_only(rig: PictureRig) -> None:
    """The rig's decode gives the same picture for ever; a second is patience enough."""
    look_with(rig, np.full((64, 64, 3), 90, np.uint8))
    rig.run(40)
    assert rig.state is State.OK and rig.speed > 0.0
    assert f"'{TOPIC}' repeats the same picture under new stamps" in rig.notices


def test_fault_25_policy_that_asks_for_the_same_pose_is_a_warning_after_five_seconds(rig: PictureRig) -> None:
    pose = np.array([0.02, 0.1])
    rig.policy.infer = lambda *args, **kwargs: ActionChunk(np.tile(pose, (8, 1)), 0.05, 0.05)
    first_ns, noticed_ns = rig.now, None
    for _ in range(160):
        rig.tick()
        assert rig.state in (State.OK, State.DEGRADED)
        if noticed_ns is None and "same pose" in rig.notices:
            noticed_ns = rig.now
    assert noticed_ns is not None
    # An inference every second period: the first one still to come, five seconds, and the next one after them.
    assert 5.0 <= (noticed_ns - first_ns) * 1e-9 <= 5.0 + 4 * PERIOD_NS * 1e-9
    assert rig.session.safety.reasons == [] and rig.session.safety.consecutive_errors == 0


def test_fault_25_policy_that_outputs_zero_is_inert_too(rig: PictureRig) -> None:
    rig.policy.infer = lambda *args, **kwargs: ActionChunk(np.zeros((8, 2)), 0.05, 0.05)
    rig.run(140)
    assert "same pose" in rig.notices and rig.state is State.OK

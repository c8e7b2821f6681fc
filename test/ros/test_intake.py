"""Messages on their way into the buffer: what is decoded, dropped, counted and said."""

from __future__ import annotations

import array
import logging
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from robot_fixtures import T0, contract_dict, toy_contract
from sensor_msgs.msg import CompressedImage, Image, JointState

from omega_qvla_core.errors import ObservationError
from omega_qvla_ros import image_decoding, msgs
from omega_qvla_ros.contract import contract_from_dict
from omega_qvla_ros.image_decoding import compressed_to_rgb, to_aspect
from omega_qvla_ros.intake import Intake, LatestOnly
from omega_qvla_ros.notices import Notices
from omega_qvla_ros.observation import NotReady, ObservationBuffer

MS = 1_000_000
SIZES = {"front": (64, 64), "wrist": (64, 64)}


class Fixture:
    """An intake without its thread, and what it feeds."""

    def __init__(self, **camera: object) -> None:
        data = contract_dict()
        data["cameras"][0].update(camera)
        contract = contract_from_dict(data)
        self.buffer = ObservationBuffer(contract)
        self.notices = Notices()
        self.intake = Intake(contract, SIZES, self.buffer, self.notices, threaded=False)

    def newest(self) -> object:
        return self.buffer.newest_images().get("front")


def raw(stamp_ns: int = T0, encoding: str = "rgb8", height: int = 64, width: int = 64) -> Image:
    channels = image_decoding.CHANNELS.get(encoding, 2)
    data = array.array("B", bytes(height * width * channels))
    message = Image(height=height, width=width, encoding=encoding, step=width * channels, data=data)
    message.header.stamp = msgs.ns_to_stamp(stamp_ns)
    return message


def compressed(rgb: np.ndarray, kind: str = ".jpg", stamp_ns: int = T0) -> CompressedImage:
    data = cv2.imencode(kind, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
    message = CompressedImage(format="jpeg" if kind == ".jpg" else "png", data=array.array("B", data))
    message.header.stamp = msgs.ns_to_stamp(stamp_ns)
    return message


def colours(height: int = 64, width: int = 96) -> np.ndarray:
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2, 0] = 200
    rgb[:, width // 2 :, 2] = 220
    return rgb


@pytest.mark.parametrize("kind", [".jpg", ".png"])
def test_compressed_pictures_come_out_as_rgb(kind: str) -> None:
    rgb = compressed_to_rgb(compressed(colours(), kind), "front")
    assert rgb.shape == (64, 96, 3) and rgb.dtype == np.uint8
    np.testing.assert_allclose(rgb.astype(int), colours().astype(int), atol=0 if kind == ".png" else 80)
    assert rgb[30, 10, 0] > 180 > rgb[30, 10, 2] and rgb[30, 90, 2] > 180 > rgb[30, 90, 0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"GIF89a" + data,
        lambda data: data[:4] + bytes(200),
        lambda data: bytes(33 * 1024 * 1024),
    ],
    ids=["cut off", "empty", "another format", "garbage", "too large"],
)
def test_corrupt_picture_is_dropped_and_counted_and_never_raises(damage) -> None:
    fixture = Fixture(transport="compressed", topic="front/image/compressed")
    message = compressed(colours())
    message.data = array.array("B", damage(message.data.tobytes()))
    fixture.intake.on_image("front", message, T0)
    assert fixture.newest() is None and fixture.buffer.counters["front:undecodable"] == 1
    fixture.intake.on_image("front", compressed(colours(), stamp_ns=T0 + MS), T0 + MS)
    assert fixture.newest().shape == (64, 96, 3)


def test_header_that_claims_a_giant_picture_is_refused_before_it_is_decoded(monkeypatch) -> None:
    monkeypatch.setattr(image_decoding, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ObservationError, match="96x64 px cannot be"):
        compressed_to_rgb(compressed(colours()), "front")


def test_thread_decodes_the_newest_picture_off_the_callback() -> None:
    data = contract_dict()
    data["cameras"][0].update(transport="compressed", topic="front/image/compressed")
    contract = contract_from_dict(data)
    buffer, done = ObservationBuffer(contract), threading.Event()
    intake = Intake(contract, SIZES, buffer, Notices(), on_decoded=done.set)
    intake.on_image("front", compressed(colours()), T0)
    assert done.wait(30.0) and buffer.newest_images()["front"].shape == (64, 96, 3)
    intake.close()


def test_only_the_newest_waiting_item_of_a_key_is_worked_on() -> None:
    seen, go, begun, end = [], threading.Event(), threading.Event(), threading.Event()

    def work(key: str, item: int) -> None:
        begun.set()
        assert go.wait(30.0)
        seen.append((key, item))
        if item == 9:
            end.set()

    worker = LatestOnly(work, "test")
    worker.put("a", 0)
    assert begun.wait(30.0)
    for item in (1, 2, 9):
        worker.put("a", item)
    go.set()
    assert end.wait(30.0)
    worker.close()
    assert seen == [("a", 0), ("a", 9)]


def test_wrong_encoding_is_one_error_and_another_one_after_it_was_good(caplog) -> None:
    fixture = Fixture(encoding="rgb8")
    with caplog.at_level(logging.ERROR):
        for k in range(5):
            fixture.intake.on_image("front", raw(T0 + k * MS, "bgr8"), T0 + k * MS)
    assert len(caplog.records) == 1
    assert "'front/image_raw': encoding 'bgr8', the contract expects 'rgb8'" in caplog.text
    assert fixture.newest() is None
    fixture.intake.on_image("front", raw(T0 + 10 * MS), T0 + 10 * MS)
    assert fixture.newest() is not None
    with caplog.at_level(logging.ERROR):
        fixture.intake.on_image("front", raw(T0 + 20 * MS, "16UC1"), T0 + 20 * MS)
    assert len(caplog.records) == 2


def test_change_of_size_is_noticed_once_and_the_picture_taken() -> None:
    fixture = Fixture()
    fixture.intake.on_image("front", raw(T0), T0)
    fixture.intake.on_image("front", raw(T0 + MS, height=96, width=128), T0 + MS)
    assert fixture.newest().width == 128
    assert [text for text in fixture.notices.texts if "changed from 64x64 to 128x96 px" in text]
    fixture.notices.update(T0 + 20 * 10**9)
    fixture.intake.on_image("front", raw(T0 + 20 * 10**9, height=96, width=128), T0 + 20 * 10**9)
    assert fixture.notices.texts == []


def test_picture_of_another_frame_is_noticed_and_taken() -> None:
    fixture = Fixture(frame_id="front_optical_frame")
    message = raw(T0)
    message.header.frame_id = "front_optical_frame"
    fixture.intake.on_image("front", message, T0)
    assert fixture.notices.texts == []
    message = raw(T0 + MS)
    message.header.frame_id = "wrist_optical_frame"
    fixture.intake.on_image("front", message, T0 + MS)
    (text,) = fixture.notices.texts
    assert "'front/image_raw' comes from the frame 'wrist_optical_frame'" in text and "swapped" in text
    assert fixture.newest() is message


def test_zero_and_future_stamps_are_said_with_the_offset() -> None:
    fixture = Fixture()
    fixture.intake.on_image("front", raw(0), T0)
    assert fixture.newest() is not None
    assert "carry no stamp: the time of receipt is used" in fixture.notices.texts[0]
    fixture.intake.on_image("front", raw(T0 + 2_000 * MS), T0 + MS)
    assert any("'front/image_raw' is stamped 1.999 s in the future" in text for text in fixture.notices.texts)


def joints(stamp_ns: int) -> JointState:
    message = JointState(name=["shoulder", "finger"], position=[0.0, 0.02])
    message.header.stamp = msgs.ns_to_stamp(stamp_ns)
    return message


@pytest.mark.parametrize(("offset_ms", "side"), [(2_000, "behind"), (-2_000, "ahead of")])
def test_another_clock_is_found_with_its_offset_and_the_remedy(offset_ms: int, side: str) -> None:
    fixture = Fixture()
    for k in range(6):
        now = T0 + k * 50 * MS
        fixture.intake.on_joint_states(joints(now), now)
        fixture.intake.on_image("front", raw(now - offset_ms * MS), now)
    skew = fixture.buffer.clock_skew()
    assert f"'front/image_raw' are 2.00 s {side} this node's clock" in skew
    assert "synchronize the clocks" in skew and "stamp_source to 'receive'" in skew


def test_frozen_camera_is_no_other_clock() -> None:
    fixture = Fixture()
    for k in range(6):
        fixture.intake.on_image("front", raw(T0), T0 + k * 1_000 * MS)
    assert fixture.buffer.clock_skew() is None


def test_by_receipt_the_clock_of_a_camera_does_not_matter_but_repetitions_do() -> None:
    buffer = ObservationBuffer(toy_contract(), "receive")
    for k in range(6):
        now = T0 + k * 50 * MS
        for key in ("front", "wrist"):
            assert buffer.add_image(key, "image", now - 2_000 * MS, now) is None
        assert buffer.add_joints(["shoulder", "finger"], [0.0, 0.02], now - 9_000 * MS, now) is None
    assert buffer.clock_skew() is None and not isinstance(buffer.assemble(now), NotReady)
    assert buffer.add_image("front", "image", now - 2_000 * MS, now + 10 * MS) == "repeated"
    assert buffer.add_image("front", "image", now - 2_100 * MS, now + 10 * MS) == "old"
    assert "stale" in buffer.problem(now + 300 * MS).reason


def test_shorter_timeouts_are_taken_and_longer_ones_are_not() -> None:
    buffer = ObservationBuffer(toy_contract())
    for key in ("front", "wrist"):
        buffer.add_image(key, "image", T0, T0)
    buffer.add_joints(["shoulder", "finger"], [0.0, 0.02], T0, T0)
    buffer.tighten(0.1, None)
    assert buffer.problem(T0 + 90 * MS) is None
    assert "limit 0.100 s" in buffer.problem(T0 + 101 * MS).reason
    buffer.clear()
    buffer.tighten(9.0, 9.0)
    for key in ("front", "wrist"):
        buffer.add_image(key, "image", T0, T0)
    buffer.add_joints(["shoulder", "finger"], [0.0, 0.02], T0, T0)
    assert "limit 0.100 s" in buffer.problem(T0 + 251 * MS).reason  # the joints' own


@pytest.mark.parametrize(
    ("rule", "shape"), [("checkpoint", (48, 96)), ("stretch", (64, 64)), ("pad", (96, 96)), ("crop", (48, 48))]
)
def test_aspect_is_changed_by_the_contracts_rule(rule: str, shape: tuple[int, int]) -> None:
    rgb = colours(48, 96)
    changed = to_aspect(rgb, rule, 64, 64)
    assert changed.shape == (*shape, 3)
    if rule == "pad":
        np.testing.assert_array_equal(changed[24:72], rgb)
        assert not changed[:24].any() and not changed[72:].any()
    if rule == "crop":
        np.testing.assert_array_equal(changed, rgb[:, 24:72])


def test_right_aspect_is_left_alone_whatever_the_rule() -> None:
    rgb = colours(64, 64)
    for rule in ("checkpoint", "stretch", "pad", "crop"):
        assert to_aspect(rgb, rule, 32, 32) is rgb


def test_any_object_with_the_fields_is_a_message() -> None:
    """Messages of recorded bags are other classes."""
    fixture = Fixture()
    stamp = SimpleNamespace(sec=T0 // 10**9, nanosec=T0 % 10**9)
    message = SimpleNamespace(
        header=SimpleNamespace(stamp=stamp), height=64, width=64, encoding="rgb8", step=192, data=bytes(64 * 192)
    )
    fixture.intake.on_image("front", message, T0)
    assert fixture.newest() is message

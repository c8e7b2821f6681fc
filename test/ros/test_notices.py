"""Notices about pictures: black, and the same bytes under new stamps."""

from __future__ import annotations

import numpy as np

from omega_qvla_ros.notices import ImageWatch, Notices

S = 10**9


def picture(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_black_picture_is_noticed_and_forgotten() -> None:
    notices = Notices()
    watch = ImageWatch({"front": "front/image_raw"}, notices)
    watch.look("front", picture(5), S)
    assert notices.texts == ["'front/image_raw' is black; is the lens covered, is there light, is it exposed?"]
    watch.look("front", picture(90), 2 * S)
    assert notices.texts == []


def test_same_bytes_under_new_stamps_are_noticed_after_a_second() -> None:
    notices = Notices()
    watch = ImageWatch({"front": "front/image_raw"}, notices)
    for k in range(10):
        watch.look("front", picture(90), S + k * S // 10)
    assert notices.texts == []
    watch.look("front", picture(90), 2 * S)
    assert "repeats the same picture under new stamps for 1.0 s" in notices.texts[0]
    watch.look("front", picture(91), 3 * S)
    assert notices.texts == []


def test_notice_with_an_end_goes_by_itself() -> None:
    notices = Notices()
    notices.set("a", "text", until_ns=5)
    notices.update(4)
    assert notices.texts == ["text"]
    notices.update(5)
    assert notices.texts == []

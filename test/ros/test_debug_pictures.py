"""What is drawn for people."""

from __future__ import annotations

import numpy as np
from robot_fixtures import T0
from session_rig import Rig

from omega_qvla_ros.nodes.debug import MIN_WIDTH_PX, annotate, predicted


def test_pictures_stand_side_by_side_over_their_text() -> None:
    left, right = np.full((200, 300, 3), 10, np.uint8), np.full((100, 100, 3), 20, np.uint8)
    plain = annotate([left, right], ("OK",), alarmed=False)
    assert plain.dtype == np.uint8 and plain.shape[1] == 500 and plain.shape[0] > 200
    assert (plain[100, :300] == 10).all() and (plain[100, 300:] == 20).all()
    text = plain[200:]
    assert text.any() and (text[..., 0] == text[..., 1]).all()  # white
    alarmed = annotate([left, right], ("LATCHED",), alarmed=True)[200:]
    assert (alarmed[..., 0] > alarmed[..., 1]).any()


def test_long_text_is_wrapped_small_pictures_are_enlarged_and_no_picture_is_none() -> None:
    short = annotate([np.zeros((64, 64, 3), np.uint8)], ("a",), False)
    assert short.shape[1] == MIN_WIDTH_PX
    long = annotate([np.zeros((64, 64, 3), np.uint8)], ("a" * 500, "ü" * 20), False)
    assert long.shape[0] > short.shape[0]
    assert annotate([], ("nothing",), True).shape[1] == MIN_WIDTH_PX


def test_prediction_goes_from_now_to_the_end_of_the_plan() -> None:
    rig = Rig()
    rig.run(10)
    plan = rig.session.motion.plan
    way = predicted(plan, rig.now)
    np.testing.assert_allclose(way[0], plan.sample(rig.now)[0])
    np.testing.assert_allclose(way[-1], plan.positions[-1])
    assert len(predicted(None, T0)) == 0 and len(predicted(plan, plan.end_ns)) == 0
    rig.session.close()

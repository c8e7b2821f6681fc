"""Putting streams together: ages, order, future stamps, synchronization, joints by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from robot_fixtures import T0, toy_contract, toy_spec

from omega_qvla_ros.contract import check_policy
from omega_qvla_ros.observation import NotReady, ObservationBuffer, Snapshot

MS = 1_000_000
NAMES = ["shoulder", "finger"]


def filled(stamp_ns: int = T0) -> ObservationBuffer:
    buffer = ObservationBuffer(toy_contract())
    for key in ("front", "wrist"):
        assert buffer.add_image(key, f"{key}@{stamp_ns}", stamp_ns, stamp_ns) is None
    assert buffer.add_joints(NAMES, [0.5, 0.01], stamp_ns, stamp_ns) is None
    return buffer


def test_complete_set_is_one_observation() -> None:
    snapshot = filled().assemble(T0 + 5 * MS)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.images == {"front": f"front@{T0}", "wrist": f"wrist@{T0}"}
    assert snapshot.stamp_ns == T0
    observation = snapshot.observation({}, "go", check_policy(toy_contract(), toy_spec()))
    np.testing.assert_array_equal(observation.state, [0.01, 0.5])  # the checkpoint's order
    assert observation.instruction == "go"


@pytest.mark.parametrize("missing", ["front", "wrist", "joints"])
def test_missing_stream_is_named_by_topic(missing: str) -> None:
    buffer = ObservationBuffer(toy_contract())
    for key in ("front", "wrist"):
        if key != missing:
            buffer.add_image(key, 0, T0, T0)
    if missing != "joints":
        buffer.add_joints(NAMES, [0, 0], T0, T0)
    result = buffer.assemble(T0)
    assert isinstance(result, NotReady)
    assert result.stream == {"joints": "joint_states"}.get(missing, f"{missing}/image_raw")
    assert "nothing received on" in result.reason


def test_stale_stream_holds_and_resumes_after_three_fresh_samples() -> None:
    buffer = filled()
    for at in range(T0 + 50 * MS, T0 + 251 * MS, 50 * MS):
        buffer.add_joints(NAMES, [0, 0], at, at)
        buffer.add_image("wrist", 0, at, at)
        assert buffer.problem(at) is None
    at = T0 + 251 * MS
    problem = buffer.problem(at)
    assert problem is not None and problem.stream == "front/image_raw" and "0.251 s old" in problem.reason
    for k in range(3):
        assert buffer.problem(at) is not None, k
        at += 50 * MS
        buffer.add_image("front", 0, at, at)
        buffer.add_image("wrist", 0, at, at)
        buffer.add_joints(NAMES, [0, 0], at, at)
    assert buffer.problem(at) is None


def test_joint_states_time_out_earlier() -> None:
    buffer = filled()
    assert buffer.problem(T0 + 100 * MS) is None
    problem = buffer.problem(T0 + 101 * MS)
    assert problem is not None and problem.stream == "joint_states"


def test_gap_between_two_ticks_is_noticed() -> None:
    buffer = filled()
    at = T0 + 400 * MS
    for key in ("front", "wrist"):
        buffer.add_image(key, 0, at, at)
    buffer.add_joints(NAMES, [0, 0], at, at)
    problem = buffer.problem(at)
    assert problem is not None and "came back" in problem.reason


@pytest.mark.parametrize(
    ("stamp", "kind"), [(T0 - MS, "old"), (T0, "repeated"), (T0 + 160 * MS, "future"), (T0 + 140 * MS, None)]
)
def test_order_and_future(stamp: int, kind: str | None) -> None:
    buffer = filled()
    assert buffer.add_image("front", "new", stamp, T0 + 100 * MS) == kind
    if kind:
        assert buffer.counters[f"front:{kind}"] == 1
    assert buffer.add_joints(NAMES, [0, 0], stamp, T0 + 100 * MS) == kind


def test_zero_stamp_counts_as_received_now() -> None:
    buffer = filled()
    assert buffer.add_image("front", "new", 0, T0 + 10 * MS) is None
    assert buffer.counters["front:zero_stamp"] == 1
    assert buffer.ages_s(T0 + 30 * MS)["front/image_raw"] == pytest.approx(0.02)


def test_frozen_camera_with_one_stamp_becomes_stale() -> None:
    buffer = filled()
    for k in range(1, 6):
        at = T0 + k * 60 * MS
        buffer.add_image("front", "same", T0, at)
        buffer.add_image("wrist", 0, at, at)
        buffer.add_joints(NAMES, [0, 0], at, at)
    problem = buffer.problem(T0 + 300 * MS)
    assert problem is not None and problem.stream == "front/image_raw"


def test_cameras_are_paired_by_stamp() -> None:
    """The front camera's newer frame waits for its partner: the set stays one moment."""
    buffer = filled()
    buffer.add_joints(NAMES, [0.6, 0.01], T0 + 50 * MS, T0 + 50 * MS)
    buffer.add_image("front", "front-new", T0 + 50 * MS, T0 + 50 * MS)
    snapshot = buffer.assemble(T0 + 51 * MS)
    assert isinstance(snapshot, Snapshot) and snapshot.stamp_ns == T0 and snapshot.positions[0] == 0.5
    buffer.add_image("wrist", "wrist-new", T0 + 50 * MS, T0 + 52 * MS)
    snapshot = buffer.assemble(T0 + 52 * MS)
    assert isinstance(snapshot, Snapshot) and snapshot.stamp_ns == T0 + 50 * MS
    assert snapshot.images == {"front": "front-new", "wrist": "wrist-new"} and snapshot.positions[0] == 0.6


def test_streams_too_far_apart_are_no_observation() -> None:
    buffer = ObservationBuffer(toy_contract())
    buffer.add_image("front", 0, T0, T0)
    buffer.add_image("wrist", 0, T0 + 60 * MS, T0 + 60 * MS)
    buffer.add_joints(NAMES, [0, 0], T0 + 60 * MS, T0 + 60 * MS)
    result = buffer.assemble(T0 + 60 * MS)
    assert isinstance(result, NotReady) and "front/image_raw" in result.reason and "behind" in result.reason


def test_joints_split_over_two_messages_in_any_order_with_strangers() -> None:
    buffer = ObservationBuffer(toy_contract())
    assert buffer.add_joints(["lift", "finger"], [9.0, 0.03], T0, T0) is None
    problem = buffer.problem(T0)
    assert problem is not None and "lacks joint 'shoulder'" in problem.reason
    assert buffer.add_joints(["shoulder"], [0.7], T0 + MS, T0 + MS) is None
    np.testing.assert_array_equal(buffer.joint_positions(T0 + MS), [0.7, 0.03])
    assert buffer.add_joints(["lift"], [9.0], T0 + 2 * MS, T0 + 2 * MS) == "foreign"


def test_half_of_a_split_joint_state_that_stops_is_stale() -> None:
    buffer = ObservationBuffer(toy_contract())
    buffer.add_joints(["finger"], [0.03], T0, T0)
    for k in range(12):
        at = T0 + k * 10 * MS
        buffer.add_joints(["shoulder"], [0.7], at, at)
    problem = buffer.problem(T0 + 110 * MS)
    assert problem is not None and "joint 'finger'" in problem.reason
    assert buffer.joint_positions(T0 + 110 * MS) is None


def test_joint_that_is_not_finite_is_rejected_by_name_and_goes_stale() -> None:
    buffer = filled()
    assert buffer.add_joints(NAMES, [np.nan, 0.0], T0 + MS, T0 + MS) == "not_finite: joint 'shoulder'"
    assert buffer.add_joints(["stranger", *NAMES], [np.nan, 0.1, 0.0], T0 + MS, T0 + MS) is None
    assert buffer.counters["joint_states:not_finite"] == 1


def test_fewer_positions_than_names() -> None:
    assert filled().add_joints(NAMES, [1.0], T0 + MS, T0 + MS) == "length"


def test_clear_forgets_and_refuses_samples_from_before() -> None:
    buffer = filled()
    buffer.clear(not_before_ns=T0 + 10 * MS)
    assert buffer.joint_positions(T0) is None
    assert buffer.add_image("front", 0, T0 + 9 * MS, T0 + 11 * MS) == "before_restart"
    assert buffer.add_image("front", 0, T0 + 10 * MS, T0 + 11 * MS) is None


@given(st.permutations(["shoulder", "finger", "x", "y"]), st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_joint_order_in_the_message_never_matters(names: list[str], values: list[float]) -> None:
    buffer = ObservationBuffer(toy_contract())
    buffer.add_joints(names, values, T0, T0)
    expected = dict(zip(names, values))
    np.testing.assert_array_equal(buffer.joint_positions(T0), [expected["shoulder"], expected["finger"]])


@pytest.mark.parametrize(
    ("topic", "send", "words"),
    [
        (
            "joint_states",
            lambda b: b.add_joints(["lift"], [1.0], T0, T0),
            "none of the joints shoulder, finger, but lift",
        ),
        ("joint_states", lambda b: b.add_joints(NAMES, [1.0], T0, T0), "1 positions for 2 names"),
        ("joint_states", lambda b: b.add_joints(NAMES, [1.0, np.nan], T0, T0), "joint 'finger' is not finite"),
        ("joint_states", lambda b: b.add_joints(NAMES, [1.0, 0.0], T0 + 2000 * MS, T0), "2.000 s in the future"),
        ("front/image_raw", lambda b: b.add_image("front", 0, T0 + 2000 * MS, T0), "synchronize the clocks"),
        ("front/image_raw", lambda b: b.refuse_image("front", "encoding '16UC1' is not understood"), "'16UC1'"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_stream_whose_messages_are_all_refused_says_why(topic: str, send, words: str, before: bool) -> None:
    """Not "nothing received": the user would look for a missing publisher."""
    buffer = ObservationBuffer(toy_contract())
    at = T0 - 1000 * MS
    if before or topic != "joint_states":
        buffer.add_joints(NAMES, [0, 0], at if topic == "joint_states" else T0, T0)
    if before:
        buffer.add_image("front", 0, at, at)
    send(buffer)
    problem = buffer.problem(T0)
    assert problem is not None and problem.stream == topic
    assert words in problem.reason and topic in problem.reason and "nothing received" not in problem.reason
    assert ("is stale" in problem.reason) == before
    stamp_ns = T0 + 10 * MS
    buffer.add_joints(NAMES, [0, 0], stamp_ns, stamp_ns)
    buffer.add_image("front", 0, stamp_ns, stamp_ns)
    assert words not in buffer.problem(stamp_ns).reason


def test_velocity_is_the_difference_over_one_period_however_often_joint_states_come() -> None:
    buffer = ObservationBuffer(toy_contract())
    assert buffer.joint_velocities() is None
    for k in range(20):
        buffer.add_joints(NAMES, [0.005 * k, 0.02], T0 + 10 * MS * k, T0 + 10 * MS * k)
    np.testing.assert_allclose(buffer.joint_velocities(), [0.5, 0.0])
    buffer.clear()
    buffer.add_joints(NAMES, [0.0, 0.0], T0, T0)
    assert buffer.joint_velocities() is None

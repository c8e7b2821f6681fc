"""Messages as they should not come: damaged, out of order, stamped wrongly, incomplete."""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, toy_contract
from sensor_msgs.msg import Image, JointState
from session_rig import NAMES, Rig

from omega_qvla_core.errors import ObservationError
from omega_qvla_ros import image_decoding, msgs
from omega_qvla_ros.observation import NotReady, ObservationBuffer
from omega_qvla_ros.safety_state import State

MS = 1_000_000


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.run(10)
    yield made
    made.close()


@pytest.fixture
def buffer() -> ObservationBuffer:
    return ObservationBuffer(toy_contract())


def fill(buffer: ObservationBuffer, now_ns: int) -> None:
    for key in ("front", "wrist"):
        assert buffer.add_image(key, "image", now_ns, now_ns) is None
    assert buffer.add_joints(NAMES, [0.1, 0.02], now_ns, now_ns) is None


def padded(width: int, height: int, pad: int, whole_last_row: bool) -> tuple[Image, np.ndarray]:
    """An image whose rows have ``pad`` bytes too many, and its true pixels."""
    pixels = np.random.default_rng(pad).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = np.full((height, 3 * width + pad), 170, dtype=np.uint8)
    rows[:, : 3 * width] = pixels.reshape(height, -1)
    data = rows.tobytes() if whole_last_row or not pad else rows.tobytes()[:-pad]
    message = Image(height=height, width=width, encoding="rgb8", step=rows.shape[1], data=array.array("B", data))
    return message, pixels


@pytest.mark.parametrize("pad", [1, 2, 3, 16, 61])
@pytest.mark.parametrize("whole_last_row", [True, False])
def test_fault_05_padded_rows_are_decoded_to_the_right_pixels(pad: int, whole_last_row: bool) -> None:
    message, pixels = padded(7, 5, pad, whole_last_row)
    np.testing.assert_array_equal(msgs.image_to_rgb(message, "front/image_raw"), pixels)


@pytest.mark.parametrize("missing", [1, 3, 20, 104, 105])
def test_fault_05_short_data_is_refused_by_name_and_never_reshaped(missing: int) -> None:
    message, _ = padded(7, 5, 0, True)
    message.data = message.data[: len(message.data) - missing]
    for look in (image_decoding.check_image, msgs.image_to_rgb):
        with pytest.raises(ObservationError, match=rf"'front/image_raw': {105 - missing} bytes of data, 105 needed"):
            look(message, "front/image_raw")


@pytest.mark.parametrize(
    ("height", "width", "step"), [(0, 7, 21), (5, 0, 21), (5, 7, 0), (5, 7, 20), (2**31, 2**31, 21)]
)
def test_fault_05_header_that_does_not_fit_its_data_is_refused(height: int, width: int, step: int) -> None:
    message, _ = padded(7, 5, 0, True)
    message.height, message.width, message.step = height, width, step
    with pytest.raises(ObservationError, match="'front/image_raw'"):
        image_decoding.check_image(message, "front/image_raw", 1, 1)


def test_fault_08_older_image_is_dropped_and_counted_and_the_newer_one_stays(rig: Rig) -> None:
    newest_ns = rig.now
    for late_ns in (1, PERIOD_NS, 3 * PERIOD_NS):
        assert rig.session.buffer.add_image("front", "late", newest_ns - late_ns, rig.now + 1) == "old"
    assert rig.session.buffer.counters["front:old"] == 3
    snapshot = rig.session.buffer.assemble(rig.now)
    assert not isinstance(snapshot, NotReady) and snapshot.images["front"] == "image"
    rig.run(5)
    assert rig.state is State.OK
    assert all(observation.images for observation, _ in rig.policy.seen)


def test_fault_08_images_that_only_come_out_of_order_are_stale(rig: Rig) -> None:
    """Dropped frames are no sign of life."""
    rig.sensors.discard("front")
    newest_ns = rig.now
    for k in range(8):
        rig.session.buffer.add_image("front", "late", newest_ns - 1 - k, rig.now)
        rig.tick()
    assert rig.state is State.HOLD and "older than that of the message before" in rig.session.safety.reasons[0]


@pytest.mark.parametrize(("ahead_ms", "dropped"), [(49, False), (50, False), (51, True), (2000, True)])
def test_fault_09_stamp_in_the_future_is_dropped_beyond_the_tolerance(
    buffer: ObservationBuffer, ahead_ms: int, dropped: bool
) -> None:
    reason = buffer.add_image("front", "image", T0 + ahead_ms * MS, T0)
    assert reason == ("future" if dropped else None)
    assert buffer.counters["front:future"] == int(dropped)


def test_fault_09_future_stamps_hold_and_name_the_skew(rig: Rig) -> None:
    rig.sensors.discard("front")
    for _ in range(8):
        rig.session.buffer.add_image("front", "image", rig.now + 2_000 * MS, rig.now)
        rig.tick()
    assert rig.state is State.HOLD
    reason = rig.session.safety.reasons[0]
    assert "'front/image_raw'" in reason and "2.000 s in the future" in reason and "synchronize the clocks" in reason


def test_fault_09_zero_stamp_counts_as_received_now(rig: Rig) -> None:
    rig.sensors.discard("front")
    for _ in range(12):
        rig.session.buffer.add_image("front", "unstamped", 0, rig.now)
        rig.tick()
    assert rig.state in (State.OK, State.DEGRADED) and rig.speed > 0.0
    assert rig.session.buffer.counters["front:zero_stamp"] == 12
    assert rig.policy.seen[-1][0].images


@pytest.mark.parametrize("order", list(itertools.permutations(["shoulder", "finger", "wheel"])))
def test_fault_12_joints_in_any_order_with_strangers_are_taken_by_name(
    buffer: ObservationBuffer, order: tuple[str, ...]
) -> None:
    values = {"shoulder": 0.3, "finger": 0.01, "wheel": 99.0}
    fill(buffer, T0)
    assert buffer.add_joints(order, [values[name] for name in order], T0 + MS, T0 + MS) is None
    np.testing.assert_array_equal(buffer.joint_sample()[1], [0.3, 0.01])


def test_fault_12_split_messages_are_merged_and_as_old_as_their_oldest_joint(buffer: ObservationBuffer) -> None:
    fill(buffer, T0)
    assert buffer.add_joints(["finger"], [0.03], T0 + 40 * MS, T0 + 40 * MS) is None
    assert buffer.joint_sample()[0] == T0  # the shoulder's
    assert buffer.add_joints(["shoulder"], [0.2], T0 + 30 * MS, T0 + 41 * MS) is None
    stamp_ns, positions = buffer.joint_sample()
    assert stamp_ns == T0 + 30 * MS
    np.testing.assert_array_equal(positions, [0.2, 0.03])


def test_fault_12_messages_without_our_joints_are_no_sign_of_life(rig: Rig) -> None:
    rig.sensors.discard("joints")
    for _ in range(5):
        assert rig.session.buffer.add_joints(["wheel"], [1.0], rig.now + 1, rig.now + 1) == "foreign"
        rig.tick()
    assert rig.state is State.HOLD and "none of the joints shoulder, finger" in rig.session.safety.reasons[0]


def test_fault_12_joint_with_a_topic_of_its_own_is_taken_from_there_only() -> None:
    """A publisher that repeats every joint of the URDF must not overwrite what another one has measured."""
    source = {"topic": "hand/joint_states", "joints": ["finger"], "timeout_s": 0.3}
    buffer = ObservationBuffer(toy_contract(sensors={"joint_sources": [source]}))
    fill(buffer, T0)
    lacking = buffer.problem(T0)
    assert lacking is not None and lacking.stream == "hand/joint_states"
    assert buffer.joint_positions(T0) is None and buffer.joint_sample() is None
    for k in range(3):
        now_ns = T0 + (k + 1) * MS
        assert buffer.add_joints(NAMES, [9.0, 0.01], now_ns, now_ns, "hand/joint_states") is None
        assert buffer.add_joints(NAMES, [0.1, 0.04], now_ns, now_ns) is None
    np.testing.assert_array_equal(buffer.joint_sample()[1], [0.1, 0.01])
    np.testing.assert_array_equal(buffer.joint_positions(T0 + 3 * MS), [0.1, 0.01])
    assert buffer.add_joints(["shoulder"], [9.0], T0 + 4 * MS, T0 + 4 * MS, "hand/joint_states") == "foreign"
    assert buffer.counters["hand/joint_states:foreign"] == 1
    # The hand is slower than the tolerance between streams allows; its own timeout says how old it may be.
    for k in range(4, 204, 50):
        for key in ("front", "wrist"):
            buffer.add_image(key, "image", T0 + k * MS, T0 + k * MS)
        buffer.add_joints(NAMES, [0.001 * k, 0.04], T0 + k * MS, T0 + k * MS)
    snapshot = buffer.assemble(T0 + 154 * MS)
    assert not isinstance(snapshot, NotReady)
    np.testing.assert_allclose(snapshot.positions, [0.154, 0.01])
    np.testing.assert_allclose(buffer.joint_velocities(), [1.0, 0.0])


def test_fault_14_source_called_joint_states_does_not_freshen_the_main_topic() -> None:
    """As on xArm. By receipt, a stamp that was there before keeps its time; each topic has stamps of its own."""
    sensors = {
        "joint_states_topic": "broadcaster/joint_states",
        "joint_sources": [{"topic": "joint_states", "joints": ["finger"], "timeout_s": 0.3}],
    }
    buffer = ObservationBuffer(toy_contract(sensors=sensors), "receive")
    for k in range(20):
        now_ns = T0 + k * 50 * MS
        buffer.add_joints(NAMES, [0.1, 0.04], 7, now_ns, "broadcaster/joint_states")  # a dead arm: the same stamp
        buffer.add_joints(NAMES, [0.1, 0.04], now_ns, now_ns, "joint_states")
    problem = buffer._problem(now_ns)
    assert problem is not None and "broadcaster/joint_states" in problem.reason


def test_fault_15_joint_states_without_velocities_are_differenced(rig: Rig) -> None:
    message = JointState(name=list(NAMES), position=[0.1, 0.02])
    assert msgs.joint_positions_by_name(message) == {"shoulder": 0.1, "finger": 0.02}
    assert msgs.joint_velocities_by_name(message) == {}
    rig.session.buffer.clear()
    start_ns = rig.now
    for k in range(6):
        now_ns = start_ns + k * 10 * MS
        assert rig.session.buffer.add_joints(list(NAMES), [0.1 + 0.5 * k * 0.01, 0.02], now_ns, now_ns) is None
    velocity = rig.session.buffer.joint_velocities()
    np.testing.assert_allclose(velocity, [0.5, 0.0], atol=1e-9)


def test_fault_15_velocity_is_unknown_until_two_samples_came_and_motion_begins_from_rest(
    buffer: ObservationBuffer,
) -> None:
    fill(buffer, T0)
    assert buffer.joint_velocities() is None

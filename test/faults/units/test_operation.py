"""Starts that get no data, the emergency stop, a device that is lost, a late timer; with injected clocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fault_checks import check_hold, hold_after, run_until
from robot_fixtures import PERIOD_NS
from session_rig import Rig

from omega_qvla_core.runtime import device_errors
from omega_qvla_ros.emergency_stop import EmergencyStop, Refused
from omega_qvla_ros.safety_state import State


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.run(10)
    yield made
    made.close()


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_fault_01_topic_and_qos_are_named_after_five_seconds_and_the_start_is_aborted_after_thirty(
    camera: str, record_property
) -> None:
    rig = Rig()
    rig.sensors.discard(camera)
    started_ns = rig.now
    named_ns = aborted_ns = None
    for _ in range(31 * 20):
        assert rig.tick() is None
        reasons = "; ".join(rig.session.safety.reasons)
        if named_ns is None and f"no usable data from '{camera}/image_raw'" in reasons:
            named_ns = rig.now
            assert "QoS" in reasons
        if aborted_ns is None and "start aborted after 30 s" in reasons:
            aborted_ns = rig.now
            assert f"'{camera}/image_raw'" in reasons
    assert rig.policy.seen == [] and rig.sent == []
    assert named_ns is not None and aborted_ns is not None
    assert 5.0e9 < named_ns - started_ns <= 5.0e9 + 2 * PERIOD_NS
    # Counted from the first control period after the start.
    assert aborted_ns - (started_ns + PERIOD_NS) == 30_000_000_000 + PERIOD_NS
    rig.sensors.add(camera)
    rig.run(40)
    assert rig.policy.seen == []  # the camera alone does not start it again
    rig.session.start(rig.now)
    rig.run(10)
    assert rig.state is State.OK and rig.speed > 0.0
    rig.close()


def test_fault_42_emergency_stop_holds_within_its_period_and_is_reset_half_a_second_after_release(
    rig: Rig, record_property
) -> None:
    wall_s = [100.0]
    rig.session.emergency_stop = EmergencyStop(monotonic=lambda: wall_s[0])
    pressed_ns = rig.now + PERIOD_NS // 3
    rig.session.press_emergency_stop("~/e_stop", True, pressed_ns)
    message = rig.session.motion.tick(pressed_ns)
    assert message is not None and rig.state is State.LATCHED  # in the callback, not at the next tick
    record_property("fault_to_hold_s", 0.0)
    record_property("bound_s", PERIOD_NS * 1e-9)
    check_hold([message, *(later for later in rig.run(8) if later is not None)])
    planned = len(rig.policy.seen)
    rig.run(40)
    assert rig.speed == 0.0 and rig.state is State.LATCHED and len(rig.policy.seen) == planned
    with pytest.raises(Refused, match="release it first"):
        rig.session.reset_fault()
    rig.session.press_emergency_stop("~/e_stop", False, rig.now)
    wall_s[0] += 0.499
    with pytest.raises(Refused, match="0.5 s ago"):
        rig.session.reset_fault()
    wall_s[0] += 0.001
    assert "emergency stop" in "; ".join(rig.session.reset_fault())
    rig.run(20)
    assert rig.speed == 0.0  # needs a start, too
    rig.session.start(rig.now)
    rig.run(10)
    assert rig.state is State.OK and rig.speed > 0.0


DEVICE_ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: device-side assert triggered"),
    MemoryError(),
]


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=["out of memory", "device lost", "machine's memory"])
def test_fault_31_device_that_fails_latches_at_once_and_asks_to_be_deactivated(
    rig: Rig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    rig.policy.fault = error
    run_until(rig, State.LATCHED)
    assert rig.session.safety.consecutive_errors <= 1  # not after three
    assert rig.session.deactivate_requested and emptied
    assert "device failed" in rig.session.safety.reasons[0] and type(error).__name__ in rig.session.safety.reasons[0]
    check_hold(hold_after(rig, 5))
    planned = len(rig.policy.seen)
    rig.policy.fault = None
    rig.run(40)
    assert rig.state is State.LATCHED and len(rig.policy.seen) == planned


def test_fault_31_other_errors_of_the_policy_are_no_device_errors() -> None:
    assert not any(map(device_errors.is_device_error, (ValueError("CUDA error"), RuntimeError("shape mismatch"))))


def test_fault_54_late_timer_is_noticed_and_commands_keep_their_stamps(rig: Rig) -> None:
    """Five periods without a tick; the plan is sampled by absolute time, so nothing drifts."""
    before = rig.session.motion.plan
    rig.now += 5 * PERIOD_NS
    message = rig.tick()
    assert message is not None and message.stamp_ns <= rig.now
    assert any("the control timer was 250 ms late" in text for text in rig.session.notices.texts)
    assert rig.session.ticks.late == 1 and rig.session.ticks.missed >= 5
    knots = set(before.times_ns.tolist())
    stamps = {message.stamp_ns + point.time_from_start_ns for point in message.points}
    assert knots & stamps  # knots of the plan from before the gap, at their own times

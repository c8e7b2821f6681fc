"""What an operator and the outputs do to a running session: gates, emergency stop, aborted starts, dry run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS
from session_rig import NAMES, Rig

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros import jtc
from omega_qvla_ros.emergency_stop import EmergencyStop, Refused
from omega_qvla_ros.guard import LimitScales
from omega_qvla_ros.motion import HOLD_REPEATS
from omega_qvla_ros.safety_state import State


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.session.close()


def reasons(rig: Rig) -> str:
    return "; ".join(rig.session.safety.reasons)


def test_disabled_arm_holds_within_one_period_and_resumes_from_where_it_is(rig: Rig) -> None:
    rig.run(10)
    assert rig.speed > 0.1
    rig.session.enable(False, rig.now)
    sent = [message for message in rig.run(12) if message is not None]
    assert len(sent) == HOLD_REPEATS and rig.speed == 0.0
    assert rig.state is State.HOLD and "disabled by ~/enable" in reasons(rig)
    assert "disabled" in rig.session.start_refusal()
    stands_at = rig.position()[0]
    rig.session.enable(True, rig.now)
    while rig.session.motion.plan is None:
        rig.tick()
    assert rig.state is State.OK and rig.session.motion.plan.positions[0, 0] == pytest.approx(stands_at, abs=1e-6)


def test_enable_alone_starts_nothing(rig: Rig) -> None:
    rig.session.stop(rig.now)
    rig.session.enable(False, rig.now)
    rig.session.enable(True, rig.now)
    assert rig.run(10) == [None] * 10 and rig.state is State.HOLD


def test_emergency_stop_holds_at_once_latches_and_needs_release_reset_and_start(rig: Rig) -> None:
    wall_s = [0.0]
    rig.session.emergency_stop = EmergencyStop(0.5, lambda: wall_s[0])
    rig.run(10)
    rig.session.press_emergency_stop("~/e_stop", True, rig.now)
    first = rig.session.motion.tick(rig.now)
    assert first is not None and jtc.validate(first, rig.now, NAMES) is None
    assert rig.state is State.LATCHED and "emergency stop" in reasons(rig)
    assert len([message for message in rig.run(12) if message is not None]) == HOLD_REPEATS - 1
    assert rig.speed == 0.0
    with pytest.raises(Refused, match="is pressed; release it first"):
        rig.session.reset_fault()
    rig.session.press_emergency_stop("~/e_stop", False, rig.now)
    assert rig.state is State.LATCHED
    wall_s[0] = 0.49
    with pytest.raises(Refused, match=r"released less than 0\.5 s ago"):
        rig.session.reset_fault()
    wall_s[0] = 0.5
    assert "emergency stop" in rig.session.reset_fault()[0]
    assert rig.run(8) == [None] * 8 and "~/start begins anew" in reasons(rig)
    rig.session.start(rig.now)
    rig.run(6)
    assert rig.state is State.OK and rig.speed > 0.0


def test_one_of_two_switches_is_enough_and_both_must_be_released() -> None:
    wall_s = [0.0]
    switch = EmergencyStop(0.5, lambda: wall_s[0])
    assert switch.refusal() is None
    assert switch.set("a", True) and switch.set("b", True)
    assert not switch.set("a", False)
    wall_s[0] = 10.0
    assert "b is pressed" in switch.refusal()
    switch.set("b", False)
    wall_s[0] = 11.0
    assert switch.refusal() is None


def test_activation_is_refused_while_the_switch_is_pressed(rig: Rig) -> None:
    rig.session.deactivate(rig.now)
    rig.session.press_emergency_stop("~/e_stop", True, rig.now)
    with pytest.raises(Refused, match="pressed"):
        rig.session.activate()


def test_start_without_data_is_given_up(rig: Rig) -> None:
    rig.sensors.discard("wrist")
    rig.session.start(rig.now)
    started = rig.now
    while rig.session.running:
        rig.tick()
        assert rig.now - started < 31 * 10**9
    assert rig.now - started == 30 * 10**9 + 2 * PERIOD_NS  # counted from the first control period
    assert "start aborted after 30 s" in reasons(rig) and "'wrist/image_raw'" in reasons(rig)
    rig.sensors.add("wrist")
    rig.run(10)
    assert rig.state is State.HOLD  # whoever pressed the button may have gone
    rig.session.start(rig.now)
    rig.run(6)
    assert rig.state is State.OK


def test_simulated_time_that_begins_after_the_start_is_no_waiting_time() -> None:
    rig = Rig()
    rig.session.start(0)  # /clock has not come yet
    rig.run(6)
    assert rig.session.running and rig.state is State.OK
    rig.session.close()


def test_running_session_that_loses_a_sensor_is_not_aborted(rig: Rig) -> None:
    rig.run(10)
    rig.sensors.discard("wrist")
    rig.run(31 * 20)
    assert rig.session.running and rig.state is State.HOLD
    rig.sensors.add("wrist")
    rig.run(10)
    assert rig.state is State.OK


def test_nobody_who_takes_the_commands_holds_and_somebody_new_gets_a_fresh_motion(rig: Rig) -> None:
    rig.run(10)
    rig.session.watch_output("nobody subscribes to 'joint_trajectory'", rig.now)
    rig.run(12)
    assert rig.state is State.HOLD and rig.speed == 0.0
    assert "nobody subscribes" in rig.session.start_refusal()
    epoch = rig.session.scheduler.epoch
    rig.session.watch_output(None, rig.now)
    assert rig.session.scheduler.epoch > epoch
    rig.run(6)
    assert rig.state is State.OK and rig.speed > 0.0


def test_goals_that_the_controller_gives_up_hold_and_latch_at_the_third(rig: Rig) -> None:
    for count in (1, 2, 3):
        rig.run(25)
        assert rig.state is State.OK
        rig.session.output_fault("goal aborted, error code -4 (PATH_TOLERANCE_VIOLATED)", rig.now)
        rig.tick()
        assert rig.state is (State.LATCHED if count == 3 else State.HOLD)
        assert "error code -4 (PATH_TOLERANCE_VIOLATED)" in reasons(rig)
    rig.session.reset_fault()
    rig.run(25)
    assert rig.state is State.OK


def test_lost_device_latches_at_once_and_asks_to_be_deactivated(rig: Rig) -> None:
    import torch

    rig.run(5)
    rig.policy.fault = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    while rig.state is not State.LATCHED:
        rig.tick()
    assert rig.session.deactivate_requested and rig.session.safety.consecutive_errors == 1
    assert "CUDA out of memory" in reasons(rig)
    rig.session.deactivate(rig.now)
    assert not rig.session.deactivate_requested
    rig.run(10)
    assert rig.speed == 0.0


def test_dry_run_plans_from_where_the_arm_is_measured() -> None:
    rig = Rig(dry_run=True)
    rig.position = lambda: [0.1, 0.02]  # nobody executes anything
    sent = [message for message in rig.run(60) if message is not None]
    assert rig.state is State.OK and len(sent) > 40
    for message in sent:
        assert abs(message.points[0].positions[0] - 0.1) < 0.2
    assert rig.session.motion.counters.tracking_lost == 0
    rig.session.close()


def test_policy_that_never_moves_is_noticed_after_five_seconds_and_not_stopped(rig: Rig) -> None:
    rig.policy.infer = lambda *args, **kwargs: ActionChunk(np.tile([0.02, 0.0], (8, 1)), 0.05, 0.05)
    rig.run(20)
    assert not any("same pose" in text for text in rig.session.notices.texts)
    rig.run(100)
    assert any("same pose" in text for text in rig.session.notices.texts)
    assert rig.state is State.OK


def test_limits_may_become_tighter_while_the_arm_moves_and_never_looser(rig: Rig) -> None:
    rig.run(10)
    assert rig.speed > 0.3
    rig.session.apply(replace(rig.session.options, limit_scales=LimitScales(velocity=0.05)))
    np.testing.assert_allclose(rig.session.guard.limits.max_velocity, [0.1, 0.01])
    rig.run(20)
    assert rig.speed <= 0.1 + 1e-9
    with pytest.raises(ConfigError, match="velocity limit scale is 1.5"):
        rig.session.apply(replace(rig.session.options, limit_scales=LimitScales(velocity=1.5), noise_seed=7))
    assert rig.session.options.limit_scales.velocity == 0.05 and rig.session.noise_seed == 0


def test_late_control_timer_is_noticed_for_a_while(rig: Rig) -> None:
    rig.run(5)
    rig.now += 2 * PERIOD_NS
    rig.tick()
    assert rig.session.ticks.late == 1
    assert any("control timer was 100 ms late" in text for text in rig.session.notices.texts)
    rig.run(201)
    assert not any("control timer" in text for text in rig.session.notices.texts)

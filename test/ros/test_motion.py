"""From chunks to messages: continuity, holds, and that nothing a controller would refuse is ever sent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from robot_fixtures import PERIOD_NS, T0, ramp, toy_contract, toy_spec

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros import jtc
from omega_qvla_ros.contract import check_policy
from omega_qvla_ros.guard import ChunkRejected, LimitScales, MotionGuard
from omega_qvla_ros.motion import HOLD_REPEATS, Motion
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler
from omega_qvla_ros.splines import segment_peak_accelerations, segment_peak_speeds, segment_ranges
from omega_qvla_ros.tracking import TRACKING_TICKS, TrackingMonitor
from omega_qvla_ros.trajectory import REST_NS

START = np.array([0.0, 0.02])
NAMES = ("shoulder", "finger")
LIMITS = toy_contract().joint_limits()


def build(blend_time_s: float = 0.1) -> tuple[Motion, ChunkScheduler]:
    contract = toy_contract()
    scheduler = ChunkScheduler(4, blend_time_s, contract.period_s)
    return Motion(contract, check_policy(contract, toy_spec()), 8, scheduler, MotionGuard(contract)), scheduler


def chunk(actions: np.ndarray) -> ActionChunk:
    """Contract order in, checkpoint order out (finger, shoulder)."""
    return ActionChunk(actions[:, ::-1].copy(), 0.05, 0.05)


def give(motion: Motion, scheduler: ChunkScheduler, actions: np.ndarray, observed_ns: int, now_ns: int) -> None:
    motion.on_chunk(scheduler.begin(observed_ns), chunk(actions), now_ns, START)


def test_nothing_is_sent_before_the_first_chunk() -> None:
    motion, _ = build()
    assert motion.tick(T0) is None
    motion.hold(T0)
    assert motion.tick(T0) is None


def test_chunk_becomes_a_window_in_contract_order_that_ends_at_rest() -> None:
    motion, scheduler = build(blend_time_s=0.0)
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0 + 60_000_000)
    message = motion.tick(T0 + 60_000_000)
    assert message is not None and message.joint_names == NAMES
    assert message.stamp_ns == T0 + 10_000_000  # one period back: the arm at rest
    assert message.points[-1].positions[0] == pytest.approx(0.4 + 1.0 * 0.1 / 2, abs=0.01)
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    assert motion.counters.published == 1 and not motion.invalid


def test_window_keeps_its_absolute_stamps_over_the_ticks() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    seen: dict[int, float] = {}
    for k in range(8):
        message = motion.tick(T0 + k * PERIOD_NS)
        assert message is not None
        for point in message.points:
            at = message.stamp_ns + point.time_from_start_ns
            assert seen.setdefault(at, point.positions[0]) == point.positions[0]


def test_new_chunk_is_continuous_in_position_and_velocity() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    now = T0 + 230_000_000
    before = motion.plan.sample(now)
    give(motion, scheduler, ramp(0.1, 0.03), T0 + 150_000_000, now)
    after = motion.plan.sample(now)
    np.testing.assert_allclose(after[0], before[0], atol=1e-12)
    np.testing.assert_allclose(after[1], before[1], atol=1e-12)
    assert np.abs(motion.plan.sample(now + 5_000_000)[0] - before[0]).max() < 2.0 * 0.006


def test_plan_that_ran_out_is_silent_and_counted_and_the_next_chunk_starts_there() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    end = motion.plan.end_ns
    assert motion.tick(end) is None and motion.tick(end + PERIOD_NS) is None
    assert motion.exhausted and motion.counters.exhausted == 1
    assert scheduler.is_due(T0 + 1)
    now = end + 10 * PERIOD_NS
    start = motion.plan.positions[-1].copy()
    give(motion, scheduler, ramp(float(start[0]), 0.02), now, now)
    np.testing.assert_allclose(motion.plan.sample(now)[0], start)


def test_hold_is_sent_in_three_periods_with_the_same_stamps_then_silence() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    assert motion.tick(T0) is not None
    now = T0 + 210_000_000
    motion.hold(now)
    ends = set()
    for k in range(6):
        motion.hold(now + k * PERIOD_NS)  # asking again changes nothing
        message = motion.tick(now + k * PERIOD_NS)
        assert (message is not None) == (k < HOLD_REPEATS)
        if message is not None:
            ends.add((message.end_ns, *message.points[-1].positions))
    assert len(ends) == 1 and motion.counters.holds == 1


def test_chunk_under_way_when_the_hold_began_is_void() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    ticket = scheduler.begin(T0 + 4 * PERIOD_NS)
    motion.hold(T0 + 5 * PERIOD_NS)
    with pytest.raises(ChunkDropped):
        motion.on_chunk(ticket, chunk(ramp(0.2, 0.05)), T0 + 6 * PERIOD_NS, START)
    assert motion.holding


def test_rejected_chunk_leaves_the_plan() -> None:
    motion, scheduler = build(blend_time_s=0.0)
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    plan = motion.plan
    with pytest.raises(ChunkRejected):
        give(motion, scheduler, ramp(0.9, 0.05), T0 + PERIOD_NS, T0 + PERIOD_NS)
    assert motion.plan is plan


def test_restart_brakes_first_and_then_starts_from_the_measured_position_and_velocity() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    now = T0 + 210_000_000
    motion.tick(now)
    # The hold begins when its message can be there, and brakes with 10 rad/s^2.
    position, velocity = motion.plan.sample(now + 10_000_000)
    end = position[0] + velocity[0] ** 2 / 20.0
    motion.restart(now)
    assert motion.braking
    messages = [motion.tick(now + k * PERIOD_NS) for k in range(HOLD_REPEATS)]
    for message in messages:
        assert message is not None and message.stamp_ns == messages[0].stamp_ns <= now - PERIOD_NS
        assert message.points[-1].positions[0] == pytest.approx(end, abs=1e-3)
        np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    with pytest.raises(ChunkDropped, match="brakes"):
        give(motion, scheduler, ramp(0.3, 0.02), now, now + PERIOD_NS)
    now = motion.plan.end_ns
    assert motion.tick(now) is None and motion.plan is None and not motion.braking
    measured, velocity = np.array([-0.7, 0.01]), np.array([0.5, 0.001])
    motion.on_chunk(scheduler.begin(now), chunk(ramp(-0.7, 0.02)), now, measured, velocity)
    np.testing.assert_allclose(motion.plan.sample(now)[0], measured)
    np.testing.assert_allclose(motion.plan.sample(now)[1], [0.5, 0.0])  # 1 mm/s is noise


def test_restart_of_an_arm_that_stands_forgets_at_once() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    motion.restart(motion.plan.end_ns)
    assert motion.plan is None and not motion.braking and motion.counters.holds == 0


def test_clock_that_jumps_back_holds_where_the_arm_is_with_stamp_zero() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    motion.tick(T0 + 200_000_000)
    now = T0 - 100 * 10**9
    motion.clock_jumped(now, np.array([0.1, 0.03]), np.array([1.0, 0.0]))
    for k in range(HOLD_REPEATS):
        message = motion.tick(now + k * PERIOD_NS)
        assert message is not None and message.stamp_ns == 0
        assert jtc.validate(message, now, NAMES) is None
        assert message.points[0].time_from_start_ns > 0  # a point at 0 would be a step
        assert message.points[-1].positions[0] == pytest.approx(0.1 + 1.0**2 / 20.0, abs=1e-3)
        assert message.points[-1].positions[1] == pytest.approx(0.02)  # not watched: as commanded
    assert motion.tick(motion.plan.end_ns) is None and motion.plan is None


def test_shortened_plan_still_ends_at_rest() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    assert motion.tick(T0) is not None
    motion.shorten(T0 + 20_000_000, 2)
    message = motion.tick(T0 + 20_000_000)
    assert message is not None
    assert message.end_ns - REST_NS <= T0 + 120_000_000 + 200_000_000
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.35])
def test_motion_shortened_before_a_limit_that_was_lowered_brakes_no_harder_than_the_contract_allows(share) -> None:
    motion, scheduler = build(blend_time_s=0.0)
    give(motion, scheduler, ramp(0.0, 0.06), T0, T0)
    assert motion.tick(T0) is not None
    motion._guard.set_limit_scales(LimitScales(position=share))
    motion.shorten(T0 + PERIOD_NS, 4)
    message = motion.tick(T0 + PERIOD_NS)
    assert message is not None and motion.counters.beyond_limits == 0
    _check(message)


def test_arm_that_does_not_follow_is_lost_with_joint_error_and_limit() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.05), T0, T0)
    elsewhere = np.array([-0.9, 0.02])
    reasons = [motion.watch_tracking(T0 + k * PERIOD_NS, elsewhere) for k in range(TRACKING_TICKS)]
    assert reasons[:-1] == [None] * (TRACKING_TICKS - 1)
    assert "'shoulder' is 0.99" in reasons[-1] and "limit 0.300" in reasons[-1]
    assert motion.tracking.losses == 1 and motion.plan is not None  # braking is the caller's work
    for k in range(TRACKING_TICKS):
        motion.watch_tracking(T0 + k * PERIOD_NS, elsewhere)
    assert motion.tracking.losses == 2
    motion.watch_tracking(T0, np.array([0.0, 0.02]))  # it has moved: the row is broken
    assert motion.tracking.losses == 0


def test_joint_that_stands_beside_its_command_is_blocked() -> None:
    """A policy that sees where the arm is keeps its command near it, so the error itself stays small."""
    monitor = TrackingMonitor(NAMES, LIMITS, 2.0)
    command, measured = np.array([0.1, 0.02]), np.array([0.0, 0.02])
    reasons = [monitor.check(T0 + k * PERIOD_NS, command, measured) for k in range(41)]
    assert reasons[:-1] == [None] * 40
    assert "'shoulder' stands 0.100 away from its command for 2 s" in reasons[-1]
    slow = [monitor.check(T0 + k * PERIOD_NS, command + 0.01 * k, measured + 0.01 * k) for k in range(200)]
    assert slow == [None] * 200  # a lag is no block
    near = [monitor.check(T0 + k * PERIOD_NS, measured + 0.05, measured) for k in range(200)]
    assert near == [None] * 200  # friction is no block


def test_finger_on_an_object_is_no_tracking_error() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.0, finger=0.0), T0, T0)
    for k in range(8):
        assert motion.watch_tracking(T0 + k * PERIOD_NS, np.array([0.0, 0.04])) is None


def test_committed_prefix_is_what_is_left_of_the_chunk_in_the_checkpoints_order() -> None:
    motion, scheduler = build(blend_time_s=0.0)
    assert motion.committed_prefix(T0, 0.1, 0.05, START) is None
    give(motion, scheduler, ramp(0.0, 0.02), T0, T0)
    observed = T0 + 2 * PERIOD_NS
    prefix = motion.committed_prefix(observed, 0.12, 0.05, START)
    assert prefix is not None and prefix.delay_steps == 2  # 130 ms: the steps after 50 and 100 ms
    np.testing.assert_allclose(prefix.actions, ramp(0.0, 0.02)[2:, ::-1])
    assert motion.committed_prefix(observed, 10.0, 0.05, START).delay_steps == 6
    assert motion.committed_prefix(T0 + 10**9, 0.1, 0.05, START) is None
    motion.hold(observed)
    assert motion.committed_prefix(observed, 0.1, 0.05, START) is None


def test_chunk_of_another_task_is_not_made_to_continue_the_old_one() -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, 0.02), T0, T0)
    motion.shorten(T0, 2)
    assert motion.committed_prefix(T0, 0.1, 0.05, START) is None


def test_prediction_runs_from_now_to_the_end_of_the_plan() -> None:
    motion, scheduler = build()
    assert len(motion.predicted(T0)[0]) == 0
    give(motion, scheduler, ramp(0.0, 0.02), T0, T0)
    times_ns, positions = motion.predicted(T0 + 30_000_000)
    assert times_ns[0] == T0 + 30_000_000 and times_ns[-1] == motion.plan.end_ns
    np.testing.assert_array_equal(positions[-1], motion.plan.positions[-1])


odd = st.sampled_from([float("nan"), float("inf"), -1e300])
actions = st.lists(
    st.tuples(st.one_of(st.floats(-1.6, 1.6), odd), st.one_of(st.floats(-0.02, 0.06), odd)), min_size=8, max_size=8
)
fast_to_the_limit = st.builds(
    lambda wanted: np.stack([np.zeros(8), np.where(np.arange(8) < 4, wanted, 0.04 - wanted)], axis=1),
    st.sampled_from([0.0, 0.0005, 0.0395, 0.04]),
)
smooth = st.builds(
    lambda start, step, finger: ramp(start, step, finger=finger),
    st.floats(-1.1, 1.1),
    st.floats(-0.14, 0.14),
    st.floats(-0.005, 0.045),
)


events = st.one_of(
    st.tuples(st.just("chunk"), st.one_of(actions, smooth, fast_to_the_limit), st.integers(0, 500)),
    st.tuples(st.just("late"), smooth, st.integers(300, 900)),
    st.tuples(st.just("again"), smooth, st.integers(0, 200)),
    st.tuples(st.sampled_from(["hold", "restart", "task", "tighten", "loosen"]), st.none(), st.just(0)),
)


class Controller:
    """A stock controller at 100 Hz that hears every message a little later, and remembers what it commanded."""

    def __init__(self, start: np.ndarray) -> None:
        self.executor = jtc.TrajectoryExecutor(NAMES, interpolate_from_desired_state=True)
        self.executor.hold(start)
        self.waiting: list = []
        self.commands: list[tuple[int, np.ndarray]] = []

    def hear(self, message, at_ns: int) -> None:
        self.waiting.append((at_ns, message))

    def run_until(self, until_ns: int) -> None:
        first = self.commands[-1][0] + 10_000_000 if self.commands else T0
        for now_ns in range(first, until_ns, 10_000_000):
            due, self.waiting = [w for w in self.waiting if w[0] <= now_ns], [w for w in self.waiting if w[0] > now_ns]
            for at_ns, message in due:
                assert self.executor.accept(message, at_ns) is None
            here = self.commands[-1][1] if self.commands else START
            self.commands.append((now_ns, self.executor.sample(now_ns, here, np.zeros(2))[0]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(events, st.integers(1, 300)), min_size=1, max_size=8),
    st.floats(0.0, 0.3),
    st.integers(0, 8_000_000),
    st.sampled_from(["clamp", "scale", "reject"]),
)
def test_whatever_the_policy_emits_what_is_sent_obeys_limits_and_controller(
    steps, blend_time_s, delay_ns, mode
) -> None:
    """Random chunks, NaN included, late, out of order and after a reset, with holds and other limits in between."""
    contract = toy_contract(limits={"mode": mode})
    scheduler, guard = ChunkScheduler(4, blend_time_s, contract.period_s), MotionGuard(contract)
    motion = Motion(contract, check_policy(contract, toy_spec()), 8, scheduler, guard)
    controller, now, tickets = Controller(START), T0, []
    for (kind, values, age_ms), wait_ms in steps:
        if kind in ("chunk", "late", "again"):
            ticket = tickets[0] if kind == "again" and tickets else scheduler.begin(now - age_ms * 1_000_000)
            tickets.append(ticket)
            measured = (
                motion.plan.sample(now)[0]
                if motion.plan is not None
                else controller.executor.sample(now, START, START)[0]
            )
            previous = motion.plan
            try:
                motion.on_chunk(ticket, chunk(np.array(values)), now, measured)
            except ChunkDropped:
                assert motion.plan is previous or motion.plan is None
            except ChunkRejected as rejected:
                assert rejected.kind != "internal"
            else:
                assert kind != "again" or ticket is not tickets[0] or tickets.count(ticket) == 1
        elif kind == "tighten":
            guard.set_limit_scales(LimitScales(0.9, 0.5, 0.3))
        elif kind == "loosen":
            guard.set_limit_scales(LimitScales())
        elif kind == "task":
            scheduler.new_task()
            motion.shorten(now, 4)
        else:
            getattr(motion, kind)(now)
        for tick_ns in range(now, now + wait_ms * 1_000_000, PERIOD_NS):
            message = motion.tick(tick_ns)
            if message is not None:
                assert jtc.validate(message, tick_ns + delay_ns, NAMES) is None
                _check(message)
                controller.hear(message, tick_ns + delay_ns)
            controller.run_until(min(tick_ns + PERIOD_NS, now + wait_ms * 1_000_000))
        now += wait_ms * 1_000_000
    assert not motion.invalid and not guard.counters.rejected["internal"]
    assert motion.counters.beyond_limits == 0
    _check_commands(controller)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(-0.1, 0.1), st.floats(-100.0, 0.5), st.floats(-1.1, 1.1), st.floats(-2.5, 2.5))
def test_hold_after_a_clock_jump_obeys_the_limits(step, jump_s, position, speed) -> None:
    motion, scheduler = build()
    give(motion, scheduler, ramp(0.0, step), T0, T0)
    motion.tick(T0 + 200_000_000)
    now = T0 + 200_000_000 + int(jump_s * 1e9)
    motion.clock_jumped(now, np.array([position, 0.02]), np.array([speed, 0.0]))
    message = motion.tick(now)
    assert message is not None and jtc.validate(message, now, NAMES) is None
    if abs(position) <= 1.0:
        _check(message)


def _check(message) -> None:
    """The cubic that a controller draws through the message, by its closed forms."""
    times = np.array([p.time_from_start_ns for p in message.points])
    positions = np.array([p.positions for p in message.points])
    velocities = np.array([p.velocities for p in message.points])
    assert np.isfinite(positions).all() and np.isfinite(velocities).all()
    low, high = segment_ranges(times, positions, velocities)
    assert (low >= LIMITS.position_min - 1e-6).all() and (high <= LIMITS.position_max + 1e-6).all()
    assert (segment_peak_speeds(times, positions, velocities) <= LIMITS.max_velocity * (1 + 1e-6)).all()
    rounding = 100 * np.finfo(float).eps / (np.diff(times)[:, None] * 1e-9) ** 2
    peaks = segment_peak_accelerations(times, positions, velocities) - rounding
    assert (peaks <= LIMITS.max_acceleration * (1 + 1e-6)).all()


def _check_commands(controller: Controller) -> None:
    """What the arm is told at 100 Hz: a second difference is at most the acceleration limit.

    Messages are heard within the contract's ``switch_lead_s``, so none makes a step, holds included.
    """
    commands = np.array([position for _, position in controller.commands])
    if len(commands) < 3:
        return
    assert (commands >= LIMITS.position_min - 1e-6).all() and (commands <= LIMITS.position_max + 1e-6).all()
    speeds = np.diff(commands, axis=0) / 0.01
    assert (np.abs(speeds) <= LIMITS.max_velocity + 1e-6).all()
    assert (np.abs(np.diff(speeds, axis=0)) <= LIMITS.max_acceleration * 0.01 + 1e-6).all()

"""Messages that took long to make: planning is allowed for, and what would be a step at the controller stays here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from robot_fixtures import PERIOD_NS, T0, ramp, toy_contract, toy_spec
from session_rig import NAMES, Rig

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros import jtc
from omega_qvla_ros.contract import check_policy
from omega_qvla_ros.dispatch import MAX_PLANNING_NS
from omega_qvla_ros.guard import MotionGuard
from omega_qvla_ros.motion import HOLD_REPEATS, Motion
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.reference_peaks import ReferencePeaks
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.scheduler import ChunkScheduler
from omega_qvla_ros.trajectory import JointTrajectory

MS = 1_000_000
START = np.array([0.0, 0.02])
MAX_ACCELERATION = toy_contract().joint_limits().max_acceleration[0]


class Line:
    """A motion, and a controller of 1 kHz that executes whatever is sent at once."""

    def __init__(self, horizon_steps: int = 4) -> None:
        contract = toy_contract()
        self.scheduler = ChunkScheduler(horizon_steps, 0.0, contract.period_s)
        binding = check_policy(contract, toy_spec())
        self.motion = Motion(contract, binding, 8, self.scheduler, MotionGuard(contract))
        self.controller = jtc.TrajectoryExecutor(NAMES, interpolate_from_desired_state=True)
        self.controller.hold(START)
        self.peaks = ReferencePeaks(2, PERIOD_NS)
        self.now = T0
        self.sent: list[JointTrajectory] = []
        self.largest_acceleration = 0.0
        """Of the shoulder, as the change of its commanded velocity within 1 ms."""
        self._velocity = 0.0

    def position(self) -> np.ndarray:
        return self.controller.sample(self.now, START, np.zeros(2))[0]

    def plan(self, step: float, start: float = 0.0) -> None:
        actions = ActionChunk(ramp(start, step)[:, ::-1].copy(), 0.05, 0.05)
        self.motion.on_chunk(self.scheduler.begin(self.now), actions, self.now, START)

    def send(self, age_ms: int) -> None:
        """What is to be sent now leaves ``age_ms`` later."""
        made = self.motion.tick(self.now)
        leaving = None if made is None else self.motion.in_time(made, self.now, age_ms * MS)
        self.run(age_ms)
        if leaving is not None:
            self.sent.append(leaving)
            assert self.controller.accept(leaving, self.now) is None

    def run(self, ms: int) -> None:
        for _ in range(ms):
            position, velocity = self.controller.sample(self.now, START, np.zeros(2))
            self.peaks.sample(self.now, position, velocity)
            self.largest_acceleration = max(self.largest_acceleration, abs(velocity[0] - self._velocity) * 1e3)
            self._velocity = float(velocity[0])
            self.now += MS


@pytest.fixture
def line() -> Line:
    made = Line()
    made.plan(0.04)
    made.send(0)
    made.run(150)
    return made


def first_difference_ms(line: Line, change: Callable[[], None]) -> int:
    """How long after now the plan is another one than before ``change``."""
    before, now_ns = line.motion.plan, line.now
    change()
    after = line.motion.plan
    return next(
        ms
        for ms in range(400)
        if np.abs(after.sample(now_ns + ms * MS)[0] - before.sample(now_ns + ms * MS)[0]).max() > 1e-9
    )


@pytest.mark.parametrize(("age_ms", "expected_ms"), [(0, 10), (5, 15), (30, 40), (400, 10 + MAX_PLANNING_NS // MS)])
def test_next_chunk_begins_later_by_what_planning_took(line: Line, age_ms: int, expected_ms: int) -> None:
    for _ in range(3):
        line.motion.dispatch.part_at(line.now + 1000 * MS)
        line.motion.in_time(line.motion.tick(line.now), line.now, age_ms * MS)
    switch_ms = first_difference_ms(line, lambda: line.plan(0.02)) - 1
    assert expected_ms <= switch_ms <= expected_ms + 3


def test_message_that_asks_for_the_same_motion_may_be_late(line: Line) -> None:
    count, known = len(line.sent), line.motion.dispatch.planning_s.values()
    line.send(45)
    assert len(line.sent) == count + 1 and line.motion.counters.withdrawn == 0
    assert line.motion.dispatch.planning_s.values() == known, "only new motions say what planning takes"


@pytest.mark.parametrize("age_ms", [0, 3, 5])
def test_chunk_that_leaves_in_time_is_sent(line: Line, age_ms: int) -> None:
    line.plan(-0.02)
    line.send(age_ms)
    line.run(400)
    assert line.motion.counters.withdrawn == 0 and line.scheduler.dropped["withdrawn"] == 0
    assert line.sent[-1].points[-1].positions[0] < 0.2
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION


@pytest.mark.parametrize("age_ms", [7, 12, 80])
def test_chunk_that_would_leave_too_late_is_withdrawn_and_the_known_motion_goes_on(line: Line, age_ms: int) -> None:
    known = line.motion.plan
    line.plan(-0.02)
    line.send(age_ms)
    assert line.motion.plan is known and line.motion.counters.withdrawn == 1
    assert line.scheduler.dropped["withdrawn"] == 1
    assert line.scheduler.is_due(line.now), "the next observation is used at once"
    line.run(50)
    line.send(0)
    line.run(400)
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION
    np.testing.assert_allclose(line.sent[-1].points[-1].positions, known.positions[-1])


def test_chunk_that_took_most_of_its_transports_time_makes_a_step_of_half_of_it_at_most(line: Line) -> None:
    """It leaves at the last moment at which it may, and its transport takes all of the contract's 10 ms."""
    line.plan(-0.04)
    message = line.motion.in_time(line.motion.tick(line.now), line.now, 5 * MS)
    assert message is not None
    speeds = []
    for ms in range(60):
        if ms == 15:
            assert line.controller.accept(message, line.now) is None
        speeds.append(line.controller.sample(line.now, START, np.zeros(2))[1][0])
        line.now += MS
    # 5 ms late: 2 a d, and what a millisecond may change anyway.
    assert np.abs(np.diff(speeds)).max() <= 2 * MAX_ACCELERATION * 5e-3 + MAX_ACCELERATION * 1e-3 * 1.01


@pytest.mark.parametrize(("age_ms", "leaves"), [(9, True), (12, False)])
def test_first_chunk_may_use_all_of_its_transports_time(age_ms: int, leaves: bool) -> None:
    """Nobody knows before how long planning takes: half would withdraw the first chunk on many machines."""
    line = Line()
    line.plan(0.04)
    line.send(age_ms)
    assert (len(line.sent) == 1) == leaves


def test_one_slow_planning_in_twenty_withdraws_nothing(line: Line) -> None:
    for k in range(40):
        line.motion.dispatch.part_at(line.now + 1000 * MS)
        line.motion.in_time(line.motion.tick(line.now), line.now, (12 if k % 20 == 0 else 8) * MS)
    line.plan(-0.02)
    line.send(12)
    assert line.motion.counters.withdrawn == 0


def test_plan_that_ran_out_is_counted_once_whatever_is_withdrawn_after_it(line: Line) -> None:
    line.run(700)
    line.send(0)
    assert line.motion.exhausted and line.motion.counters.exhausted == 1
    for _ in range(2):
        line.plan(-0.02, start=line.motion.plan.positions[-1, 0])
        line.send(300)
        assert line.motion.counters.withdrawn >= 1
        line.send(0)
    assert line.motion.exhausted and line.motion.counters.exhausted == 1


def test_chunk_withdrawn_from_a_hold_leaves_the_hold_and_its_count(line: Line) -> None:
    line.motion.hold(line.now)
    line.send(0)
    line.plan(0.02)
    assert not line.motion.holding
    line.send(80)
    assert line.motion.holding and line.motion.counters.holds == 1 and line.motion.counters.withdrawn == 1
    for _ in range(HOLD_REPEATS + 1):
        line.send(0)
        line.run(10)
    assert len(line.sent) == 1 + HOLD_REPEATS, "its repetitions go on"


def test_hold_on_a_first_chunk_that_never_left_is_none() -> None:
    line = Line()
    line.plan(0.04)
    line.motion.hold(line.now)
    assert line.motion.counters.holds == 1
    line.send(80)
    assert not line.sent and line.motion.plan is None
    assert line.motion.counters.holds == 0 and line.motion.counters.withdrawn == 0


def test_first_chunk_that_would_leave_too_late_leaves_the_arm_where_it_is() -> None:
    line = Line()
    line.plan(0.04)
    line.send(100)
    assert not line.sent and line.motion.plan is None
    line.plan(0.04)
    line.send(100)  # now it is known that planning takes so long
    line.run(500)
    assert len(line.sent) == 1 and line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION


@pytest.mark.parametrize("age_ms", [0, 8, 12, 80])
def test_hold_that_leaves_late_begins_when_it_leaves(line: Line, age_ms: int) -> None:
    line.motion.hold(line.now)
    line.send(age_ms)
    for _ in range(HOLD_REPEATS):
        line.run(50)
        line.send(0)
    line.run(300)
    assert line.motion.counters.holds == 1 and line.motion.holding
    assert line.motion.counters.withdrawn == 0, "a hold is planned anew, not withdrawn"
    assert len(line.sent) == 1 + HOLD_REPEATS
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION, "no step of the velocity"


def test_hold_on_a_chunk_that_never_left_brakes_from_the_known_motion(line: Line) -> None:
    line.plan(-0.02)
    line.motion.hold(line.now)
    line.send(40)
    line.run(400)
    assert line.motion.counters.holds == 1 and line.motion.holding
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION


def test_restart_that_leaves_late_still_forgets_the_plan_when_the_arm_stands(line: Line) -> None:
    line.motion.restart(line.now)
    line.send(60)
    line.run(600)
    assert line.motion.tick(line.now) is None and line.motion.plan is None and not line.motion.braking


def test_hold_after_a_clock_jump_is_never_late(line: Line) -> None:
    """It has no stamp: the controller starts it on reception."""
    line.motion.clock_jumped(line.now - 500 * MS, START, np.zeros(2))
    message = line.motion.tick(line.now - 500 * MS)
    assert message is not None and message.stamp_ns == 0
    assert line.motion.in_time(message, line.now - 500 * MS, 90 * MS) is message


@pytest.mark.parametrize("kind", ["hold", "restart"])
@pytest.mark.parametrize("stall_ms", [30, 49, 150, 900])
def test_hold_decided_between_two_messages_is_not_lost_in_a_stall(line: Line, kind: str, stall_ms: int) -> None:
    """The controller has the old window until a hold reaches it, and brakes from there without a step."""
    line.plan(0.04)
    line.send(0)
    getattr(line.motion, kind)(line.now)
    line.run(stall_ms)
    count = len(line.sent)
    line.send(0)
    assert len(line.sent) == count + 1
    line.run(400)
    assert line.motion.tick(line.now) is None and line.motion.counters.withdrawn == 0
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION


@pytest.mark.parametrize("planning_ms", [0, 11, 25, 41, 90])
@pytest.mark.parametrize("velocity", [0.6, -1.2])
def test_arm_that_moves_goes_on_until_its_first_chunk_takes_over(planning_ms: int, velocity: float) -> None:
    """However long planning takes, also beyond a control period."""
    line = Line()
    for _ in range(3):
        line.motion.dispatch.planning_s.add(planning_ms / 1e3)
    actions = ActionChunk(ramp(0.0, velocity * 0.05)[:, ::-1].copy(), 0.05, 0.05)
    line.motion.on_chunk(line.scheduler.begin(line.now), actions, line.now, START, np.array([velocity, 0.0]))
    plan = line.motion.plan
    times_ns = np.arange(line.now, plan.end_ns, MS)
    speeds = np.array([plan.sample(int(t))[1][0] for t in times_ns])
    assert np.abs(np.diff(speeds)).max() <= 1.01 * MAX_ACCELERATION * 1e-3
    assert abs(speeds[0] - velocity) < 1e-9


def test_one_stall_does_not_delay_the_holds_after_it() -> None:
    line = Line()
    for took_s in (2.0, 0.001, 0.001):
        line.motion.dispatch.hold_s.add(took_s)
    assert line.motion.dispatch.allowance_ns(holding=True) == MS


def test_shortened_plan_that_did_not_leave_is_shortened_again(line: Line) -> None:
    """The old instruction must not run on because one message was late."""
    line.plan(0.04)
    line.send(0)
    line.scheduler.new_task()
    line.motion.shorten(line.now, 1)
    line.send(150)
    line.send(0)
    assert line.motion.plan.end_ns < line.now + 200 * MS
    line.run(400)
    assert line.peaks.acceleration[0] <= 1.001 * MAX_ACCELERATION


@pytest.mark.parametrize(("horizon", "age_ms"), [(1, 70), (1, 200), (2, 120), (4, 230)])
def test_cut_that_leaves_late_is_made_from_when_it_leaves(horizon: int, age_ms: int) -> None:
    """The end for an older instruction, whose message took longer than the policy's horizon."""
    line = Line(horizon)
    for _ in range(100):
        line.motion.dispatch.planning_s.add(0.002)
    line.plan(0.04)
    line.send(0)
    old_end = line.motion.plan.positions[-1, 0]
    line.run(50)
    line.scheduler.new_task()
    line.motion.shorten(line.now, horizon)
    line.send(age_ms)
    line.run(600)
    assert line.largest_acceleration < 1.02 * MAX_ACCELERATION
    assert line.position()[0] < old_end - 0.01, "it ended sooner than the old chunk"


def cut_in_a_stall() -> Line:
    """An arm under way whose instruction changed between two messages, 200 ms later."""
    line = Line(1)
    for _ in range(100):
        line.motion.dispatch.planning_s.add(0.002)
    line.plan(0.04)
    line.send(0)
    line.run(50)
    line.scheduler.new_task()
    line.motion.shorten(line.now, 1)
    line.run(200)
    return line


@pytest.mark.parametrize("restart", [False, True])
def test_cut_decided_between_two_messages_is_not_lost_in_a_stall(restart: bool) -> None:
    """As for holds: after a stall beyond its end the arm still moves, and must not be taken for standing."""
    line = cut_in_a_stall()
    if restart:
        line.motion.restart(line.now)
    before = len(line.sent)
    line.send(0)
    assert len(line.sent) == before + 1 and not line.motion.exhausted
    line.run(50)
    for _ in range(12):
        line.send(0)
        line.run(50)
    assert line.largest_acceleration < 1.02 * MAX_ACCELERATION
    assert line.position()[0] < 0.31


def test_chunk_of_the_new_task_after_such_a_stall_is_not_late() -> None:
    line = cut_in_a_stall()
    line.plan(0.0, start=0.1)
    line.send(0)
    assert line.motion.counters.withdrawn == 0
    line.run(300)
    assert line.largest_acceleration < 1.02 * MAX_ACCELERATION


@pytest.mark.parametrize("slow_ms", [10, 20, 40, 90])
def test_load_that_rises_and_stays_does_not_latch(slow_ms: int) -> None:
    """Planning takes longer from one chunk to the next, and goes on like that: a machine that is still fast enough."""
    rig = Rig()
    rig.age_ns = 3 * MS
    rig.run(260)
    assert rig.session.motion.counters.withdrawn == 0
    rig.age_ns = slow_ms * MS
    rig.run(100)
    assert rig.state is State.OK
    assert 0 < rig.session.motion.counters.withdrawn <= 2
    rig.close()


def test_repeats_of_the_hold_after_a_clock_jump_accelerate_no_harder_than_the_first() -> None:
    """They have stamp 0, so that the controller begins each of them when it comes, from where it is then."""
    line = Line(4)
    line.plan(0.09)
    line.send(0)
    for _ in range(5):
        line.run(49)
        line.plan(0.09, start=float(line.position()[0]))
        line.send(1)
    line.now -= 5 * 10**9
    position, velocity = line.controller.sample(line.now + 5 * 10**9, START, np.zeros(2))
    line.largest_acceleration = 0.0
    line.motion.clock_jumped(line.now, position, velocity)
    line.send(0)
    for _ in range(HOLD_REPEATS):
        line.run(50)
        line.send(0)
    line.run(200)
    assert abs(velocity[0]) > 0.5
    # The controller of 1 kHz takes a message up to 1 ms late, and so up to 1 ms of the motion in one step.
    assert line.largest_acceleration < 1.1 * MAX_ACCELERATION


class Recorder:
    """Outputs of a node: what left."""

    def __init__(self) -> None:
        self.messages: list[JointTrajectory] = []

    def send(self, trajectory: JointTrajectory | None, plan: object, now_ns: int) -> None:
        if trajectory is not None:
            self.messages.append(trajectory)


@pytest.fixture
def node() -> Iterator[PolicyNode]:
    context = Context()
    rclpy.init(context=context, args=[], domain_id=free_domain_id(54))
    made = PolicyNode(context=context)
    yield made
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def test_node_looks_at_the_steady_clock_before_a_message_leaves(node: PolicyNode) -> None:
    """Simulated time stands while a callback runs, so the node's own clock would not tell."""
    rig, recorder = Rig(), Recorder()
    rig.run(6)
    node._session, node._outputs = rig.session, recorder
    motion = rig.session.motion
    known = motion.plan
    rig.session.stop(rig.now)
    node._publish(motion.tick(rig.now), rig.now, time.monotonic_ns() - 70 * MS)
    assert len(recorder.messages) == 1
    begins_ns = next(t for t in motion.plan.times_ns if t > rig.now and t not in known.times_ns)
    assert begins_ns >= rig.now + 70 * MS
    node._session = node._outputs = None
    rig.close()


def test_real_time_chunking_never_continues_a_chunk_that_was_withdrawn(node: PolicyNode) -> None:
    """The next inference is asked for after the last look."""
    contract = toy_contract(chunk={"method": "rtc", "execution_horizon_steps": 1, "blend_time_s": 0.0})
    rig, prefixes = Rig(contract, blend_time_s=0.0, execution_horizon_steps=1), []
    plain, session = rig.policy.infer, rig.session

    def infer(observation, noise=None, seed=0, committed=None):
        prefixes.append(committed)
        return plain(observation, noise, seed)

    rig.policy.infer = infer
    rig.run(6)
    rig.policy.step = -0.03
    rig.tick()
    node._session, node._outputs, node._now = session, Recorder(), lambda: rig.now
    tick, known = session.motion.tick, session.motion.plan

    def slow_tick(now_ns: int) -> JointTrajectory | None:
        if session.motion.plan is not known:
            time.sleep(0.1)  # far more than planning was seen to take
        return tick(now_ns)

    session.motion.tick = slow_tick
    rig.now += PERIOD_NS
    rig.feed()
    node._on_control_tick()
    assert session.motion.counters.withdrawn == 1 and session.motion.plan is known
    rig.wait()
    asked = prefixes[-1].actions[:, 1]
    assert (np.diff(asked) > 0.0).all(), "what it continues is the motion that goes on"
    node._session = node._outputs = None
    rig.close()

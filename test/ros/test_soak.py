"""The soak's judge, schedule and figures: a judge that sees nothing would pass everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from robot_fixtures import PERIOD_NS, T0, toy_contract
from rosgraph_msgs.msg import Clock
from session_rig import NAMES, Rig
from std_srvs.srv import Trigger

from omega_qvla_ros import msgs
from omega_qvla_ros.nodes.soak_node import SoakNode
from omega_qvla_ros.nodes.soak_policy_node import UnreliablePolicy
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.soak.report import SoakFigures, memory_growth, reason_kind, report_table
from omega_qvla_ros.soak.schedule import KINDS, draw_faults
from omega_qvla_ros.soak.watch import CommandWatch
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

MS = 1_000_000
ZERO = np.zeros(2)


@pytest.fixture
def watch() -> CommandWatch:
    made = CommandWatch(toy_contract())
    made.moved_elsewhere(np.array([0.0, 0.02]))
    return made


def trajectory(*points: tuple[int, float, float], stamp_ns: int = T0) -> JointTrajectory:
    """Points as time in ms, position and velocity of the shoulder; the finger stands."""
    return JointTrajectory(
        NAMES,
        stamp_ns,
        tuple(TrajectoryPoint(np.array([p, 0.02]), t * MS, np.array([v, 0.0])) for t, p, v in points),
    )


def smooth(end: float, duration_ms: int, stamp_ns: int = T0) -> JointTrajectory:
    return trajectory((0, 0.0, 0.0), (duration_ms, end, 0.0), stamp_ns=stamp_ns)


def test_motion_within_the_limits_is_nothing_to_remark(watch: CommandWatch) -> None:
    """0.2 rad in 0.5 s from rest to rest: peak speed 1.5 d/t = 0.6, peak acceleration 6 d/t^2 = 4.8."""
    watch.trajectory(smooth(0.2, 500), T0)
    assert not watch.refused and not watch.unguarded
    assert watch.peaks.velocity == pytest.approx(0.6 / 2.0) and watch.peaks.acceleration == pytest.approx(4.8 / 10.0)
    for k in range(60):
        watch.execute(T0 + k * 10 * MS, ZERO, ZERO)
    assert not watch.unguarded
    assert watch.peaks.executed_velocity == pytest.approx(0.3, abs=0.01)
    assert watch.largest_jump[0] == pytest.approx(0.6 * 0.05, rel=0.02)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (smooth(0.9, 500), "velocity"),
        (smooth(0.2, 250), "acceleration"),
        (trajectory((0, 0.9, 0.0), (500, 1.01, 0.0)), "position"),
        (trajectory((0, 0.99, 0.9), (50, 0.99, -0.9), (500, 0.8, 0.0)), "position"),
        (trajectory((0, np.nan, 0.0), (500, 0.1, 0.0)), "not_finite"),
    ],
)
def test_value_beyond_a_limit_is_seen(watch: CommandWatch, message: JointTrajectory, kind: str) -> None:
    watch.trajectory(message, T0)
    assert watch.unguarded[kind] == 1 and watch.examples


def test_arm_outside_its_limits_may_come_back(watch: CommandWatch) -> None:
    watch.trajectory(trajectory((0, 1.3, 0.0), (1000, 0.9, 0.0)), T0)
    assert "position" not in watch.unguarded


def test_refusal_of_the_controller_is_counted(watch: CommandWatch) -> None:
    watch.trajectory(trajectory((0, 0.0, 0.0), (500, 0.1, 0.1)), T0)
    watch.trajectory(trajectory((0, 0.0, 0.0), (500, 0.1, 0.1)), T0, executed=False)
    assert sum(watch.refused.values()) == 2


def test_jump_from_one_message_to_the_next_is_seen(watch: CommandWatch) -> None:
    """Each message for itself is good; the controller would make a step of 0.3 rad, 0.15 are allowed."""
    watch.trajectory(trajectory((0, 0.0, 0.0), (500, 0.0, 0.0)), T0)
    watch.execute(T0 + 10 * MS, ZERO, ZERO)
    watch.trajectory(trajectory((0, 0.3, 0.0), (500, 0.3, 0.0)), T0 + 20 * MS)
    watch.execute(T0 + 20 * MS, ZERO, ZERO)
    assert watch.unguarded["jump"] == 1 and watch.largest_jump[0] == pytest.approx(0.3)


def test_speed_that_changes_between_two_messages_is_an_acceleration(watch: CommandWatch) -> None:
    """One message moves at 1 rad/s, the next one stands, and both have said so for a second."""
    before_ns = T0 - 1000 * MS
    watch.trajectory(trajectory((0, -0.9, 1.0), (1100, 0.2, 1.0), (1300, 0.3, 0.0), stamp_ns=before_ns), T0)
    watch.execute(T0 + 40 * MS, ZERO, ZERO)
    watch.trajectory(trajectory((0, 0.14, 0.0), (1300, 0.14, 0.0), stamp_ns=before_ns), T0 + 45 * MS)
    watch.execute(T0 + 50 * MS, ZERO, ZERO)
    assert watch.unguarded["executed_acceleration"] == 1


def test_message_that_takes_effect_late_may_step_by_what_the_arm_could_have_braked_meanwhile(
    watch: CommandWatch,
) -> None:
    """It was sent at 100 ms, asks to brake with 10 rad/s^2 from then on, and comes 30 ms later."""
    watch.trajectory(trajectory((0, 0.0, 1.0), (200, 0.2, 1.0), (400, 0.3, 0.0)), T0)
    for ms in range(0, 130, 10):
        watch.execute(T0 + ms * MS, ZERO, ZERO)
    watch.trajectory(trajectory((0, 0.0, 1.0), (100, 0.1, 1.0), (200, 0.15, 0.0)), T0 + 130 * MS)
    watch.execute(T0 + 130 * MS, ZERO, ZERO)
    watch.execute(T0 + 140 * MS, ZERO, ZERO)
    assert "executed_acceleration" not in watch.unguarded and watch.largest_delay_s == pytest.approx(0.03, abs=0.006)


@pytest.mark.parametrize(("offset", "jumps"), [(0.0, False), (0.2, True)])
def test_way_that_was_lost_with_a_late_message_is_no_jump_and_a_jump_stays_one(
    watch: CommandWatch, offset: float, jumps: bool
) -> None:
    """The arm stands; a motion with 1 rad/s from 100 ms on is heard 300 ms after its beginning, 0.25 rad too late.

    0.15 rad are allowed per period. With the offset the motion also begins 0.2 rad from where the arm stands.
    """
    watch.trajectory(trajectory((0, 0.0, 0.0), (2000, 0.0, 0.0)), T0)
    for ms in range(0, 400, 10):
        watch.execute(T0 + ms * MS, ZERO, ZERO)
    points = [(0, 0.0, 0.0), (100, 0.0, 0.0), (200, 0.05, 1.0), (600, 0.45, 1.0), (700, 0.5, 0.0)]
    watch.trajectory(trajectory(*((t, p + offset, v) for t, p, v in points)), T0 + 400 * MS)
    for ms in range(400, 800, 10):
        watch.execute(T0 + ms * MS, ZERO, ZERO)
    assert (watch.unguarded["jump"] > 0) is jumps
    assert watch.largest_delay_s == pytest.approx(0.3, abs=0.006)
    assert watch.largest_late_step[0] == pytest.approx(0.25, abs=0.01)
    assert watch.largest_jump[0] == pytest.approx(0.05 + offset, abs=0.012)


def test_what_a_session_sends_passes_the_judge() -> None:
    """Two implementations of the same limits agree over holds, errors and restarts."""
    rig, watch = Rig(), CommandWatch(toy_contract())
    watch.moved_elsewhere(np.array(rig.stands_at))
    random = np.random.default_rng(1)
    for k in range(300):
        rig.policy.step = float(random.uniform(-0.05, 0.05))
        if k % 50 == 30:
            rig.session.stop(rig.now)
        if k % 50 == 40:
            rig.session.start(rig.now)
        message = rig.tick()
        for part in range(5):
            watch.execute(rig.now - PERIOD_NS + part * 10 * MS, np.array(rig.stands_at), ZERO)
        if message is not None:
            watch.trajectory(message, rig.now)
    rig.close()
    assert watch.trajectories > 200 and not watch.refused
    assert not watch.unguarded, watch.examples


def test_same_seed_gives_the_same_faults_and_every_kind_comes() -> None:
    faults = draw_faults(3600.0, 3, ["front", "wrist"])
    assert faults == draw_faults(3600.0, 3, ["front", "wrist"]) != draw_faults(3600.0, 4, ["front", "wrist"])
    assert {fault.kind for fault in faults} == {kind.name for kind in KINDS}
    ends = [fault.start_s + fault.duration_s for fault in faults]
    assert all(fault.start_s >= end for fault, end in zip(faults[1:], ends))
    assert {fault.stream for fault in faults if fault.kind.startswith("camera")} == {"front", "wrist"}
    assert faults[-1].start_s < 3600.0


def test_memory_growth_is_the_rise_of_a_line_after_warm_up() -> None:
    flat = [(float(t), 100_000_000) for t in range(100)]
    assert memory_growth(flat) == pytest.approx(0.0, abs=1e-9)
    warm_up_only = [(float(t), 50_000_000 if t < 20 else 100_000_000) for t in range(100)]
    assert memory_growth(warm_up_only) == pytest.approx(0.0, abs=0.02)
    leak = [(float(t), 100_000_000 + 100_000 * t) for t in range(101)]
    assert memory_growth(leak) == pytest.approx(80 * 0.1 / 102.0, rel=1e-6)
    assert memory_growth(flat[:5]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"trajectories_rejected": 1},
        {"trajectories_not_finite": 1},
        {"trajectories_invalid": 1},
        {"unguarded": {"velocity": 2}},
        {"refused_by_the_watch": {"no points": 1}},
        {"stuck": ["at 5 s"]},
        {"died": ["policy_node ended"]},
        {"memory_growth": 0.02},
        {"trajectories": 0},
    ],
)
def test_everything_that_may_not_happen_is_a_violation_and_survives_the_file(tmp_path, change: dict) -> None:
    good = SoakFigures(30.0, 0, "p", minutes=30.0, trajectories=5, memory_samples=[(1.0, 2)])
    assert good.violations() == []
    bad = SoakFigures(**{**vars(good), **change})
    assert len(bad.violations()) == 1
    bad.write(tmp_path / "soak.json")
    assert SoakFigures.read(tmp_path / "soak.json") == bad
    assert report_table(bad).row_count > 10


def test_reasons_are_counted_without_their_numbers() -> None:
    assert reason_kind("'a' is stale: 0.312 s old; more") == reason_kind("'a' is stale: 0.5 s old")


def test_unreliable_policy_fails_as_often_as_it_says_and_is_otherwise_the_policy(monkeypatch) -> None:
    slept = []
    monkeypatch.setattr("omega_qvla_ros.nodes.soak_policy_node.time.sleep", slept.append)
    policy = Rig().policy
    wrapped = UnreliablePolicy(policy, seed=2)
    assert wrapped.spec is policy.spec
    from omega_qvla_core.policy_types import Observation

    observation = Observation({}, np.zeros(2), "go")
    errors = spoiled = 0
    for _ in range(3000):
        try:
            spoiled += bool(np.isnan(wrapped.infer(observation).actions).any())
        except RuntimeError:
            errors += 1
    assert 1 <= errors <= 20 and 1 <= spoiled <= 20 and 30 <= len(slept) <= 120


@pytest.fixture
def soak_node() -> Iterator[SoakNode]:
    context = Context()
    rclpy.init(context=context, args=[], domain_id=free_domain_id(53))
    made = SoakNode(toy_contract(), lambda: None, context=context)
    yield made
    made.destroy_node()
    rclpy.try_shutdown(context=context)


def test_what_waited_from_before_a_reset_is_no_jump(soak_node: SoakNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine: joint states and a hold of the old pose are heard after the robot was put elsewhere."""
    reset_ns = T0 + 100 * MS

    def joints(shoulder: float, stamp_ns: int) -> None:
        soak_node._on_joints(msgs.joint_state(NAMES, np.array([shoulder, 0.02]), ZERO, stamp_ns))

    def spin_for(seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        for shoulder, stamp_ns in ((0.9, reset_ns - MS), (0.9, reset_ns), (0.0, reset_ns + 10 * MS)):
            joints(shoulder, stamp_ns)
            if until():
                return True
        return False

    answer = Trigger.Response(success=True, message=json.dumps({"instruction": "go", "time_ns": reset_ns}))
    monkeypatch.setattr(soak_node, "call", lambda *_: answer)
    monkeypatch.setattr(soak_node, "set_parameters", lambda *_, **__: None)
    monkeypatch.setattr(soak_node, "spin_for", spin_for)
    joints(0.9, reset_ns - 10 * MS)
    assert soak_node.reset_robot(1, "touch:red") == "go"

    def hear(shoulder: float, stamp_ns: int) -> None:
        stands = trajectory((0, shoulder, 0.0), (900, shoulder, 0.0), stamp_ns=stamp_ns)
        soak_node._on_command(msgs.trajectory_to_msg(stands))

    def clock(from_ms: int, to_ms: int) -> None:
        for ms in range(from_ms, to_ms, 10):
            soak_node._on_clock(Clock(clock=msgs.ns_to_stamp(reset_ns + ms * MS)))

    clock(10, 100)
    hear(0.9, reset_ns - 50 * MS)
    clock(100, 200)
    assert soak_node.watch.trajectories == 1 and not soak_node.watch.unguarded
    assert soak_node.watch.largest_jump.max() == 0.0
    hear(0.5, reset_ns + 200 * MS)  # a new motion that begins elsewhere is one
    clock(200, 300)
    assert soak_node.watch.unguarded["jump"] > 0

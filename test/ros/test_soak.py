"""The soak's judge, schedule and figures: a judge that sees nothing would pass everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from robot_fixtures import PERIOD_NS, T0, toy_contract
from session_rig import NAMES, Rig
from std_srvs.srv import Trigger

from omega_qvla_ros import jtc, msgs
from omega_qvla_ros.nodes.soak_node import SoakNode
from omega_qvla_ros.nodes.soak_policy_node import UnreliablePolicy
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.reference_peaks import ReferencePeaks
from omega_qvla_ros.soak.report import SoakFigures, memory_growth, reason_kind, report_table
from omega_qvla_ros.soak.schedule import KINDS, draw_faults
from omega_qvla_ros.soak.watch import CommandWatch
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

MS = 1_000_000
ZERO = np.zeros(2)


@pytest.fixture
def watch() -> CommandWatch:
    return CommandWatch(toy_contract())


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
    assert sum(watch.refused.values()) == 1


def executed(*messages: tuple[int, JointTrajectory], until_ms: int) -> ReferencePeaks:
    """What a controller of 100 Hz makes of messages that reach it at a time in ms; the arm stands at 0."""
    controller, peaks = jtc.TrajectoryExecutor(NAMES), ReferencePeaks(2, PERIOD_NS)
    controller.hold(np.array([0.0, 0.02]))
    arriving = list(messages)
    for ms in range(0, until_ms, 10):
        while arriving and arriving[0][0] <= ms:
            assert controller.accept(arriving.pop(0)[1], T0 + ms * MS) is None
        peaks.sample(T0 + ms * MS, *controller.sample(T0 + ms * MS, ZERO, ZERO))
    return peaks


def test_controller_measures_the_peaks_of_a_motion() -> None:
    """0.2 rad in 0.5 s from rest to rest: peak speed 0.6 rad/s, so 0.03 rad in 50 ms; peak acceleration 4.8."""
    peaks = executed((0, smooth(0.2, 500)), until_ms=600)
    assert peaks.jump[0] == pytest.approx(0.03, rel=0.02) and peaks.jump[1] == 0.0
    assert peaks.acceleration[0] == pytest.approx(4.8, rel=0.03)


def test_controller_measures_a_jump_between_two_messages() -> None:
    """Each message for itself is good."""
    stands = [trajectory((0, where, 0.0), (900, where, 0.0)) for where in (0.0, 0.3)]
    assert executed((0, stands[0]), (200, stands[1]), until_ms=400).jump[0] == pytest.approx(0.3)


def test_controller_measures_the_step_of_a_message_that_came_late() -> None:
    """It was to brake with 10 rad/s^2 from 100 ms on and comes 30 ms later: 0.3 rad/s too fast, in one period."""
    moving = trajectory((0, 0.0, 0.0), (100, 0.05, 1.0), (300, 0.25, 1.0), (500, 0.35, 0.0))
    brake = trajectory((0, 0.0, 0.0), (100, 0.05, 1.0), (200, 0.1, 0.0))
    assert executed((0, moving), (100, brake), until_ms=300).acceleration[0] == pytest.approx(10.0, rel=0.01)
    assert executed((0, moving), (140, brake), until_ms=300).acceleration[0] == pytest.approx(40.0, rel=0.01)


def test_reference_that_was_put_elsewhere_is_no_jump() -> None:
    peaks = ReferencePeaks(1, PERIOD_NS)
    peaks.sample(T0, np.zeros(1), np.zeros(1))
    peaks.restart()
    peaks.sample(T0 + 10 * MS, np.ones(1), np.ones(1))
    assert peaks.jump[0] == 0.0 and peaks.acceleration[0] == 0.0


def test_what_a_session_sends_passes_the_judge() -> None:
    """Two implementations of the same limits agree over holds, errors and restarts."""
    rig, watch = Rig(), CommandWatch(toy_contract())
    limits = toy_contract().joint_limits()
    controller, peaks = jtc.TrajectoryExecutor(NAMES), ReferencePeaks(2, PERIOD_NS)
    controller.hold(np.array(rig.stands_at))
    random = np.random.default_rng(1)

    def hear(message: JointTrajectory | None) -> None:
        if message is not None:
            watch.trajectory(message, rig.now)
            assert controller.accept(message, rig.now) is None

    for k in range(300):
        rig.policy.step = float(random.uniform(-0.05, 0.05))
        hear(rig.tick())
        if k % 50 == 30:
            rig.session.stop(rig.now)
            hear(rig.session.motion.tick(rig.now))
        if k % 50 == 40:
            rig.session.start(rig.now)
            hear(rig.session.motion.tick(rig.now))
        for part in range(5):
            now_ns = rig.now + part * 10 * MS
            peaks.sample(now_ns, *controller.sample(now_ns, np.array(rig.stands_at), ZERO))
    rig.close()
    assert watch.trajectories > 200 and not watch.refused
    assert not watch.unguarded, watch.examples
    assert (peaks.jump <= limits.max_jump).all() and (peaks.acceleration <= 1.001 * limits.max_acceleration).all()


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
        {"trajectories_beyond_limits": 1},
        {"unguarded": {"velocity": 2}},
        {"controller_jump": {"a": 0.7}, "controller_jump_limit": {"a": 0.6}},
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


def test_motion_begins_only_when_joint_states_of_the_old_pose_are_stale(
    soak_node: SoakNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine: joint states of the old pose are relayed after the robot was put elsewhere."""
    reset_ns, waited = T0 + 100 * MS, []

    def spin_for(seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        for after_ms in range(-10, 300, 10):
            soak_node._on_joints(msgs.joint_state(NAMES, ZERO, ZERO, reset_ns + after_ms * MS))
            if until():
                waited.append(after_ms)
                return True
        return False

    answer = Trigger.Response(success=True, message=json.dumps({"instruction": "go", "time_ns": reset_ns}))
    monkeypatch.setattr(soak_node, "call", lambda *_: answer)
    monkeypatch.setattr(soak_node, "set_parameters", lambda *_, **__: None)
    monkeypatch.setattr(soak_node, "spin_for", spin_for)
    assert soak_node.reset_robot(1, "touch:red") == "go"
    assert waited == [110]  # the contract's timeout is 100 ms

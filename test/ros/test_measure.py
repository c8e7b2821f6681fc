"""The last measurement sees all of a message: head, join, what follows, the way to rest. Code is broken to prove it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, toy_contract
from session_rig import Rig

from omega_qvla_ros import motion as motion_module
from omega_qvla_ros.measure import beyond, parts_early
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.trajectory import Plan, hold_plan, measured_plan

LIMITS = toy_contract().joint_limits()
NAMES = ("shoulder", "finger")
MS = 1_000_000


def plan_of(positions: list[float], velocities: list[float]) -> Plan:
    """Knots every 100 ms from ``T0`` on; the finger stands."""
    return Plan(
        T0 + np.arange(len(positions), dtype=np.int64) * 100 * MS,
        np.array([[position, 0.02] for position in positions]),
        np.array([[velocity, 0.0] for velocity in velocities]),
    )


MOVING = plan_of([0.0, 0.1, 0.2, 0.25], [1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (MOVING, None),
        (plan_of([0.0, 0.2, 0.41, 0.6], [1.9, 2.1, 2.1, 0.0]), "velocity limit of joint 'shoulder'"),
        (plan_of([0.0, 0.1, 0.25, 0.3], [1.0, 1.0, 1.0, 0.0]), "acceleration limit of joint 'shoulder'"),
        (plan_of([0.9, 1.0, 1.1, 1.15], [1.0, 1.0, 1.0, 0.0]), "position limit of joint 'shoulder'"),
        (plan_of([0.0, float("nan"), 0.2, 0.25], [1.0, 1.0, 1.0, 0.0]), "not finite"),
        (plan_of([0.0, 0.1, 0.2, 0.25], [1.0, 1.0, float("inf"), 0.0]), "not finite"),
        (replace(MOVING, times_ns=MOVING.times_ns[[0, 2, 1, 3]]), "ascend"),
        (plan_of([1.2, 1.2, 1.175, 1.15], [0.0, 0.0, -0.5, 0.0]), None),
        (plan_of([1.2, 1.195, 1.199, 1.199], [0.0, 0.0, 0.0, 0.0]), "position limit of joint 'shoulder'"),
        (plan_of([0.0, 0.22, 0.39, 0.49], [2.4, 2.0, 1.4, 0.6]), None),
    ],
    ids=["good", "fast", "hard", "outside", "nan", "inf", "order", "comes back", "goes out again", "slows down"],
)
def test_what_is_wrong_with_a_plan_is_named(plan: Plan, words: str | None) -> None:
    finding = beyond(plan, LIMITS, NAMES)
    assert (finding is None) if words is None else (finding is not None and words in finding.text)


def test_rounding_in_a_segment_of_a_microsecond_is_no_acceleration_but_a_change_of_velocity_is() -> None:
    times_ns = np.array([T0, T0 + 100 * MS, T0 + 100 * MS + 1000])
    good = Plan(times_ns, np.array([[0.9, 0.02], [0.95, 0.02], [0.95 + 5e-15, 0.02]]), np.zeros((3, 2)))
    still = replace(good, positions=np.array([[0.95, 0.02]] * 2 + [[0.95 + 1e-15, 0.02]]))
    assert beyond(still, LIMITS, NAMES) is None
    step = replace(still, velocities=np.array([[0.0, 0.0], [2e-5, 0.0], [0.0, 0.0]]))
    assert beyond(step, LIMITS, NAMES) is not None  # 20 rad/s^2


@pytest.mark.parametrize(("step", "words"), [((1e-6, 0.0), "position"), ((0.0, 1e-4), "velocity")])
def test_plan_that_is_another_motion_before_its_switch_is_found(step: tuple[float, float], words: str) -> None:
    other = replace(MOVING, positions=MOVING.positions + [step[0], 0.0], velocities=MOVING.velocities + [step[1], 0.0])
    finding = parts_early(MOVING, other, T0 + 100 * MS, T0 + 150 * MS, LIMITS, NAMES)
    assert finding is not None and f"{words} of joint 'shoulder' makes a step" in finding.text
    cut = MOVING.committed(T0 + 150 * MS, T0).then(np.array([T0 + 400 * MS]), np.array([[0.3, 0.02]]), np.zeros((1, 2)))
    assert parts_early(MOVING, cut, T0 + 20 * MS, T0 + 150 * MS, LIMITS, NAMES) is None
    assert parts_early(MOVING, cut, T0 + 20 * MS, T0 + 180 * MS, LIMITS, NAMES) is not None


def bent(plan: Plan, row: int, by: float) -> Plan:
    """The plan with one position moved."""
    positions = plan.positions.copy()
    positions[row, 0] += by
    return replace(plan, positions=positions)


def head_bent(name: str, row: int, by: float) -> Callable[[pytest.MonkeyPatch], None]:
    """Break what ``Plan.committed`` gives, or what another function of the motion's module gives."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        owner = Plan if name == "committed" else motion_module
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: bent(real(*given), row, by))

    return apply


def ends_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way to rest that takes a hundredth of the time."""
    real = motion_module.stop_knots
    monkeypatch.setattr(
        motion_module,
        "stop_knots",
        lambda *given: (given[0] + (real(*given)[0] - given[0]) // 100 + 1, *real(*given)[1:]),
    )


@pytest.mark.parametrize(
    "broken",
    [head_bent("committed", 0, 0.02), head_bent("committed", -1, 1e-4), ends_hard],
    ids=["head", "join", "end"],
)
def test_chunk_whose_head_join_or_end_breaks_a_limit_is_refused(broken, monkeypatch) -> None:
    rig = Rig()
    rig.run(10)
    plan = rig.session.motion.plan
    broken(monkeypatch)
    while not rig.session.guard.counters.rejected:
        rig.tick()
    assert rig.session.guard.counters.rejected == {"internal": 1}
    assert rig.state is State.HOLD and "chunk refused" in rig.session.safety.reasons[0]
    assert plan is not None and rig.session.motion.holding
    rig.close()


def test_standing_start_that_breaks_a_limit_is_refused(monkeypatch) -> None:
    head_bent("starting_plan", 0, 0.5)(monkeypatch)
    rig = Rig()
    rig.run(4)
    assert rig.session.guard.counters.rejected["internal"] >= 1 and not rig.sent
    rig.close()


@pytest.mark.parametrize("kind", ["hold", "restart", "clock_jumped"])
def test_hold_that_breaks_a_limit_is_sent_and_reported(kind: str, monkeypatch, caplog) -> None:
    rig = Rig()
    rig.run(10)
    head_bent("hold_plan", -2, 0.3)(monkeypatch)
    if kind == "hold":
        rig.session.motion.hold(rig.now)
        message = rig.session.motion.tick(rig.now)
    elif kind == "restart":
        rig.session.restart(rig.now)
        message = rig.session.motion.tick(rig.now)
    else:
        rig.now -= 10**9
        message = rig.session.clock_jumped(rig.now)
    assert message is not None and rig.session.motion.counters.beyond_limits == 1
    assert any(r.levelno == logging.ERROR and "times the" in r.getMessage() for r in caplog.records)
    rig.tick()
    assert rig.state is State.HOLD
    assert any("sent to stop the arm, although" in reason for reason in rig.session.safety.reasons)
    monkeypatch.undo()
    rig.run(25)
    assert rig.state is State.OK and rig.speed > 0.0 and rig.session.motion.counters.beyond_limits == 1
    rig.close()


def test_shortened_motion_that_breaks_a_limit_is_sent_and_reported(monkeypatch) -> None:
    rig = Rig(execution_horizon_steps=2)
    rig.run(10)
    ends_hard(monkeypatch)
    rig.session.set_instruction("another", rig.now)
    assert rig.session.motion.counters.beyond_limits == 1 and rig.session.motion.tick(rig.now) is not None
    rig.close()


def test_whole_way_of_a_hold_from_the_measured_state_is_measured() -> None:
    here = measured_plan(T0, np.array([0.5, 0.02]), np.array([1.5, 0.0]), PERIOD_NS, PERIOD_NS)
    plan = hold_plan(here, T0 - PERIOD_NS, T0, LIMITS, PERIOD_NS, 4)
    assert beyond(plan, LIMITS, NAMES) is None and parts_early(here, plan, T0 - PERIOD_NS, T0, LIMITS, NAMES) is None
    assert beyond(bent(plan, 0, 0.2), LIMITS, NAMES) is not None

"""A policy that emits nonsense, and chunks that come when nobody wants them any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fault_checks import check_hold, hold_after, run_until
from robot_fixtures import T0, ramp, toy_contract, toy_spec
from session_rig import Rig

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.contract import check_policy
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.run(10)
    yield made
    made.close()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_fault_20_values_that_are_not_finite_reject_the_whole_chunk_and_hold(rig: Rig, broken: float) -> None:
    accepted = rig.session.scheduler.accepted
    rig.policy.fault = broken
    run_until(rig, State.HOLD)
    assert rig.session.scheduler.accepted <= accepted + 1  # the one that was under way
    assert rig.session.guard.counters.rejected["not_finite"] == 1
    assert "joint 'shoulder' is" in rig.session.safety.reasons[0]
    check_hold(hold_after(rig, 4))
    for _, message in rig.sent:
        assert all(
            np.isfinite(point.positions).all() and np.isfinite(point.velocities).all() for point in message.points
        )


def test_fault_20_third_in_a_row_latches_and_nothing_is_published(rig: Rig) -> None:
    rig.policy.fault = np.nan
    run_until(rig, State.LATCHED)
    assert rig.session.guard.counters.rejected["not_finite"] == 3
    count = len(rig.sent)
    rig.policy.fault = None
    rig.run(60)
    assert rig.state is State.LATCHED
    assert len(rig.sent) <= count + 3  # the rest of the last hold


def test_fault_20_two_faults_and_a_success_start_the_count_again(rig: Rig) -> None:
    rig.policy.fault = np.nan
    while rig.session.safety.consecutive_errors < 2:
        rig.tick()
    rig.policy.fault = None
    run_until(rig, State.OK)
    rig.run(6)
    assert rig.session.safety.consecutive_errors == 0


def test_fault_21_width_known_at_load_is_refused_at_configure() -> None:
    with pytest.raises(ConfigError, match=r"action names of contract and checkpoint differ.*shoulder, finger.*finger"):
        check_policy(toy_contract(), toy_spec(action_names=("finger",)))


@pytest.mark.parametrize("shape", [(8, 3), (8, 1), (7, 2), (8,), (0, 2)])
def test_fault_21_width_that_only_shows_at_run_time_latches(rig: Rig, shape: tuple[int, ...]) -> None:
    rig.policy.infer = lambda *args, **kwargs: ActionChunk(np.zeros(shape), 0.05, 0.05)
    run_until(rig, State.LATCHED)
    assert "actions of shape" in rig.session.safety.reasons[0] and str(list(shape)) in rig.session.safety.reasons[0]
    rig.run(10)  # it latches at once, so the arm still has to brake
    assert rig.speed == 0.0


@pytest.mark.parametrize("cause", ["restart", "stop", "start"])
def test_fault_33_chunk_under_way_at_a_reset_is_discarded(rig: Rig, cause: str) -> None:
    rig.policy.block = threading.Event()
    while not rig.session.worker.busy:
        rig.tick()
    epoch, accepted = rig.session.scheduler.epoch, rig.session.scheduler.accepted
    getattr(rig.session, cause)(rig.now)
    assert rig.session.scheduler.epoch > epoch
    block, rig.policy.block = rig.policy.block, None
    block.set()
    rig.wait()
    rig.tick()
    assert rig.session.scheduler.accepted == accepted


def placed(scheduler: ChunkScheduler, ticket, now_ns: int) -> None:
    chunk = ActionChunk(ramp(0.0, 0.01), 0.05, 0.05)
    scheduler.confirm(ticket, scheduler.place(ticket, chunk, now_ns, lambda _: np.zeros(2)))


def test_fault_34_chunk_out_of_order_is_discarded() -> None:
    scheduler = ChunkScheduler(2, 0.1, 0.05)
    first, second = scheduler.begin(T0), scheduler.begin(T0 + 50_000_000)
    placed(scheduler, second, T0 + 60_000_000)
    with pytest.raises(ChunkDropped, match="chunk 1 came after chunk 2"):
        placed(scheduler, first, T0 + 61_000_000)
    assert scheduler.dropped["order"] == 1 and scheduler.accepted == 1


def test_fault_34_duplicate_is_discarded() -> None:
    scheduler = ChunkScheduler(2, 0.1, 0.05)
    ticket = scheduler.begin(T0)
    placed(scheduler, ticket, T0 + 10_000_000)
    with pytest.raises(ChunkDropped, match="chunk 1 came after chunk 1"):
        placed(scheduler, ticket, T0 + 20_000_000)
    assert scheduler.dropped["order"] == 1 and scheduler.accepted == 1

"""Chunks: placement in time, blending, epochs, tasks, order, and when the next one is due."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, ramp

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler


def chunk(actions: np.ndarray | None = None) -> ActionChunk:
    return ActionChunk(ramp(0.0, 0.05) if actions is None else actions, 0.05, 0.05)


def still(_: int) -> np.ndarray:
    return np.array([0.0, 0.02])


def scheduler(blend_time_s: float = 0.0, horizon: int = 4) -> ChunkScheduler:
    return ChunkScheduler(horizon, blend_time_s, 0.05)


def test_step_k_belongs_to_the_observation_time_plus_delay_plus_k_periods() -> None:
    s = scheduler()
    placement = s.place(s.begin(T0), chunk(), T0, still)
    np.testing.assert_array_equal(placement.times_ns, T0 + PERIOD_NS * np.arange(1, 9))
    np.testing.assert_array_equal(placement.targets, ramp(0.0, 0.05))


def test_steps_that_have_passed_are_skipped() -> None:
    s = scheduler()
    placement = s.place(s.begin(T0), chunk(), T0 + 120_000_000, still)
    assert placement.skipped == 2 and placement.times_ns[0] == T0 + 3 * PERIOD_NS
    np.testing.assert_allclose(placement.targets[0, 0], 0.15)


def test_step_just_ahead_is_skipped_too() -> None:
    s = scheduler()
    assert s.place(s.begin(T0), chunk(), T0 + 45_000_000, still).skipped == 1


def test_chunk_that_came_after_its_end_is_late() -> None:
    s = scheduler()
    with pytest.raises(ChunkDropped, match="its last step is -0.10 s away") as caught:
        s.place(s.begin(T0), chunk(), T0 + 500_000_000, still)
    assert caught.value.kind == "late" and s.dropped["late"] == 1


def test_blend_goes_from_the_committed_motion_to_the_chunk() -> None:
    s = scheduler(blend_time_s=0.2)
    placement = s.place(s.begin(T0), chunk(np.tile([1.0, 0.0], (8, 1))), T0, still)
    u = np.array([0.25, 0.5, 0.75, 1.0])
    weight = u * u * (3 - 2 * u)
    np.testing.assert_allclose(placement.targets[:4, 0], weight)
    np.testing.assert_allclose(placement.targets[:4, 1], 0.02 * (1 - weight))
    np.testing.assert_array_equal(placement.targets[4:, 0], 1.0)


@pytest.mark.parametrize(("change", "kind"), [("new_epoch", "epoch"), ("new_task", "task"), ("forget_time", "epoch")])
def test_late_chunk_after_reset_or_task_change_is_dropped(change: str, kind: str) -> None:
    s = scheduler()
    ticket = s.begin(T0)
    getattr(s, change)()
    with pytest.raises(ChunkDropped) as caught:
        s.place(ticket, chunk(), T0, still)
    assert caught.value.kind == kind and s.dropped[kind] == 1 and s.accepted == 0


def test_chunk_out_of_order_is_dropped() -> None:
    s = scheduler()
    first, second = s.begin(T0), s.begin(T0 + PERIOD_NS)
    s.confirm(second, s.place(second, chunk(), T0, still))
    with pytest.raises(ChunkDropped) as caught:
        s.place(first, chunk(), T0, still)
    assert caught.value.kind == "order" and s.accepted == 1
    with pytest.raises(ChunkDropped):
        s.place(second, chunk(), T0, still)


def test_chunk_that_was_refused_once_is_not_taken_the_second_time() -> None:
    s = scheduler()
    ticket = s.begin(T0)
    s.place(ticket, chunk(), T0, still)  # refused by the guard, so not confirmed
    with pytest.raises(ChunkDropped) as caught:
        s.place(ticket, chunk(), T0, still)
    assert caught.value.kind == "order"


def test_chunk_that_nobody_asked_for_is_dropped() -> None:
    s = scheduler()
    with pytest.raises(ChunkDropped, match="the last one that was asked for is 1") as caught:
        s.place(replace(s.begin(T0), sequence=7), chunk(), T0, still)
    assert caught.value.kind == "order"


def test_chunk_with_next_to_nothing_left_is_late() -> None:
    s = scheduler()
    assert len(s.place(s.begin(T0), chunk(), T0 + 300_000_000, still).times_ns) == 2
    with pytest.raises(ChunkDropped, match="0.1 s must be left") as caught:
        s.place(s.begin(T0), chunk(), T0 + 310_000_000, still)
    assert caught.value.kind == "late"


def test_next_observation_is_due_after_the_execution_horizon() -> None:
    s = scheduler(horizon=4)
    assert s.is_due(T0)
    s.begin(T0)
    assert not s.is_due(T0) and not s.is_due(T0 + 3 * PERIOD_NS)
    assert s.is_due(T0 + 4 * PERIOD_NS)
    assert s.is_due(T0 + 4 * PERIOD_NS - 10_000_000)  # a camera that ticks a little early


@pytest.mark.parametrize("change", ["new_epoch", "new_task", "retry"])
def test_after_a_break_the_next_new_observation_is_due_at_once(change: str) -> None:
    s = scheduler()
    s.begin(T0)
    getattr(s, change)()
    assert not s.is_due(T0)
    assert s.is_due(T0 + 1)


def test_after_a_clock_jump_older_stamps_are_due() -> None:
    s = scheduler()
    s.begin(T0)
    s.forget_time()
    assert s.is_due(T0 - 10**12)

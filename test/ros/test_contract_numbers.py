"""Numbers of the contract about chunks, clocks and stalls: each changes what happens, where its default would not."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS, T0, ramp, toy_contract, toy_spec
from session_rig import NAMES, Rig

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.contract import check_policy
from omega_qvla_ros.guard import ChunkRejected, MotionGuard
from omega_qvla_ros.motion import Motion
from omega_qvla_ros.observation import ObservationBuffer
from omega_qvla_ros.safety_state import State
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler
from omega_qvla_ros.tracking import TrackingMonitor
from omega_qvla_ros.trajectory import still_plan


@pytest.mark.parametrize(("min_remaining_s", "taken"), [(0.1, True), (0.16, False)])
def test_chunk_with_less_than_this_left_is_late(min_remaining_s: float, taken: bool) -> None:
    """Eight steps of 50 ms from 50 ms after the observation on, and 0.25 s have passed: 0.15 s are left."""
    scheduler = ChunkScheduler(4, 0.1, 0.05, min_remaining_s)
    ticket = scheduler.begin(T0)

    def place() -> None:
        scheduler.place(ticket, ActionChunk(ramp(0.0, 0.01), 0.05, 0.05), T0 + 5 * PERIOD_NS, lambda _: np.zeros(2))

    if taken:
        return place()
    with pytest.raises(ChunkDropped, match="0.15 s away; at least 0.16 s must be left"):
        place()


@pytest.mark.parametrize("own", [True, False], ids=["own numbers", "defaults"])
def test_session_takes_the_contracts_numbers_about_chunks(own: bool) -> None:
    """A policy that takes five periods is late where more than 0.2 of 0.4 s must be left, and latches at the second."""
    numbers = {"chunk": {"min_remaining_s": 0.2}, "safety": {"max_late_chunks": 2}} if own else {}
    rig = Rig(toy_contract(**numbers))
    for _ in range(2):
        rig.policy.block = threading.Event()
        while not rig.session.worker.busy:
            rig.tick()
        rig.run(4)
        block, rig.policy.block = rig.policy.block, None
        block.set()
        rig.wait()
    rig.tick()
    words = "2 chunks in a row were late; the newest came after its own end"
    late = [reason for reason in rig.session.safety.reasons if words in reason]
    assert (rig.state is State.LATCHED, rig.session.scheduler.dropped["late"], len(late)) == (own, 2 * own, own)
    rig.close()


@pytest.mark.parametrize("lead_s", [0.0, 0.01, 0.09])
def test_chunk_takes_over_so_long_after_it_was_planned(lead_s: float) -> None:
    """A message that comes within the lead changes nothing of what the controller does until then."""
    contract = toy_contract(chunk={"switch_lead_s": lead_s, "blend_time_s": 0.0})
    scheduler, guard = ChunkScheduler(4, 0.0, 0.05), MotionGuard(contract)
    motion = Motion(contract, check_policy(contract, toy_spec()), 8, scheduler, guard)

    def give(step: float, now_ns: int) -> None:
        actions = ActionChunk(ramp(0.0, step)[:, ::-1].copy(), 0.05, 0.05)
        motion.on_chunk(scheduler.begin(now_ns), actions, now_ns, np.array([0.0, 0.02]))

    give(0.04, T0)
    now_ns, before = T0 + 120_000_000, motion.plan
    give(-0.01, now_ns)
    after_ms = np.arange(0, 160, 5)
    apart = [
        float(np.abs(motion.plan.sample(now_ns + ms * 1_000_000)[0] - before.sample(now_ns + ms * 1_000_000)[0]).max())
        for ms in after_ms
    ]
    first = int(after_ms[np.flatnonzero(np.array(apart) > 1e-9)[0]])
    assert lead_s * 1e3 <= first - 5 + 1e-6 <= lead_s * 1e3 + 5


@pytest.mark.parametrize(("max_slowdown", "taken"), [(4.0, True), (1.05, False)])
def test_scale_slows_down_by_at_most_this(max_slowdown: float, taken: bool) -> None:
    """2.6 rad/s where 2.0 are allowed."""
    guard = MotionGuard(toy_contract(limits={"mode": "scale", "max_slowdown": max_slowdown}))
    times_ns = T0 + PERIOD_NS * np.arange(1, 9, dtype=np.int64)
    head = still_plan(T0, np.array([-0.9, 0.02]), PERIOD_NS)
    if taken:
        assert guard.limit(head, times_ns, ramp(-0.9, 0.13)).end_ns > times_ns[-1]
        return
    with pytest.raises(ChunkRejected, match="for joint 'shoulder', at most 1.05 times is done"):
        guard.limit(head, times_ns, ramp(-0.9, 0.13))


@pytest.mark.parametrize("stall_time_s", [0.5, 2.0])
def test_joint_that_stands_beside_its_command_is_blocked_after_this_time(stall_time_s: float) -> None:
    contract = toy_contract(safety={"stall_time_s": stall_time_s})
    monitor = TrackingMonitor(NAMES, contract.joint_limits(), contract.safety.stall_time_s)
    times_ns = T0 + PERIOD_NS * np.arange(80)
    lost_ns = next(
        t for t in times_ns.tolist() if monitor.check(t, np.array([0.1, 0.02]), np.array([0.0, 0.02])) is not None
    )
    assert lost_ns - T0 == round(stall_time_s * 1e9)


@pytest.mark.parametrize(("max_clock_skew_s", "fine"), [(0.5, True), (0.3, False)])
def test_clock_that_is_off_by_more_than_this_is_another_one(max_clock_skew_s: float, fine: bool) -> None:
    contract = toy_contract()
    buffer = ObservationBuffer(replace(contract, sensors=replace(contract.sensors, max_clock_skew_s=max_clock_skew_s)))
    for k in range(6):
        now_ns = T0 + k * PERIOD_NS
        buffer.add_image("front", "image", now_ns - 400_000_000, now_ns)
    assert (buffer.clock_skew() is None) is fine

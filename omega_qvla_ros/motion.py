"""From finished chunks to the message of each control period: scheduler -> guard -> plan -> window.

``Motion`` owns the commanded plan. It has no thread, no clock and no ROS: the node calls it from its control timer
with the time, and sends what ``tick`` returns.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from omega_qvla_core.policy_types import ActionChunk, CommittedPrefix
from omega_qvla_ros import jtc
from omega_qvla_ros.contract import PolicyBinding, RobotContract
from omega_qvla_ros.dispatch import Commanded, Dispatch
from omega_qvla_ros.guard import MotionGuard
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler, Ticket
from omega_qvla_ros.splines import nanoseconds, seconds
from omega_qvla_ros.tracking import TrackingMonitor
from omega_qvla_ros.trajectory import (
    JointTrajectory,
    Plan,
    hold_plan,
    measured_plan,
    startable_velocity,
    starting_plan,
    still_plan,
    stop_knots,
    unstamped,
    whole,
    window,
)

log = logging.getLogger(__name__)

HOLD_REPEATS = 3
"""A hold is sent in so many consecutive control periods, so that one lost message does no harm."""
HOLD_PERIODS = HOLD_REPEATS + 1
"""A hold lasts at least this long, so that its last repetition is not after its end."""


@dataclass(frozen=True)
class Seam:
    """How well the newest chunk fits to the motion that was under way, ``[joints]`` each.

    Attributes:
        difference: Distance between both for the chunk's first step, before blending; rad or m.
        acceleration: What the switch asks for before the guard limits it; rad/s^2 or m/s^2.
    """

    difference: np.ndarray
    acceleration: np.ndarray


@dataclass
class MotionCounters:
    """What left the node, ``withdrawn`` because it would have left too late, or ``beyond_limits`` (must stay 0)."""

    published: int = 0
    withdrawn: int = 0
    holds: int = 0
    exhausted: int = 0
    tracking_lost: int = 0
    beyond_limits: int = 0


class Motion:
    """The commanded motion of one robot.

    Args:
        contract: The robot.
        binding: Where its joints stand in the checkpoint's actions.
        horizon: Steps in a chunk of the checkpoint.
        scheduler: Book-keeping of chunks.
        guard: Limits.
    """

    def __init__(
        self,
        contract: RobotContract,
        binding: PolicyBinding,
        horizon: int,
        scheduler: ChunkScheduler,
        guard: MotionGuard,
    ) -> None:
        self._names = contract.joint_names
        self._binding = binding
        self._horizon = horizon
        self._scheduler = scheduler
        self._guard = guard
        self._period_ns = nanoseconds(contract.period_s)
        self._switch_lead_ns = nanoseconds(contract.chunk.switch_lead_s)
        self._chunk_period_ns = nanoseconds(1.0 / contract.chunk_rate_hz)
        self._plan: Plan | None = None
        self._holding = False
        self._hold_left = 0
        self._forget_at_end = False
        self._unstamped = False
        self._last_tick_ns: int | None = None
        self._ran_out: Plan | None = None
        self._task = 0
        self._targets: tuple[np.ndarray, np.ndarray] | None = None
        self.dispatch = Dispatch()
        self._stands_since_ns = 0
        self.seam: Seam | None = None
        """Of the last switch from a motion that was under way."""
        self.tracking = TrackingMonitor(self._names, guard.contract_limits, contract.safety.stall_time_s)
        self.counters = MotionCounters()
        self._beyond: str | None = None
        self.invalid: Counter[str] = Counter()

    @property
    def plan(self) -> Plan | None:
        """The commanded plan, None before the first chunk of an epoch."""
        return self._plan

    @property
    def task(self) -> int:
        """Which instruction the commanded plan was made for; see ``Ticket.task``."""
        return self._task

    def predicted(self, now_ns: int, step_s: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
        """What the arm will do if nothing new comes, for a marker.

        Returns:
            int64 times ``[M]`` from now to the end of the plan, and float64 positions ``[M, joints]``; empty without a
            plan ahead.
        """
        if self._plan is None or now_ns >= self._plan.end_ns:
            return np.empty(0, dtype=np.int64), np.empty((0, len(self._names)))
        times_ns = np.append(np.arange(now_ns, self._plan.end_ns, nanoseconds(step_s)), self._plan.end_ns)
        return times_ns.astype(np.int64), self._plan.states(times_ns)[0]

    def committed_prefix(
        self, observation_ns: int, latency_s: float, first_action_delay_s: float, observed: np.ndarray
    ) -> CommittedPrefix | None:
        """What a chunk planned on an observation would have to continue, for real-time chunking.

        Args:
            observation_ns: Stamp of the observation.
            latency_s: Time after which its chunk is expected.
            first_action_delay_s: Of the policy.
            observed: ``[joints]`` positions at the observation.

        Returns:
            The policy's targets for its next steps as far as they are known, in the checkpoint's order and units; those
            that lie before the switch as they are commanded. None where nothing is under way.
        """
        if self._plan is None or self._holding or self._targets is None:
            return None
        first_ns = observation_ns + nanoseconds(first_action_delay_s)
        times_ns = first_ns + np.arange(self._horizon, dtype=np.int64) * self._chunk_period_ns
        known_ns, known = self._targets
        times_ns = times_ns[times_ns <= known_ns[-1] + self._chunk_period_ns // 4]
        if not len(times_ns):
            return None
        targets = np.stack([np.interp(times_ns, known_ns, column) for column in known.T], axis=1)
        for k in np.flatnonzero(times_ns < known_ns[0]):
            targets[k] = self._plan.sample(int(times_ns[k]))[0]
        switch_ns = (
            observation_ns + nanoseconds(latency_s) + self.dispatch.allowance_ns(holding=False) + self._switch_lead_ns
        )
        return CommittedPrefix(self._binding.actions(targets, observed), int((times_ns < switch_ns).sum()))

    def queue_s(self, now_ns: int) -> float:
        """Planned motion left, in seconds."""
        if self._plan is None or self._holding:
            return 0.0
        return max(float(seconds(self._plan.end_ns - now_ns)), 0.0)

    @property
    def braking(self) -> bool:
        """A hold is under way after which the plan is forgotten; no chunk may be asked for before it is out."""
        return self._forget_at_end

    def stands_since_ns(self, now_ns: int) -> int:
        """When the motion that was forgotten last came to rest: the next one begins at positions measured since.

        Never in the future: a clock that stepped back unnoticed must not keep the arm waiting until it has caught up.
        """
        self._stands_since_ns = min(self._stands_since_ns, now_ns)
        return self._stands_since_ns

    def restart(self, now_ns: int) -> None:
        """Brake, then forget the plan: the next one begins at the measured position.

        The plan is kept until the hold is out, because the controller goes on with the old window until it has
        received the hold; a plan that has ended is forgotten at once.
        """
        self._renew(now_ns)
        self.tracking.restart()
        self._forget_at_end = True
        if self._plan is not None and now_ns < self._plan.end_ns:
            self.hold(now_ns)
        else:
            self._scheduler.new_epoch()
        self._settle(now_ns)

    def forget(self) -> None:
        """Drop the plan without a hold, because nothing of it was sent (dry run)."""
        self._plan = None
        self._forget_at_end = False
        self._holding = False
        self._unstamped = False
        self.dispatch.reset()

    def clock_jumped(self, now_ns: int, measured: np.ndarray | None, velocity: np.ndarray | None) -> None:
        """As ``restart`` when the stamps of the plan mean nothing any more: the hold starts on reception (stamp 0).

        Args:
            now_ns: The new time.
            measured: ``[joints]`` newest measured positions, NaN where they are too old to begin from, None if there
                are none: the last command then.
            velocity: ``[joints]`` their velocities.
        """
        self._scheduler.new_epoch()
        self.tracking.restart()
        self._holding = True
        self._stands_since_ns = now_ns
        if self._plan is None:
            return
        last_ns = self._plan.end_ns if self._last_tick_ns is None else self._last_tick_ns
        position, speed = self._plan.sample(last_ns)
        limits = self._guard.contract_limits
        if measured is not None and velocity is not None:
            # A joint that is not watched may hold something: its command is what holds it, not where it stands.
            watched = np.isfinite(limits.max_tracking_error) & np.isfinite(measured)
            position, speed = np.where(watched, measured, position), np.where(watched, velocity, speed)
        speed = startable_velocity(position, speed, limits, 2 * self._period_ns)
        here = measured_plan(now_ns, position, speed, self._period_ns, self._period_ns)
        self._plan = hold_plan(here, now_ns - self._period_ns, now_ns, limits, self._period_ns, HOLD_PERIODS)
        self._report(here, now_ns - self._period_ns, now_ns)
        self._unstamped = True
        self.dispatch.reset()
        self._last_tick_ns = None
        self._hold_left = HOLD_REPEATS
        self._forget_at_end = True
        self.counters.holds += 1

    def _settle(self, now_ns: int) -> None:
        """Forget the plan if that was asked for and its hold is out."""
        if self._forget_at_end and (self._plan is None or now_ns >= self._plan.end_ns):
            self._forget_at_end = False
            if self._plan is not None:
                self._stands_since_ns = self._plan.end_ns
            self._plan = None
            self._holding = False
            self._unstamped = False
            self.dispatch.reset()

    def on_chunk(
        self,
        ticket: Ticket,
        chunk: ActionChunk,
        now_ns: int,
        measured: np.ndarray,
        velocity: np.ndarray | None = None,
        observed: np.ndarray | None = None,
    ) -> None:
        """Make a finished chunk the commanded motion.

        Args:
            ticket: What the chunk was computed from.
            chunk: Actions in the checkpoint's order and units.
            now_ns: The arm switches to it ``dispatch.allowance_ns`` and ``chunk.switch_lead_s`` later.
            measured: ``[joints]`` measured positions, where the motion begins if nothing is commanded yet.
            velocity: ``[joints]`` measured velocities with which it begins then; None: from rest.
            observed: ``[joints]`` positions at the observation, to which actions that are deltas are added; None: as
                ``measured``.

        Raises:
            ChunkDropped: It is void (another epoch or task) or came too late.
            ChunkRejected: It breaks a limit; the committed plan stays.
        """
        self._scheduler.admit(ticket)
        actions = np.asarray(chunk.actions, dtype=np.float64)
        if actions.ndim == 2 and actions.shape[1] == len(self._binding.action_entries):
            actions = self._binding.targets(actions, measured if observed is None else observed)
        self._guard.check_actions(actions, self._horizon)
        self._renew(now_ns)
        self._settle(now_ns)
        if self.braking:
            raise ChunkDropped("epoch", "the arm brakes before it begins anew")
        left_ns = now_ns + self.dispatch.allowance_ns(holding=False)
        base = self._plan
        if base is None:
            ahead_ns = left_ns - now_ns + self._switch_lead_ns + self._period_ns
            base = starting_plan(now_ns, measured, velocity, self._guard.contract_limits, self._period_ns, ahead_ns)
        if base.times_ns[0] > now_ns:
            base = still_plan(now_ns, base.positions[0], self._period_ns)
        switch_ns = base.free_time(left_ns + self._switch_lead_ns)
        placement = self._scheduler.place(
            ticket,
            ActionChunk(actions, chunk.period_s, chunk.first_action_delay_s),
            left_ns,
            lambda time_ns: base.sample(time_ns)[0],
            switch_ns,
        )
        head = base.committed(switch_ns, now_ns - 2 * self._period_ns)
        plan = self._with_end(self._guard.limit(head, placement.times_ns, placement.targets))
        finding = self._guard.finding(plan, base, now_ns, switch_ns)
        if finding is not None:
            self._guard.refuse(finding)
        if self._plan is not None and switch_ns < self._plan.end_ns and not self._holding:
            self.seam = Seam(placement.seam, self._guard.asked * self._guard.limits.max_acceleration)
        self._plan = plan
        self.dispatch.part_at(switch_ns)
        self._scheduler.confirm(ticket, placement)
        self._task = ticket.task
        inside = np.clip(placement.targets, self._guard.limits.position_min, self._guard.limits.position_max)
        self._targets = (placement.times_ns, inside)
        self._holding = False

    def shorten(self, now_ns: int, steps: int, leaves_ns: int | None = None) -> None:
        """End the plan ``steps`` steps of a chunk from now: what is left belongs to an older instruction.

        Args:
            now_ns: The node's time.
            steps: Of the policy.
            leaves_ns: When the message with it is about to leave, None: with the next one.
        """
        if leaves_ns is None:
            leaves_ns = now_ns + self._period_ns + self.dispatch.allowance_ns(holding=False)
        until_ns = max(now_ns + steps * self._chunk_period_ns, leaves_ns + self._switch_lead_ns)
        if self._plan is not None and not self._holding and self._plan.end_ns > until_ns:
            until_ns = self._plan.free_time(until_ns)
            self._targets = None
            known = self._plan
            self._plan = self._with_end(known.committed(until_ns, now_ns - 2 * self._period_ns))
            self._report(known, now_ns, until_ns)
            self.dispatch.part_at(until_ns)

    def hold(self, now_ns: int, leaves_ns: int | None = None) -> None:
        """Decelerate and stay; chunks under way are void. Does nothing while holding.

        It begins when its message can be there (``dispatch.allowance_ns`` and ``chunk.switch_lead_s``): one that begins
        earlier would not stop the arm earlier, but with a step of its velocity.

        Args:
            now_ns: The node's time.
            leaves_ns: When its message is about to leave, None: now, and what planning takes later.
        """
        if self._holding:
            return
        self._scheduler.new_epoch()
        self.tracking.restart()
        self._holding = True
        self._hold_left = 0
        if self._plan is not None:
            limits = self._guard.contract_limits
            leaves_ns = now_ns + self.dispatch.allowance_ns(holding=True) if leaves_ns is None else leaves_ns
            start_ns = self._plan.free_time(leaves_ns + self._switch_lead_ns)
            known = self._plan
            self._plan = hold_plan(known, now_ns - self._period_ns, start_ns, limits, self._period_ns, HOLD_PERIODS)
            self._report(known, now_ns, start_ns)
            self._hold_left = HOLD_REPEATS
            self.dispatch.part_at(start_ns)
            self.counters.holds += 1

    @property
    def holding(self) -> bool:
        """True from ``hold`` until the next accepted chunk."""
        return self._holding

    def tick(self, now_ns: int) -> JointTrajectory | None:
        """What is to be sent in this control period: the rolling window, a hold's repetition, or nothing.

        Returns:
            A trajectory that a stock controller accepts, or None.
        """
        self._renew(now_ns)
        self._settle(now_ns)
        if self._plan is None:
            return None
        self._last_tick_ns = now_ns
        if self._holding:
            if self._hold_left <= 0 or now_ns >= self._plan.end_ns:
                return None
            first = self._hold_left == HOLD_REPEATS
            self._hold_left -= 1
            if self._unstamped:
                soonest_ns = 0 if first else self._switch_lead_ns
                return self._checked(unstamped(self._plan, now_ns, self._names, soonest_ns), now_ns)
            # Whole, so that every repetition has the same stamp: before the moment of the hold.
            return self._checked(whole(self._plan, self._names), now_ns)
        if now_ns >= self._plan.end_ns:
            if not self.exhausted:
                self._ran_out = self._plan
                self.counters.exhausted += 1
                self._scheduler.retry()
            return None
        return self._checked(window(self._plan, now_ns, self._names, self._period_ns), now_ns)

    def in_time(self, message: JointTrajectory, now_ns: int, age_ns: int) -> JointTrajectory | None:
        """What may leave, if the message took long to make: one whose motion parts in the past would be a step.

        A hold then begins anew; a chunk is withdrawn, and the motion that the controller knows goes on.

        Args:
            message: What ``tick`` gave last.
            now_ns: The time that ``tick`` was given.
            age_ns: How long ago that was.

        Returns:
            ``message`` itself if it is in time.
        """
        sent = self.dispatch.left(now_ns, age_ns, self._switch_lead_ns)
        if sent is None:
            return message
        self._back_to(sent, now_ns, now_ns + age_ns)
        return self.tick(now_ns)

    def _renew(self, now_ns: int) -> None:
        """A hold or a cut that was decided upon between two messages and has not left by its beginning begins anew."""
        sent = self.dispatch.overdue(now_ns) if self._holding or self._targets is None else None
        if sent is not None:
            self._back_to(sent, now_ns)

    def _back_to(self, sent: Commanded, now_ns: int, leaves_ns: int | None = None) -> None:
        """What was planned since has not left: the controller knows ``sent``. A hold is planned anew from there."""
        hold, chunk = self._holding, self._targets is not None and self._targets is not sent.targets
        self._plan, self._targets, self._task, self._holding = sent.plan, sent.targets, sent.task, sent.holding
        if hold and not self._holding:
            self.counters.holds -= 1
            self.hold(now_ns, leaves_ns)
        elif not hold:
            if chunk:
                self.counters.withdrawn += 1
                self._scheduler.withdraw()
            if self._task != self._scheduler.task:
                self.shorten(now_ns, self._scheduler.execution_horizon_steps, leaves_ns)

    @property
    def exhausted(self) -> bool:
        """The plan was executed to its end and nothing newer came: the arm stands."""
        return self._plan is None or self._plan is self._ran_out

    def watch_tracking(self, stamp_ns: int, measured: np.ndarray) -> str | None:
        """Compare a measured sample with what was commanded for its time.

        Args:
            stamp_ns: Time of the measurement.
            measured: ``[joints]``.

        Returns:
            The reason if the arm is lost, counted in ``tracking.losses``; the caller holds. Else None.
        """
        if self._plan is None or stamp_ns < self._plan.times_ns[0]:
            self.tracking.restart()
            return None
        reason = self.tracking.check(stamp_ns, self._plan.sample(stamp_ns)[0], measured)
        self.counters.tracking_lost += reason is not None
        return reason

    def _report(self, known: Plan, now_ns: int, switch_ns: int) -> None:
        """Measure the plan that ends or cuts ``known``. It is sent in any case: an arm that goes on would be worse."""
        assert self._plan is not None
        finding = self._guard.finding(self._plan, known, now_ns, switch_ns)
        if finding is not None:
            self.counters.beyond_limits += 1
            self._beyond = finding.text
            log.error("a hold or a shortened motion is sent although %s", finding.text)

    def take_beyond(self) -> str | None:
        """What was sent against the limits since the last call, because it stops the arm; None: nothing, as always."""
        text, self._beyond = self._beyond, None
        return text

    def _with_end(self, plan: Plan) -> Plan:
        # Not at a lowered position limit, which the joint may be too fast for: that would brake with any deceleration.
        hard = self._guard.contract_limits
        limits = replace(self._guard.limits, position_min=hard.position_min, position_max=hard.position_max)
        times, positions, velocities = stop_knots(plan.end_ns, plan.positions[-1], plan.velocities[-1], limits)
        return plan.then(times, positions, velocities)

    def _checked(self, trajectory: JointTrajectory, now_ns: int) -> JointTrajectory | None:
        """The controller refuses silently; this refuses loudly. Must never happen."""
        reason = jtc.validate(trajectory, now_ns, self._names)
        if reason is None:
            self.counters.published += 1
            self.dispatch.message(Commanded(self._plan, self._targets, self._task, self._holding))
            return trajectory
        self.invalid[reason] += 1
        log.error("a trajectory was not sent because the controller would refuse it: %s", reason)
        return None

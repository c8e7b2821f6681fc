"""The guard: no value that a policy emits reaches the arm unchecked, and the arm moves only while nothing is wrong.

A stock joint_trajectory_controller checks neither NaN nor limits nor jumps, so this is the only place where they are
checked. ``MotionGuard`` looks at numbers, ``SafetyState`` remembers what is wrong. Both take the time as an argument,
so tests inject it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.splines import knot_velocities, nanoseconds, seconds, segment_peak_speeds, segment_ranges
from omega_qvla_ros.trajectory import Plan, brakable_velocity

_TOLERANCE = 1e-9
_SPEED_SHRINK = 0.92
_MAX_SHRINKS = 80  # 0.92^80 = 0.0013: by then the segment's own slope no longer matters


class ChunkRejected(Exception):
    """A chunk may not be executed; the message names the joint, the value and the limit."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class GuardCounters:
    """What the guard did since the node was configured: per joint where it clamped, per kind where it refused."""

    clamped_position: Counter[str] = field(default_factory=Counter)
    clamped_velocity: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


class MotionGuard:
    """Checks chunks and limits plans of one robot: finite values, positions, steps and speeds, not accelerations.

    Args:
        contract: Joint names, limits and limit mode.
    """

    def __init__(self, contract: RobotContract) -> None:
        self._names = contract.joint_names
        self._mode = contract.limits.mode
        self._reject_beyond = contract.limits.reject_beyond_range
        self._period_s = contract.period_s
        self.limits = contract.joint_limits()
        self.counters = GuardCounters()

    def check_actions(self, actions: np.ndarray, steps: int) -> None:
        """Refuse a chunk of the wrong shape or with values that are not finite.

        Args:
            actions: ``[steps, joints]`` in contract order.
            steps: Number of steps that the checkpoint promises.

        Raises:
            ChunkRejected: kind ``shape`` or ``not_finite``.
        """
        expected = (steps, len(self._names))
        if actions.shape != expected:
            self._reject("shape", f"the policy gave actions of shape {list(actions.shape)}, expected {list(expected)}")
        finite = np.isfinite(actions)
        if not finite.all():
            step, joint = np.argwhere(~finite)[0]
            self._reject("not_finite", f"action {step} of joint {self._names[joint]!r} is {actions[step, joint]}")

    def limit(self, head: Plan, times_ns: np.ndarray, targets: np.ndarray) -> Plan:
        """Continue a committed plan through targets, within the limits of position, step and speed.

        Acceleration is not limited here: between two knots the arm changes its speed as fast as the targets ask for.
        ``max_acceleration`` limits holds and the end of every plan (``stop_knots``, ``brakable_velocity``) only.

        Args:
            head: Committed motion; its last knot is the last commanded sample, from which jumps are measured.
            times_ns: int64 ``[N]`` times of the targets, all after the head.
            targets: ``[N, joints]``, already blended.

        Returns:
            ``head`` followed by at least N knots. Positions are within the position limits (or move inwards where the
            arm started outside), the speed of the cubic through them is nowhere above the velocity limit, and the
            last velocity can be braked before the position limit. The end point is not added here.

        Raises:
            ChunkRejected: kind ``position``, ``jump``, ``velocity``.
        """
        targets = self._limit_position(targets, head.positions[-1])
        self._check_jumps(head, times_ns, targets)
        plan = self._limit_velocity(head, times_ns, targets)
        first = len(head.times_ns) - 1
        swinging = self._swings_out(plan, first)
        if swinging.any():
            outward = np.where(head.velocities[-1] > 0.0, self.limits.position_max, self.limits.position_min)
            targets[0] = np.where(swinging, outward, targets[0])
            plan = self._limit_velocity(head, times_ns, targets)
            for joint in np.flatnonzero(swinging):
                plan = self._stop_at(plan, first, int(times_ns[0]), int(joint), float(outward[joint]))
            outside = self._swings_out(plan, first)
            if outside.any():
                name = self._names[int(np.flatnonzero(outside)[0])]
                self._reject("position", f"joint {name!r} is too fast to turn before its position limit")
        return plan

    def _limit_position(self, targets: np.ndarray, start: np.ndarray) -> np.ndarray:
        low, high = self.limits.position_min, self.limits.position_max
        outside = np.maximum(low - targets, targets - high)
        worst = np.unravel_index(int(np.argmax(outside / (high - low))), outside.shape)
        if outside[worst] > 0.0:
            joint = int(worst[1])
            text = (
                f"target {targets[worst]:.4f} of joint {self._names[joint]!r} is outside "
                f"[{low[joint]:.4f}, {high[joint]:.4f}]"
            )
            beyond = outside[worst] / (high[joint] - low[joint])
            if self._mode == "reject" or (self._reject_beyond is not None and beyond > self._reject_beyond):
                self._reject("position", text)
            for index in np.flatnonzero((outside > 0.0).any(axis=0)):
                self.counters.clamped_position[self._names[index]] += 1
        return np.clip(targets, low, high)

    def _check_jumps(self, head: Plan, times_ns: np.ndarray, targets: np.ndarray) -> None:
        """Refuse steps that no velocity limit explains. A start outside the limits may return at any distance."""
        start = head.positions[-1]
        inside_start = np.clip(start, self.limits.position_min, self.limits.position_max)
        positions = np.vstack([inside_start, targets])
        spans_s = seconds(np.diff(np.concatenate([head.times_ns[-1:], times_ns])))
        allowed = self.limits.max_jump * np.maximum(1.0, spans_s / self._period_s)[:, None]
        steps = np.abs(np.diff(positions, axis=0))
        excess = steps / allowed
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        if excess[worst] > 1.0 + _TOLERANCE:
            self._reject(
                "jump",
                f"joint {self._names[int(worst[1])]!r} would jump by {steps[worst]:.4f} in {spans_s[worst[0]]:.3f} s "
                f"(from {positions[worst]:.4f} to {targets[worst]:.4f}); at most {allowed[worst]:.4f} is allowed",
            )

    def _limit_velocity(self, head: Plan, times_ns: np.ndarray, targets: np.ndarray) -> Plan:
        """Follow the targets no faster than the limits, the peaks inside the cubic segments included."""
        all_ns = np.concatenate([head.times_ns[-1:], times_ns])
        spans_s = seconds(np.diff(all_ns))
        wanted = np.abs(np.diff(np.vstack([head.positions[-1], targets]), axis=0)) / spans_s[:, None]
        too_fast = wanted > self.limits.max_velocity * (1.0 + 1e-6)
        if too_fast.any():
            step, joint = np.argwhere(too_fast)[0]
            if self._mode == "reject":
                self._reject(
                    "velocity",
                    f"joint {self._names[joint]!r} would move at {wanted[step, joint]:.3f}/s, "
                    f"the limit is {self.limits.max_velocity[joint]:.3f}/s",
                )
            for index in np.flatnonzero(too_fast.any(axis=0)):
                self.counters.clamped_velocity[self._names[index]] += 1
        share = np.ones_like(targets)
        for _ in range(_MAX_SHRINKS):
            positions = self._follow(head.positions[-1], targets, spans_s[:, None] * self.limits.max_velocity * share)
            velocities = knot_velocities(all_ns, positions, head.velocities[-1])
            velocities[-1] = brakable_velocity(positions[-1], velocities[-1], self.limits)
            peaks = segment_peak_speeds(all_ns, positions, velocities)
            over = peaks > np.maximum(self.limits.max_velocity, np.abs(head.velocities[-1])) * (1.0 + _TOLERANCE)
            if not over.any():
                return head.then(times_ns, positions[1:], velocities[1:])
            share = np.where(over, share * _SPEED_SHRINK, share)
        joint = int(np.flatnonzero(over.any(axis=0))[0])
        self._reject("velocity", f"no speed within the limit of joint {self._names[joint]!r} follows this chunk")
        raise AssertionError("unreachable")

    @staticmethod
    def _follow(start: np.ndarray, targets: np.ndarray, max_steps: np.ndarray) -> np.ndarray:
        """``[N + 1, joints]`` positions that approach each target by at most ``max_steps[k]``, beginning at start."""
        positions = np.empty((len(targets) + 1, len(start)))
        positions[0] = start
        for k, target in enumerate(targets):
            positions[k + 1] = positions[k] + np.clip(target - positions[k], -max_steps[k], max_steps[k])
        return positions

    def _swings_out(self, plan: Plan, first: int) -> np.ndarray:
        """bool ``[joints]``: the arm keeps its present speed at knot ``first`` and so swings past a position limit."""
        start = plan.positions[first]
        low, high = segment_ranges(plan.times_ns[first:], plan.positions[first:], plan.velocities[first:])
        lowest = np.minimum(self.limits.position_min, start) - _TOLERANCE
        highest = np.maximum(self.limits.position_max, start) + _TOLERANCE
        return ((low < lowest) | (high > highest)).any(axis=0)

    @staticmethod
    def _stop_at(plan: Plan, first: int, before_ns: int, joint: int, limit: float) -> Plan:
        """Insert a knot at which a joint that moves towards its limit has come to rest there.

        Constant deceleration takes ``2 distance / speed``; if that is after ``before_ns`` nothing has to be done. The
        other joints go on as before, because cutting a cubic does not change it.
        """
        speed = abs(float(plan.velocities[first, joint]))
        distance = abs(limit - float(plan.positions[first, joint]))
        if 2.0 * distance >= speed * float(seconds(before_ns - plan.times_ns[first])):
            return plan
        stop_ns = int(plan.times_ns[first]) + max(nanoseconds(2.0 * distance / speed), 1)
        k = int(np.searchsorted(plan.times_ns, stop_ns, side="left"))
        rest = k + 1 if plan.times_ns[k] == stop_ns else k
        position, velocity = plan.sample(stop_ns)
        position[joint], velocity[joint] = limit, 0.0
        return Plan(
            times_ns=np.concatenate([plan.times_ns[:k], [stop_ns], plan.times_ns[rest:]]).astype(np.int64),
            positions=np.vstack([plan.positions[:k], position, plan.positions[rest:]]),
            velocities=np.vstack([plan.velocities[:k], velocity, plan.velocities[rest:]]),
        )

    def _reject(self, kind: str, message: str) -> None:
        self.counters.rejected[kind] += 1
        raise ChunkRejected(kind, message)


class State(Enum):
    """OK and DEGRADED move; HOLD decelerates and resumes by itself; LATCHED needs ``~/reset_fault``."""

    OK = 0
    DEGRADED = 1
    HOLD = 2
    LATCHED = 3


class SafetyState:
    """What is wrong right now, by name, and what follows from it.

    Args:
        max_consecutive_errors: So many policy errors without a success in between latch.
        retry_delay_s: Hold after a policy error before the next attempt.
    """

    def __init__(self, max_consecutive_errors: int = 3, retry_delay_s: float = 0.5) -> None:
        self.configure(max_consecutive_errors, retry_delay_s)
        self._latched: dict[str, str] = {}
        self._holds: dict[str, str] = {}
        self._warnings: dict[str, str] = {}
        self._retry_until_ns: dict[str, int] = {}
        self.consecutive_errors = 0

    def configure(self, max_consecutive_errors: int, retry_delay_s: float) -> None:
        """Take other numbers; what is held or latched stays."""
        self._max_errors = max_consecutive_errors
        self._retry_ns = nanoseconds(retry_delay_s)

    @property
    def state(self) -> State:
        """The worst of everything that is set."""
        if self._latched:
            return State.LATCHED
        if self._holds:
            return State.HOLD
        return State.DEGRADED if self._warnings else State.OK

    @property
    def may_move(self) -> bool:
        """True in OK and DEGRADED."""
        return not self._latched and not self._holds

    @property
    def reasons(self) -> Sequence[str]:
        """Every reason, worst first."""
        return [*self._latched.values(), *self._holds.values(), *self._warnings.values()]

    def latch(self, key: str, reason: str) -> None:
        """Stop until ``reset``."""
        self._latched.setdefault(key, reason)

    def hold(self, key: str, reason: str) -> None:
        """Stop until ``release(key)``."""
        self._holds[key] = reason

    def held(self, key: str) -> str | None:
        """The reason of the hold ``key``, None if it is not set."""
        return self._holds.get(key)

    def release(self, key: str) -> None:
        """The cause ``key`` is gone."""
        self._holds.pop(key, None)

    def warn(self, key: str, reason: str | None) -> None:
        """Set a reason for DEGRADED, or clear it with None."""
        if reason is None:
            self._warnings.pop(key, None)
        else:
            self._warnings[key] = reason

    def policy_error(self, reason: str, now_ns: int) -> None:
        """An inference failed or its chunk was refused: hold, retry later; latch after too many in a row."""
        self.consecutive_errors += 1
        self.fault("policy", reason, now_ns, self.consecutive_errors, "policy errors")

    def fault(self, key: str, reason: str, now_ns: int, in_a_row: int, what: str) -> None:
        """Hold for the retry delay; latch if this was one too many in a row.

        Args:
            key: Name of the hold, and of the latch.
            reason: For people.
            now_ns: Node time.
            in_a_row: How many such faults there were without a success in between, this one included.
            what: Name of such faults, in the plural.
        """
        if in_a_row >= self._max_errors:
            self.latch(key, f"{in_a_row} {what} in a row, the last one: {reason}")
        self.hold(key, reason)
        self._retry_until_ns[key] = now_ns + self._retry_ns

    def policy_success(self) -> None:
        """A chunk was accepted."""
        self.consecutive_errors = 0

    def update(self, now_ns: int) -> None:
        """End the holds of ``fault`` whose time is over."""
        for key in [key for key, until_ns in self._retry_until_ns.items() if now_ns >= until_ns]:
            del self._retry_until_ns[key]
            self.release(key)

    def reset(self) -> Sequence[str]:
        """Clear latched faults and the error count; holds stay until their cause is gone. Returns what was cleared."""
        cleared = list(self._latched.values())
        self._latched.clear()
        self.consecutive_errors = 0
        for key in self._retry_until_ns:
            self.release(key)
        self._retry_until_ns.clear()
        return cleared

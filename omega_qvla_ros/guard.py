"""The guard: no value that a policy emits reaches the arm unchecked.

A stock joint_trajectory_controller checks neither NaN nor limits nor jumps, so this is the only place where they are
checked. ``safety_state`` remembers what is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.contract import JointLimits, RobotContract
from omega_qvla_ros.follower import follow, stretched
from omega_qvla_ros.measure import SLACK, Finding, beyond, excess, parts_early
from omega_qvla_ros.splines import knot_velocities, seconds
from omega_qvla_ros.trajectory import Plan, brakable_velocity

_TOLERANCE = 1e-9


class ChunkRejected(Exception):
    """A chunk may not be executed; the message names the joint, the value and the limit."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class GuardCounters:
    """What the guard did since the node was configured.

    Attributes:
        clamped_position: Joint -> chunks in which a target was outside its limits and was moved inside.
        clamped_velocity: Joint -> chunks that asked for more than its velocity limit and were followed more slowly.
        clamped_acceleration: Joint -> chunks that asked for more than its acceleration limit, likewise.
        stretched: Chunks that ``scale`` slowed down.
        rejected: Kind -> chunks refused.
        rejected_joints: ``kind.joint`` -> chunks refused because of this joint.
    """

    clamped_position: Counter[str] = field(default_factory=Counter)
    clamped_velocity: Counter[str] = field(default_factory=Counter)
    clamped_acceleration: Counter[str] = field(default_factory=Counter)
    stretched: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    rejected_joints: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class LimitScales:
    """Live limits as shares of the contract's, each greater than 0 and at most 1.

    Attributes:
        position: Share of every joint's range that is left, about its middle.
        velocity: Share of ``max_velocity``; ``max_jump`` shrinks with it.
        acceleration: Share of ``max_acceleration``. Holds and emergency braking keep the contract's.
    """

    position: float = 1.0
    velocity: float = 1.0
    acceleration: float = 1.0

    def check(self) -> None:
        """Refuse scales that would loosen the contract.

        Raises:
            ConfigError: Naming the scale and its value.
        """
        for name in ("position", "velocity", "acceleration"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"the {name} limit scale is {value}; it must be greater than 0 and at most 1, because limits may "
                    "only be tighter than the contract's"
                )

    def apply(self, limits: JointLimits) -> JointLimits:
        """The contract's limits, tightened."""
        middle = (limits.position_min + limits.position_max) / 2.0
        half = (limits.position_max - limits.position_min) / 2.0 * self.position
        whole = self.position == 1.0
        return replace(
            limits,
            position_min=limits.position_min if whole else middle - half,
            position_max=limits.position_max if whole else middle + half,
            max_velocity=limits.max_velocity * self.velocity,
            max_acceleration=limits.max_acceleration * self.acceleration,
            max_jump=limits.max_jump * self.velocity,
        )


class MotionGuard:
    """Checks chunks and limits plans of one robot: finite values, positions, jumps, speeds and accelerations.

    Args:
        contract: Joint names, limits and limit mode.

    Attributes:
        contract_limits: As the contract has them; holds brake with these.
        counters: What it did.
        asked: ``[joints]``, the highest acceleration that the last chunk asked for in its first two segments, as a
            multiple of the limit: what the seam between two chunks would cost without the guard.
    """

    def __init__(self, contract: RobotContract) -> None:
        self._names = contract.joint_names
        self._mode = contract.limits.mode
        self._reject_beyond = contract.limits.reject_beyond_range
        self._max_slowdown = contract.limits.max_slowdown
        self._period_s = contract.period_s
        self.contract_limits = contract.joint_limits()
        self._limits = self.contract_limits
        self._scales = LimitScales()
        self.counters = GuardCounters()
        self.asked = np.zeros(len(self._names))

    @property
    def limits(self) -> JointLimits:
        """The limits of the next plan: the contract's or tighter."""
        return self._limits

    @property
    def limit_scales(self) -> LimitScales:
        """What ``set_limit_scales`` was given last."""
        return self._scales

    def set_limit_scales(self, scales: LimitScales) -> None:
        """Tighten the limits from the next chunk on, or give the contract's back.

        A joint that is too fast or too near to a tightened limit brakes into it with the tightened acceleration; where
        that would pass the contract's own position limit, with the contract's.

        Args:
            scales: Shares of the contract's limits.

        Raises:
            ConfigError: A scale is not within (0, 1]; the present ones stay.
        """
        scales.check()
        self._scales = scales
        self._limits = scales.apply(self.contract_limits)

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
            self._reject(
                "not_finite", f"action {step} of joint {self._names[joint]!r} is {actions[step, joint]}", int(joint)
            )

    def limit(self, head: Plan, times_ns: np.ndarray, targets: np.ndarray) -> Plan:
        """Continue a committed plan through targets, within the limits of position, jump, speed and acceleration.

        Args:
            head: Committed motion; its last knot is the last commanded sample, where the new motion begins with the
                same position and velocity, and from which jumps are measured.
            times_ns: int64 ``[N]`` times of the targets, all after the head.
            targets: ``[N, joints]``, already blended.

        Returns:
            ``head`` followed by at least N knots. The cubic through them is at every instant within the limits of
            position (or moves inwards where the arm started outside), velocity and acceleration, and its end can be
            braked before the position limit. The end point is not added here. In mode ``scale`` the knots may lie
            later than ``times_ns``.

        Raises:
            ChunkRejected: kind ``position``, ``jump``, ``velocity`` or ``acceleration``.
        """
        targets = self._limit_position(targets)
        self._check_jumps(head, times_ns, targets)
        reference = self._reference(head, times_ns, targets)
        over = excess(reference, self.limits)
        self.asked = over["acceleration"][:2].max(axis=0)
        if self._mode == "reject":
            self._refuse_excess(reference, over)
        if self._mode == "scale":
            reference = self._stretch(reference, over)
        self._count_excess(excess(reference, self.limits) if self._mode == "scale" else over)
        plan = follow(reference, self.limits, self.contract_limits)
        return head.then(plan.times_ns[1:], plan.positions[1:], plan.velocities[1:])

    def finding(self, plan: Plan, known: Plan, now_ns: int, switch_ns: int) -> Finding | None:
        """The last measurement, of every plan before any of it is sent: chunks, holds and what was shortened alike.

        Args:
            plan: The whole motion: head, what follows it, and the way to rest.
            known: The motion that it goes on from.
            now_ns: The node's time.
            switch_ns: Until then the plan must be ``known``.

        Returns:
            What is against the contract's limits or a step, which must never happen; None if nothing is.
        """
        return beyond(plan, self.contract_limits, self._names) or parts_early(
            known, plan, now_ns, switch_ns, self.contract_limits, self._names
        )

    def refuse(self, finding: Finding) -> None:
        """Refuse the chunk whose plan has this finding.

        Raises:
            ChunkRejected: kind ``internal``.
        """
        self._reject("internal", finding.text, finding.joint)

    def _limit_position(self, targets: np.ndarray) -> np.ndarray:
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
                self._reject("position", text, joint)
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
        excess_ratio = steps / allowed
        worst = np.unravel_index(int(np.argmax(excess_ratio)), excess_ratio.shape)
        if excess_ratio[worst] > 1.0 + _TOLERANCE:
            self._reject(
                "jump",
                f"joint {self._names[int(worst[1])]!r} would jump by {steps[worst]:.4f} in {spans_s[worst[0]]:.3f} s "
                f"(from {positions[worst]:.4f} to {targets[worst]:.4f}); at most {allowed[worst]:.4f} is allowed",
                int(worst[1]),
            )

    def _reference(self, head: Plan, times_ns: np.ndarray, targets: np.ndarray) -> Plan:
        """The cubic through the targets from the committed state on, as the policy means it."""
        all_ns = np.concatenate([head.times_ns[-1:], times_ns])
        positions = np.vstack([head.positions[-1], targets])
        velocities = knot_velocities(all_ns, positions, head.velocities[-1])
        velocities[-1] = brakable_velocity(positions[-1], velocities[-1], self.limits)
        return Plan(all_ns, positions, velocities)

    def _refuse_excess(self, reference: Plan, over: dict[str, np.ndarray]) -> None:
        for kind, unit in (("velocity", "/s"), ("acceleration", "/s^2")):
            ratio = over[kind]
            worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            if ratio[worst] > 1.0 + SLACK:
                joint = int(worst[1])
                limit = getattr(self.limits, f"max_{kind}")[joint]
                verb = "move at" if kind == "velocity" else "accelerate with"
                after_s = seconds(int(reference.times_ns[worst[0]] - reference.times_ns[0]))
                self._reject(
                    kind,
                    f"joint {self._names[joint]!r} would {verb} {ratio[worst] * limit:.3f}{unit} {after_s:.3f} s after "
                    f"the switch, the limit is {limit:.3f}{unit}",
                    joint,
                )

    def _stretch(self, reference: Plan, over: dict[str, np.ndarray]) -> Plan:
        """Slow a chunk down until its own motion fits; how the arm gets into it is the follower's work."""
        if len(reference.times_ns) < 3:
            return reference
        speed, acceleration = over["velocity"][1:], over["acceleration"][1:]
        factor = max(1.0, float(speed.max()), float(np.sqrt(acceleration.max())))
        if factor > self._max_slowdown:
            kind = "velocity" if speed.max() >= np.sqrt(acceleration.max()) else "acceleration"
            joint = int(np.argmax(over[kind][1:].max(axis=0)))
            self._reject(
                kind,
                f"the chunk would have to be slowed down {factor:.1f} times for joint {self._names[joint]!r}, at most "
                f"{self._max_slowdown:g} times is done",
                joint,
            )
        if factor <= 1.0 + _TOLERANCE:
            return reference
        self.counters.stretched += 1
        return stretched(reference, factor * (1.0 + _TOLERANCE))

    def _count_excess(self, over: dict[str, np.ndarray]) -> None:
        for kind in ("velocity", "acceleration"):
            counter = getattr(self.counters, f"clamped_{kind}")
            for index in np.flatnonzero((over[kind] > 1.0 + SLACK).any(axis=0)):
                counter[self._names[index]] += 1

    def _reject(self, kind: str, message: str, joint: int | None = None) -> None:
        self.counters.rejected[kind] += 1
        if joint is not None:
            self.counters.rejected_joints[f"{kind}.{self._names[joint]}"] += 1
        raise ChunkRejected(kind, message)

"""One configured policy on one robot: observation -> inference -> motion, and what happens when something fails.

The node gives messages and the time, and sends what ``step`` returns. Everything here runs on the node's executor
thread except ``_infer``, which runs on the worker thread and touches nothing but its job and the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from omega_qvla_core.errors import InstructionError
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.policy_types import ActionChunk, Observation, PolicySpec
from omega_qvla_ros.contract import RobotContract, check_policy
from omega_qvla_ros.guard import ChunkRejected, MotionGuard, SafetyState
from omega_qvla_ros.inference import InferenceResult, InferenceWorker
from omega_qvla_ros.motion import Motion
from omega_qvla_ros.observation import NotReady, ObservationBuffer, Snapshot
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler
from omega_qvla_ros.splines import nanoseconds, seconds
from omega_qvla_ros.stats import Percentiles, TickMonitor
from omega_qvla_ros.trajectory import JointTrajectory

log = logging.getLogger(__name__)

MAX_LATE_CHUNKS = 5
"""So many chunks in a row that come after their own end latch: the policy is too slow for this robot."""


class PolicyLike(Protocol):
    """What a session needs of ``omega_qvla_core.runtime.Policy``."""

    spec: PolicySpec

    def infer(self, observation: Observation, noise: np.ndarray | None = None, seed: int = 0) -> ActionChunk:
        """Plan one chunk."""


@dataclass(frozen=True)
class SessionOptions:
    """Numbers of a session; see the parameter table of the policy node for their origins."""

    execution_horizon_steps: int
    blend_time_s: float
    noise_seed: int = 0
    inference_timeout_s: float = 2.0
    retry_delay_s: float = 0.5
    max_consecutive_errors: int = 3
    startup_warn_s: float = 5.0


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    instruction: str
    noise_seed: int


class PolicySession:
    """The running policy.

    Args:
        contract: The robot.
        policy: A loaded policy.
        options: Numbers.
        decode: Image message, camera key -> uint8 ``[H, W, 3]`` RGB; runs on the worker thread.
        on_done: Wakes the executor when an inference has finished; called on the worker thread.

    Raises:
        ConfigError: Contract and checkpoint do not fit.
    """

    def __init__(
        self,
        contract: RobotContract,
        policy: PolicyLike,
        options: SessionOptions,
        decode: Callable[[Any, str], np.ndarray],
        on_done: Callable[[], None],
    ) -> None:
        self.contract = contract
        self.policy = policy
        self.options = options
        self._binding = check_policy(contract, policy.spec)
        self._decode = decode
        self.guard = MotionGuard(contract)
        self.scheduler = ChunkScheduler(
            options.execution_horizon_steps, options.blend_time_s, 1.0 / policy.spec.control_hz
        )
        self.motion = Motion(contract, self._binding, policy.spec.horizon, self.scheduler, self.guard)
        self.safety = SafetyState(options.max_consecutive_errors, options.retry_delay_s)
        self.buffer = ObservationBuffer(contract)
        self.worker: InferenceWorker[_Job] = InferenceWorker(self._infer, on_done)
        self.latency_s = Percentiles()
        self.reaction_s = Percentiles()
        self.ticks = TickMonitor(contract.period_s)
        self.noise_seed = options.noise_seed
        self._inferences = 0
        self.instruction = ""
        self._active = False
        self._late_in_a_row = 0
        self._last_step_ns = 0
        self._waiting_since_ns: int | None = None
        self._ready_since_restart = False
        self.safety.hold("stopped", "not started")

    # What the operator asks for.

    def set_instruction(self, instruction: str, now_ns: int) -> None:
        """Tell the arm something else. The rest of the present plan is cut to one execution horizon.

        Args:
            instruction: Not empty; the caller refuses empty ones.
            now_ns: Node time.
        """
        if instruction == self.instruction:
            return
        self.instruction = instruction
        self.scheduler.new_task()
        self.motion.shorten(now_ns, self.scheduler.execution_horizon_steps)
        self.safety.release("instruction")

    def activate(self) -> None:
        """Open the gate; motion begins after ``start``. Latched faults are cleared, as by ``reset_fault``."""
        self.reset_fault()
        self._active = True
        self._waiting_since_ns = None
        self.ticks.restart()

    def deactivate(self, now_ns: int) -> JointTrajectory | None:
        """Close the gate. Returns the decelerating hold that must be sent, None if nothing was commanded."""
        self._active = False
        self.stop(now_ns, "not active")
        return self.motion.tick(now_ns)

    def start(self, now_ns: int) -> None:
        """Begin anew: only samples from now on, the motion starts at the measured position. Then call ``step``."""
        self.restart(now_ns)
        self.safety.release("stopped")

    def stop(self, now_ns: int, reason: str = "stopped by ~/stop") -> None:
        """Decelerate and hold until ``start``."""
        self.safety.hold("stopped", reason)
        self.motion.hold(now_ns)

    def restart(self, now_ns: int) -> None:
        """Brake, then drop the plan; drop chunks under way and all samples now, as after a reset of the robot.

        The hold is what ``motion.tick`` returns next: it must be sent, because the controller has the old window.
        """
        self.motion.restart(now_ns)
        self._begin_anew(now_ns)

    def clock_jumped(self, now_ns: int) -> JointTrajectory | None:
        """The clock jumped back. Returns the hold that must be sent, None if nothing was commanded."""
        # At the time of the last step: in the new time every sample is from the future.
        measured = self.buffer.joint_positions(self._last_step_ns)
        self.motion.clock_jumped(now_ns, measured, self.buffer.joint_velocities())
        self._begin_anew(now_ns)
        return self.motion.tick(now_ns)

    def _begin_anew(self, now_ns: int) -> None:
        self.scheduler.forget_time()
        self._inferences = 0
        self.buffer.clear(not_before_ns=now_ns)
        self.safety.release("policy")
        self.safety.release("tracking")
        self.ticks.restart()
        self._late_in_a_row = 0
        self._waiting_since_ns = None
        self._ready_since_restart = False

    @property
    def starting(self) -> bool:
        """No complete set of samples came since the last restart, so a hold is no fault yet."""
        return not self._ready_since_restart

    def reset_fault(self) -> list[str]:
        """Clear latched faults; returns what they were."""
        self._late_in_a_row = 0
        self.motion.tracking.reset()
        return list(self.safety.reset())

    def close(self) -> None:
        """End the worker thread."""
        self.worker.close()

    # What the node calls.

    def step(self, now_ns: int) -> JointTrajectory | None:
        """One control period.

        Returns:
            The trajectory to send, None for silence.
        """
        self.ticks.tick(now_ns)
        self._last_step_ns = now_ns
        self.safety.update(now_ns)
        self._watch_sensors(now_ns)
        self._watch_worker(now_ns)
        self.collect(now_ns)
        self._watch_tracking(now_ns)
        self._watch_supply(now_ns)
        if not self.safety.may_move:
            self.motion.hold(now_ns)
        message = self.motion.tick(now_ns)
        self.request(now_ns)
        return message

    def collect(self, now_ns: int) -> bool:
        """Take a finished inference, if there is one. True if the commanded motion changed."""
        result = self.worker.poll()
        if result is None:
            return False
        if result.abandoned:
            self.safety.release("inference")
            self.scheduler.retry()
            return False
        if result.error is not None:
            self._inference_failed(result.error, now_ns)
            return False
        self.latency_s.add(result.duration_s)
        return self._use(result, now_ns)

    def request(self, now_ns: int) -> bool:
        """Start an inference if one is due and possible. Called at every tick and whenever an image arrives."""
        if not (self._active and self.safety.may_move and self.instruction) or self.worker.busy:
            return False
        if self.motion.braking:
            return False
        snapshot = self.buffer.assemble(now_ns)
        if isinstance(snapshot, NotReady) or not self.scheduler.is_due(snapshot.stamp_ns):
            return False
        ticket = self.scheduler.begin(snapshot.stamp_ns)
        return self.worker.submit(ticket, _Job(snapshot, self.instruction, self._next_seed()))

    # Inside.

    def _next_seed(self) -> int:
        self._inferences += 1
        return inference_seed(self.noise_seed, self._inferences - 1)

    def _infer(self, job: _Job) -> ActionChunk:
        images = {key: self._decode(message, key) for key, message in job.snapshot.images.items()}
        observation = job.snapshot.observation(images, job.instruction, self._binding)
        return self.policy.infer(observation, seed=job.noise_seed)

    def _use(self, result: InferenceResult[_Job], now_ns: int) -> bool:
        assert result.chunk is not None
        measured = self.buffer.joint_positions(now_ns)
        if measured is None or not (self._active and self.safety.may_move):
            self.scheduler.dropped["hold"] += 1
            return False
        try:
            self.motion.on_chunk(
                result.ticket,
                result.chunk,
                now_ns,
                measured,
                self.buffer.joint_velocities(),
                result.job.snapshot.positions,
            )
        except ChunkDropped as dropped:
            self._chunk_dropped(dropped)
            return False
        except ChunkRejected as rejected:
            log.error("chunk refused (%s): %s", rejected.kind, rejected)
            self.safety.policy_error(f"chunk refused: {rejected}", now_ns)
            self.scheduler.retry()
            return False
        self.reaction_s.add(float(seconds(now_ns - result.ticket.observation_ns)))
        self.safety.policy_success()
        self._late_in_a_row = 0
        return True

    def _chunk_dropped(self, dropped: ChunkDropped) -> None:
        log.debug("chunk dropped (%s): %s", dropped.kind, dropped)
        self.scheduler.retry()
        if dropped.kind != "late":
            return
        self._late_in_a_row += 1
        if self._late_in_a_row >= MAX_LATE_CHUNKS:
            self.safety.latch(
                "late",
                f"{self._late_in_a_row} chunks in a row came after their own end: inference takes "
                f"{self.latency_s.get(50):.2f} s, a chunk lasts "
                f"{self.policy.spec.horizon / self.policy.spec.control_hz:.2f} s; "
                "use a faster device or a smaller policy",
            )

    def _inference_failed(self, error: Exception, now_ns: int) -> None:
        self.scheduler.retry()
        if isinstance(error, InstructionError):
            log.error("instruction refused: %s", error)
            self.safety.hold("instruction", str(error))
            return
        log.error("inference failed: %s: %s", type(error).__name__, error, exc_info=error)
        self.safety.policy_error(f"{type(error).__name__}: {error}", now_ns)

    def _watch_sensors(self, now_ns: int) -> None:
        problem = self.buffer.problem(now_ns)
        if problem is None:
            self._ready_since_restart = True
            self.safety.release("sensors")
            self.safety.warn("startup", None)
            self._waiting_since_ns = None
            return
        self.safety.hold("sensors", problem.reason)
        if self._waiting_since_ns is None:
            self._waiting_since_ns = now_ns
        if now_ns - self._waiting_since_ns > nanoseconds(self.options.startup_warn_s):
            self.safety.warn(
                "startup",
                f"no usable data from {problem.stream!r} for {self.options.startup_warn_s:.0f} s: is it published, "
                "is the topic remapped, is its QoS compatible (the subscription is best effort, volatile)?",
            )

    def _watch_worker(self, now_ns: int) -> None:
        running_s = self.worker.running_s
        if running_s > self.options.inference_timeout_s and not self.worker.abandoned:
            self.worker.abandon()
            reason = (
                f"inference has not returned for {self.options.inference_timeout_s:.1f} s; its result will be dropped"
            )
            log.error("%s", reason)
            self.safety.policy_error(reason, now_ns)
            self.safety.hold("inference", reason)

    def _watch_tracking(self, now_ns: int) -> None:
        sample = self.buffer.joint_sample()
        if sample is None or self.motion.holding or now_ns - sample[0] > nanoseconds(1.0):
            return
        reason = self.motion.watch_tracking(*sample)
        if reason is not None:
            log.error("%s", reason)
            self.safety.fault("tracking", reason, now_ns, self.motion.tracking.losses, "tracking losses")
            self.motion.restart(now_ns)

    def _watch_supply(self, now_ns: int) -> None:
        waiting = not self.instruction
        self.safety.warn("instruction", "no instruction yet: set the parameter 'instruction'" if waiting else None)
        starved = self.motion.plan is not None and not self.motion.holding and now_ns >= self.motion.plan.end_ns
        self.safety.warn(
            "supply",
            f"the plan ran out before the next chunk: inference p95 {self.latency_s.get(95):.3f} s"
            if starved
            else None,
        )

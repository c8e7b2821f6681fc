"""One configured policy on one robot: observation -> inference -> motion, and what happens when something fails.

The node gives messages and the time, and sends what ``step`` returns. Everything here runs on the node's executor
thread except ``_infer``, which runs on the worker thread and touches nothing but its job and the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla_core.noise import inference_seed
from omega_qvla_core.policy_types import ActionChunk, CommittedPrefix
from omega_qvla_ros.chunk_judge import ChunkJudge
from omega_qvla_ros.contract import RobotContract, check_policy
from omega_qvla_ros.emergency_stop import EmergencyStop, Refused
from omega_qvla_ros.guard import ChunkRejected, MotionGuard
from omega_qvla_ros.inference import InferenceResult, InferenceWorker
from omega_qvla_ros.motion import Motion
from omega_qvla_ros.notices import EVENT_NS, ImageWatch, InertWatch, Notices
from omega_qvla_ros.observation import NotReady, ObservationBuffer, Snapshot
from omega_qvla_ros.safety_state import SafetyState, State
from omega_qvla_ros.scheduler import ChunkDropped, ChunkScheduler
from omega_qvla_ros.session_options import PolicyLike, SessionOptions
from omega_qvla_ros.session_trace import SessionTrace
from omega_qvla_ros.splines import nanoseconds, seconds
from omega_qvla_ros.stats import Percentiles, TickMonitor
from omega_qvla_ros.supervision import Supervision
from omega_qvla_ros.trace import ChunkRecord, Outcome
from omega_qvla_ros.trajectory import JointTrajectory

log = logging.getLogger(__name__)

REST_NOTICE_NS = nanoseconds(1.0)
"""Waiting for positions measured at rest is said after so long; sources that send at a usual rate take less."""


@dataclass(frozen=True)
class _Job:
    snapshot: Snapshot
    instruction: str
    noise_seed: int
    committed: CommittedPrefix | None = None


class PolicySession:
    """The running policy.

    Args:
        contract: The robot.
        policy: A loaded policy.
        options: Numbers.
        decode: Image message, camera key -> uint8 ``[H, W, 3]`` RGB; runs on the worker thread.
        on_done: Wakes the executor when an inference has finished; called on the worker thread.
        emergency_stop: The switches, which may be pressed before anything is configured.
        trace: Takes a record of every inference; must not wait.

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
        emergency_stop: EmergencyStop | None = None,
        trace: Callable[[ChunkRecord], None] | None = None,
    ) -> None:
        self.contract = contract
        self.policy = policy
        self.options = options
        self._binding = check_policy(contract, policy.spec)
        self._decode = decode
        self.guard = MotionGuard(contract)
        self.scheduler = ChunkScheduler(
            options.execution_horizon_steps,
            options.blend_time_s,
            1.0 / policy.spec.control_hz,
            contract.chunk.min_remaining_s,
        )
        self.motion = Motion(contract, self._binding, policy.spec.horizon, self.scheduler, self.guard)
        self.safety = SafetyState(options.max_consecutive_errors, options.retry_delay_s)
        self.buffer = ObservationBuffer(contract, options.stamp_source)
        self.worker: InferenceWorker[_Job] = InferenceWorker(self._infer, on_done)
        self.latency_s = Percentiles()
        self.reaction_s = Percentiles()
        self.judge = ChunkJudge(
            policy.spec, self.safety, self.scheduler, self.latency_s, contract.safety.max_late_chunks
        )
        self.ticks = TickMonitor(contract.period_s)
        self.noise_seed = options.noise_seed
        self._inferences = 0
        self.instruction = ""
        self.emergency_stop = emergency_stop or EmergencyStop()
        self.notices = Notices()
        self.supervision = Supervision(self.safety, self.notices, self.buffer, self.worker, self.motion, self.ticks)
        self.apply(options)
        self._image_watch = ImageWatch({camera.key: camera.topic for camera in contract.cameras}, self.notices)
        self._inert_watch = InertWatch()
        self._trace = None if trace is None else SessionTrace(trace, self.scheduler, self.guard)
        self._active = False
        self.enabled = True
        self.running = False
        """Started and not stopped since, whether the arm may move just now or not."""
        self._output_faults = 0
        self._last_step_ns = 0
        self._chunk_leaves = False
        """A chunk was accepted, and the message with it has not left yet."""
        self.safety.hold("stopped", "not started")
        if self.emergency_stop.pressed:
            self._latch_emergency_stop()

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
        """Open the gate; motion begins after ``start``. Latched faults are cleared, as by ``reset_fault``.

        Raises:
            Refused: The emergency stop is pressed, or a stream's clock is not ours.
        """
        skew = self.buffer.clock_skew()
        if skew is not None:
            raise Refused(skew)
        self.reset_fault()
        self._active = True
        self.supervision.restart()
        self.ticks.restart()

    def deactivate(self, now_ns: int) -> JointTrajectory | None:
        """Close the gate. Returns the decelerating hold that must be sent, None if nothing was commanded."""
        self._active = False
        self.stop(now_ns, "not active")
        return self.motion.tick(now_ns)

    def start_refusal(self) -> str | None:
        """Why ``start`` makes no sense now, None if it does."""
        if not self.enabled:
            return "motion is disabled; call ~/enable with true first"
        if self.safety.state is State.LATCHED:
            return f"latched: {self.safety.reasons[0]}; remove the cause and call ~/reset_fault"
        if not self.instruction:
            return "no instruction: set the parameter 'instruction' or publish on ~/instruction"
        return self.safety.held("output") or self.buffer.clock_skew()

    def start(self, now_ns: int) -> None:
        """Begin anew: only samples from now on, the motion starts at the measured position. Then call ``step``."""
        self.restart(now_ns)
        self.running = True
        self.safety.release("stopped")

    def stop(self, now_ns: int, reason: str = "stopped by ~/stop") -> None:
        """Decelerate and hold until ``start``."""
        self.running = False
        self.safety.hold("stopped", reason)
        self.motion.hold(now_ns)

    def enable(self, enabled: bool, now_ns: int) -> None:
        """Gate of all motion beside the lifecycle: disabled, the arm holds and everything stays configured."""
        if enabled == self.enabled:
            return
        self.enabled = enabled
        self._gate("disabled", None if enabled else "disabled by ~/enable", now_ns)

    def watch_output(self, problem: str | None, now_ns: int) -> None:
        """Nobody takes the commands (a reason), or somebody does (None): no motion into the void."""
        if (problem is None) != (self.safety.held("output") is None):
            self._gate("output", problem, now_ns)

    def output_fault(self, reason: str, now_ns: int) -> None:
        """A controller gave up what it was told: hold, try again from where the arm is; latch at one too many."""
        if not self.running or not self.safety.may_move:
            return
        log.error("%s", reason)
        self._output_faults += 1
        self.safety.fault("controller", reason, now_ns, self._output_faults, "goals given up by the controller")
        self.motion.restart(now_ns)

    def apply(self, options: SessionOptions) -> None:
        """Take other numbers while running; what belongs to configure must be the same.

        Raises:
            ConfigError: A limit would be looser than the contract's; everything stays as it was.
        """
        self.guard.set_limit_scales(options.limit_scales)
        self.options = options
        self.noise_seed = options.noise_seed
        self.scheduler.execution_horizon_steps = options.execution_horizon_steps
        self.scheduler.blend_time_s = options.blend_time_s
        self.safety.configure(options.max_consecutive_errors, options.retry_delay_s)
        self.buffer.tighten(options.image_timeout_s, options.joint_states_timeout_s)

    def _gate(self, key: str, reason: str | None, now_ns: int) -> None:
        """Close or open a gate; behind a gate that opens the motion begins at the measured position."""
        if reason is not None:
            self.safety.hold(key, reason)
            self.motion.hold(now_ns)
            return
        self.safety.release(key)
        if self.running:
            self.restart(now_ns)

    def press_emergency_stop(self, topic: str, pressed: bool, now_ns: int) -> None:
        """A message of a switch: true holds and latches. What ``motion.tick`` returns next must be sent."""
        if not self.emergency_stop.set(topic, pressed):
            return
        self._latch_emergency_stop()
        if self.running:
            self.stop(now_ns, "stopped by the emergency stop; ~/start begins anew")
        else:
            self.motion.hold(now_ns)

    def _latch_emergency_stop(self) -> None:
        self.safety.latch("e_stop", "emergency stop; release it, then call ~/reset_fault and ~/start")

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
        if measured is not None:
            # A slow source tells where its joints were a while ago: a hold from there would send them back.
            measured = np.where(self.buffer.slow_joints, np.nan, measured)
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
        self.judge.restart()
        self.supervision.restart()

    @property
    def deactivate_requested(self) -> bool:
        """The policy cannot run any more: the node should deactivate."""
        return self._active and self.judge.device_lost

    @property
    def starting(self) -> bool:
        """No complete set of samples came since the last restart, so a hold is no fault yet."""
        return not self.supervision.ready

    def reset_fault(self) -> list[str]:
        """Clear latched faults; returns what they were.

        Raises:
            Refused: The emergency stop is pressed, or was released a moment ago.
        """
        refusal = self.emergency_stop.refusal()
        if refusal is not None:
            raise Refused(refusal)
        self.judge.reset()
        self._output_faults = 0
        self.motion.tracking.reset()
        return list(self.safety.reset())

    def close(self) -> None:
        """End the worker thread."""
        self.worker.close()

    # What the node calls.

    def step(self, now_ns: int) -> JointTrajectory | None:
        """One control period. ``request`` is called after what it returns has left or was withdrawn (``in_time``).

        Returns:
            The trajectory to send, None for silence.
        """
        watch = self.supervision
        self._last_step_ns = now_ns
        self.safety.update(now_ns)
        self.notices.update(now_ns)
        watch.watch_timer(now_ns)
        watch.watch_sensors(now_ns, self.options.startup_warn_s)
        watch.watch_inference(now_ns, self.options.inference_timeout_s)
        self.collect(now_ns)
        if not self.options.dry_run:
            watch.watch_tracking(now_ns)
        beyond = self.motion.take_beyond()
        if beyond is not None:
            self.safety.policy_error(f"sent to stop the arm, although {beyond}", now_ns)
        watch.watch_supply(now_ns, self.instruction, self.latency_s.get(95))
        self._watch_start(now_ns)
        if not self.safety.may_move:
            self.motion.hold(now_ns)
        return self.motion.tick(now_ns)

    def in_time(self, message: JointTrajectory, now_ns: int, age_ns: int) -> JointTrajectory | None:
        """The last look before a message leaves; see ``Motion.in_time``."""
        if not self._chunk_leaves:
            return self.motion.in_time(message, now_ns, age_ns)
        withdrawn, expected_ns = self.motion.counters.withdrawn, self.motion.dispatch.allowance_ns(holding=False)
        leaving = self.motion.in_time(message, now_ns, age_ns)
        if self.motion.counters.withdrawn > withdrawn:
            text = f"a motion was withdrawn, {age_ns / 1e6:.0f} ms after its time was read: the processor is too busy"
            self.notices.set("late", text, now_ns + EVENT_NS)
            self.judge.withdrawn(age_ns, expected_ns, nanoseconds(self.contract.chunk.switch_lead_s))
        elif not self.motion.holding:
            self.judge.left()
        self._chunk_leaves = False
        return leaving

    def collect(self, now_ns: int) -> bool:
        """Take a finished inference, if there is one. True if the commanded motion changed."""
        result = self.worker.poll()
        if result is None:
            return False
        if result.abandoned:
            self.safety.release("inference")
            self.scheduler.retry()
            return self._judged(result, now_ns, "abandoned", "it did not return in time")
        if result.error is not None:
            self.judge.failed(result.error, now_ns)
            return self._judged(result, now_ns, "failed", f"{type(result.error).__name__}: {result.error}")
        self.latency_s.add(result.duration_s)
        return self._use(result, now_ns)

    def request(self, now_ns: int) -> bool:
        """Start an inference if one is due and possible. Called at every tick and whenever an image arrives.

        With real-time chunking the chunk is to continue the commanded motion: nothing may wait for its last look then.
        """
        if not (self._active and self.safety.may_move and self.instruction) or self.worker.busy:
            return False
        if self.motion.braking:
            return False
        snapshot = self.buffer.assemble(now_ns)
        if isinstance(snapshot, NotReady) or not self.scheduler.is_due(snapshot.stamp_ns):
            return False
        if self.motion.plan is None and self._braked_when_measured(snapshot, now_ns):
            return False
        ticket = self.scheduler.begin(snapshot.stamp_ns)
        job = _Job(snapshot, self.instruction, self._next_seed(), self._committed(snapshot))
        return self.worker.submit(ticket, job)

    # Inside.

    def _braked_when_measured(self, snapshot: Snapshot, now_ns: int) -> bool:
        """Whether a position is from before the arm stood: a slow source may have told last while it braked."""
        stands_ns = self.motion.stands_since_ns(now_ns)
        if snapshot.joints_ns >= stands_ns:
            return False
        if now_ns - stands_ns > REST_NOTICE_NS:
            text = "the arm stands, and not every joint was measured since; the policy begins when they were"
            self.notices.set("rest", text, now_ns + EVENT_NS)
        return True

    def _next_seed(self) -> int:
        self._inferences += 1
        return inference_seed(self.noise_seed, self._inferences - 1)

    def _committed(self, snapshot: Snapshot) -> CommittedPrefix | None:
        """What the next chunk is to continue, with real-time chunking and once it is known when chunks come."""
        reaction_s = self.reaction_s.get(95)
        if self.contract.chunk.method != "rtc" or not np.isfinite(reaction_s):
            return None
        delay_s = self.policy.spec.first_action_delay_s
        return self.motion.committed_prefix(snapshot.stamp_ns, reaction_s, delay_s, snapshot.positions)

    def _infer(self, job: _Job) -> ActionChunk:
        images = {key: self._decode(message, key) for key, message in job.snapshot.images.items()}
        for key, rgb in images.items():
            self._image_watch.look(key, rgb, job.snapshot.image_stamps_ns[key])
        observation = job.snapshot.observation(images, job.instruction, self._binding)
        if job.committed is None:
            return self.policy.infer(observation, seed=job.noise_seed)
        return self.policy.infer(observation, seed=job.noise_seed, committed=job.committed)

    def _use(self, result: InferenceResult[_Job], now_ns: int) -> bool:
        assert result.chunk is not None
        if not self.judge.fits(result.chunk.actions):
            self.guard.counters.rejected["shape"] += 1
            self.motion.hold(now_ns)
            return self._judged(result, now_ns, "rejected", "shape")
        measured = self.buffer.joint_positions(now_ns)
        if measured is None or not (self._active and self.safety.may_move):
            self.scheduler.dropped["hold"] += 1
            return self._judged(result, now_ns, "dropped", "hold")
        try:
            if self.options.dry_run:
                self.motion.forget()
            self.motion.on_chunk(
                result.ticket,
                result.chunk,
                now_ns,
                measured,
                self.buffer.joint_velocities(),
                result.job.snapshot.positions,
            )
        except ChunkDropped as dropped:
            self.judge.dropped(dropped)
            return self._judged(result, now_ns, "dropped", f"{dropped.kind}: {dropped}")
        except ChunkRejected as rejected:
            self.judge.refused(rejected, now_ns)
            return self._judged(result, now_ns, "rejected", f"{rejected.kind}: {rejected}")
        self.reaction_s.add(float(seconds(now_ns - result.ticket.observation_ns)))
        self.judge.accepted()
        self._chunk_leaves = True
        self.notices.set("inert", self._inert_watch.look(result.chunk.actions, now_ns))
        return self._judged(result, now_ns, "placed")

    def _judged(self, result: InferenceResult[_Job], now_ns: int, outcome: Outcome, reason: str = "") -> bool:
        if self._trace is not None:
            self._trace.judged(result, now_ns, outcome, reason)
        return outcome == "placed"

    def _watch_start(self, now_ns: int) -> None:
        """Give up a start that gets no data: whoever pressed the button may have gone."""
        waited_ns = self.supervision.waiting_ns(now_ns)
        if self.running and self.starting and waited_ns > nanoseconds(self.options.start_timeout_s):
            cause = self.safety.held("sensors") or "no complete set of samples"
            log.error("start aborted: %s", cause)
            self.stop(now_ns, f"start aborted after {self.options.start_timeout_s:g} s: {cause}")

"""``policy_node``: a managed lifecycle node that lets a policy drive an arm through a joint_trajectory_controller.

configure loads, checks and warms up; activate opens the gate; deactivate sends a decelerating hold and closes it.
Topics, services, parameters and diagnostics: ``docs/node.md``.

Threads: everything runs on the executor's thread except inference, decoding of compressed images and drawing for
people, which have threads of their own. Sensor callbacks check a header and store a message; the control timer sends
the window. Neither waits for anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.timer import Timer

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_ros import msgs
from omega_qvla_ros.contract import RobotContract
from omega_qvla_ros.image_decoding import to_aspect
from omega_qvla_ros.intake import Intake
from omega_qvla_ros.nodes import diagnostics, loading, parameters, process
from omega_qvla_ros.nodes.debug import DebugOutputs
from omega_qvla_ros.nodes.description import with_description
from omega_qvla_ros.nodes.guarded_lifecycle import GuardedLifecycleNode, nothing
from omega_qvla_ros.nodes.logging_bridge import forward_logging
from omega_qvla_ros.nodes.operation import Operation
from omega_qvla_ros.nodes.outputs import Outputs, make_outputs
from omega_qvla_ros.nodes.policy_parameters import POLICY_NODE
from omega_qvla_ros.nodes.reporting import Reporter
from omega_qvla_ros.nodes.sensors import SensorInputs
from omega_qvla_ros.session import PolicySession
from omega_qvla_ros.session_trace import open_trace
from omega_qvla_ros.trajectory import JointTrajectory

POLL_PERIOD_S = 0.25
"""How often the outputs are looked at: a controller that appears is used within this time."""
SWITCH_INTERVAL_S = 0.001
"""Python's default of 5 ms lets the inference thread keep the executor (clock, joint states, timer) waiting."""
SPIN_S = 0.2
"""Longest time after which a signal is noticed."""


class PolicyNode(GuardedLifecycleNode):
    """See the module's text; parameters with their comments: ``config/policy_node.yaml``.

    Args:
        node_name: Default of the node's name.
        policy_loader: Loads the policy at configure; another one may wrap what the shipped one returns.
        kwargs: Of ``rclpy.lifecycle.LifecycleNode``.
    """

    def __init__(
        self,
        node_name: str = "policy_node",
        *,
        policy_loader: loading.PolicyLoader = loading.load_policy,
        **kwargs: object,
    ) -> None:
        super().__init__(node_name, **kwargs)
        self._policy_loader = policy_loader
        self._session: PolicySession | None = None
        self._outputs: Outputs | None = None
        self._control_timer: Timer | None = None
        self._configured: list[Callable[[], object]] = []
        self._unknown_parameters = parameters.declare(self, POLICY_NODE)
        self._simulated = bool(self.get_parameter("use_sim_time").value)
        self._operation = Operation(
            self,
            session=lambda: self._session,
            active=lambda: self.lifecycle == "active",
            preempt=lambda: parameters.value(self, "second_goal") == "preempt",
            check_outputs=self._check_outputs,
            now=self._now,
            send=self._send,
            set_instruction=self._set_instruction,
            on_incompatible=lambda topic, policy: self._reporter.on_incompatible(topic, policy),
        )
        self._reporter = Reporter(
            self,
            now=self._now,
            lifecycle=lambda: self.lifecycle,
            session=lambda: self._session,
            enabled=lambda: self._operation.enabled,
            pressed=lambda: self._operation.emergency_stop.pressed,
        )
        self._chunk_ready = self.create_guard_condition(self._on_chunk_ready)
        backwards = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True)
        self._jump_handle = self.get_clock().create_jump_callback(backwards, post_callback=self._on_clock_jump)
        self.create_timer(POLL_PERIOD_S, self._poll_outputs, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.add_on_set_parameters_callback(
            parameters.checker(
                POLICY_NODE,
                lambda: self._session is not None,
                {
                    "instruction": loading.instruction_problem,
                    "execution_horizon": lambda steps: self._check_chunk(loading.horizon_problem, steps),
                    "chunk_rate_hz": lambda rate_hz: self._check_chunk(loading.chunk_rate_problem, rate_hz),
                    "blend_time_s": lambda time_s: self._check_chunk(loading.blend_problem, time_s),
                    "control_rate_hz": self._check_control_rate,
                },
            )
        )
        self.add_post_set_parameters_callback(self._apply_parameters)

    # Lifecycle.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, check, warm up. A failure leaves the node unconfigured, says why, and may be tried again."""
        entities = lambda: super(PolicyNode, self).on_configure(state)  # noqa: E731
        return self._transition("configure", self._configure, entities, on_failure=self._configure_failed)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Motion allowed. Refused while an emergency stop is pressed or a sensor has another clock."""
        entities = lambda: super(PolicyNode, self).on_activate(state)  # noqa: E731
        return self._transition("activate", self._open_gate, entities, self._begin)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Decelerating hold, then silence."""
        entities = lambda: super(PolicyNode, self).on_deactivate(state)  # noqa: E731
        return self._transition("deactivate", self._send_hold, entities)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the policy; configure may follow with another one."""
        entities = lambda: super(PolicyNode, self).on_cleanup(state)  # noqa: E731
        return self._transition("cleanup", nothing, entities, self._free)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold if the arm may be moving, then free everything."""
        entities = lambda: super(PolicyNode, self).on_shutdown(state)  # noqa: E731
        return self._transition("shutdown", self._send_hold, entities, self._free)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold, free everything, back to unconfigured."""
        entities = lambda: super(PolicyNode, self).on_error(state)  # noqa: E731
        return self._transition("error", self._send_hold, entities, self._free)

    def _configure(self) -> None:
        self._reporter.configure_error = ""
        if self._unknown_parameters:
            raise ConfigError("; ".join(self._unknown_parameters))
        started = time.monotonic()
        contract, urdf = with_description(self, loading.read_contract(self))
        loaded = loading.load(self, contract, self._policy_loader)
        self._operation.use_contract_switch(contract.safety.estop_topic)
        self._operation.emergency_stop.reset_delay_s = contract.safety.estop_reset_delay_s
        decode = decoder(contract, loaded.policy.spec)
        trace = open_trace(str(parameters.value(self, "trace_file")), contract, loaded.policy.spec)
        self._reporter.trace = trace
        if trace is not None:
            self._configured.append(trace.close)
        session = PolicySession(
            contract,
            loaded.policy,
            loading.session_options(self, contract, loaded.policy.spec),
            decode,
            self._wake,
            self._operation.emergency_stop,
            None if trace is None else trace.write,
        )
        self._session = session
        self._configured.append(session.close)
        session.set_instruction(loading.instruction(self, contract), self._now())
        session.enable(self._operation.enabled, self._now())
        self._reporter.loaded = loaded
        dry_run = bool(parameters.value(self, "dry_run"))
        incompatible = self._reporter.on_incompatible
        self._outputs = make_outputs(self, contract, dry_run, self._on_output_fault, incompatible)
        self._configured.append(self._outputs.destroy)
        self._reporter.outputs = self._outputs
        intake = Intake(contract, loaded.image_size, session.buffer, session.notices, on_decoded=self._wake)
        sensors = SensorInputs(self, contract, intake, self._now, lambda now_ns: self._request(now_ns), incompatible)
        self._configured.append(sensors.destroy)
        if unused := parameters.unused_qos_overrides(self):
            raise ConfigError("; ".join(unused))
        self._configured.append(DebugOutputs(self, session, self._now, decode, urdf).destroy)
        self._set_control_rate()
        mode = "dry run, nothing is sent" if dry_run else f"outputs {', '.join(self._outputs.states())}"
        self.get_logger().info(
            f"configured in {time.monotonic() - started:.1f} s: {loaded.summary}, contract {contract.name!r}, {mode}, "
            f"execution horizon {session.options.execution_horizon_steps} of {loaded.policy.spec.horizon} steps"
        )

    def _configure_failed(self, reason: str) -> None:
        self._reporter.configure_error = reason
        self._free()

    def _set_control_rate(self) -> None:
        assert self._session is not None
        if self._control_timer is not None:
            self.destroy_timer(self._control_timer)
        rate_hz = loading.control_rate_hz(self, self._session.contract)
        self._reporter.period_s = 1.0 / rate_hz
        self._reporter.ticked_s = time.monotonic()
        self._session.ticks.set_period(1.0 / rate_hz)
        self._control_timer = self.create_timer(1.0 / rate_hz, self._on_control_tick)

    def _open_gate(self) -> None:
        assert self._session is not None
        self._session.activate()

    def _begin(self) -> None:
        assert self._session is not None
        self._check_outputs()
        if parameters.value(self, "start_on_activate"):
            self._session.start(self._now())

    def _send_hold(self) -> None:
        """The last message on the wire is a decelerating hold."""
        session, outputs = self._session, self._outputs
        if session is None or outputs is None:
            return
        read_ns, now_ns = time.monotonic_ns(), self._now()
        first = _last_look(session, session.deactivate(now_ns), now_ns, read_ns)
        outputs.send_hold(first, session.motion, now_ns, session.contract.safety.stop_budget_s, not self._simulated)

    def _free(self) -> None:
        for destroy in reversed(self._configured):
            destroy()
        self._configured.clear()
        if self._control_timer is not None:
            self.destroy_timer(self._control_timer)
        self._control_timer = None
        self._session = self._outputs = None
        self._reporter.loaded = self._reporter.outputs = self._reporter.trace = None
        loading.free_memory()

    # Timers and wake-ups.

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _on_control_tick(self) -> None:
        read_ns, now_ns = time.monotonic_ns(), self._now()
        self._reporter.ticked_s = time.monotonic()
        session = self._session
        if session is None or now_ns == 0:  # simulated time has not begun
            return
        state = session.safety.state
        self._publish(session.step(now_ns), now_ns, read_ns)
        self._request(now_ns)
        if session.safety.state is not state:
            diagnostics.log_state(self.get_logger(), state, session)
        self._reporter.on_tick()
        if session.deactivate_requested and self.lifecycle == "active":
            self.get_logger().error("the policy cannot run on: deactivating")
            self.trigger_deactivate()

    def _wake(self) -> None:
        """Called on other threads. A policy that hung may return when the node is gone."""
        try:
            self._chunk_ready.trigger()
        except InvalidHandle:
            pass

    def _on_chunk_ready(self) -> None:
        """A chunk does not wait for the next control tick."""
        read_ns, now_ns = time.monotonic_ns(), self._now()
        if self._session is None or now_ns == 0:
            return
        if self._session.collect(now_ns):
            self._publish(self._session.motion.tick(now_ns), now_ns, read_ns)
        self._request(now_ns)

    def _request(self, now_ns: int) -> None:
        if self._session is not None:
            self._session.request(now_ns)

    def _send(self) -> None:
        """Send what the session wants to be sent now, between two control ticks."""
        if self._session is not None:
            read_ns, now_ns = time.monotonic_ns(), self._now()
            self._publish(self._session.motion.tick(now_ns), now_ns, read_ns)

    def _publish(self, trajectory: JointTrajectory | None, now_ns: int, read_ns: int) -> None:
        """Send a message, if it is still in time; see ``_last_look``."""
        session, outputs = self._session, self._outputs
        if session is not None and outputs is not None:
            trajectory = _last_look(session, trajectory, now_ns, read_ns)
            outputs.send(trajectory, session.motion.plan, now_ns)

    def _poll_outputs(self) -> None:
        if self.lifecycle == "active":
            self._check_outputs()

    def _check_outputs(self) -> None:
        """No motion into the void; a gripper that is not there degrades only.

        Activation calls it before the node counts as active: a poll later the arm would have moved already.
        """
        session, outputs = self._session, self._outputs
        if session is None or outputs is None:
            return
        session.watch_output(outputs.problem(), self._now())
        for name, problem in outputs.degraded().items():
            session.safety.warn(f"output.{name}", problem)

    def _on_output_fault(self, reason: str) -> None:
        if self._session is not None:
            self._session.output_fault(reason, self._now())
            self._send()

    def _on_clock_jump(self, jump: TimeJump) -> None:
        if self._session is not None:
            self.get_logger().warning("the clock jumped back: hold here; the plan and all samples are dropped")
            read_ns, now_ns = time.monotonic_ns(), self._now()
            self._publish(self._session.clock_jumped(now_ns), now_ns, read_ns)

    # Parameters and instruction.

    def _check_chunk(self, problem: Callable[[object, PolicySpec], str | None], value: object) -> str | None:
        """Against the loaded checkpoint; without one configure checks."""
        return None if self._session is None else problem(value, self._session.policy.spec)

    def _check_control_rate(self, rate_hz: object) -> str | None:
        return None if self._session is None else loading.control_rate_problem(rate_hz, self._session.contract)

    def _set_instruction(self, text: str) -> str | None:
        result = self.set_parameters([Parameter("instruction", value=text)])[0]
        return None if result.successful else str(result.reason)

    def _apply_parameters(self, changed: list[Parameter]) -> None:
        session = self._session
        if session is None:
            return
        names = {parameter.name for parameter in changed}
        if "instruction" in names:
            session.set_instruction(str(parameters.value(self, "instruction")), self._now())
        session.apply(loading.session_options(self, session.contract, session.policy.spec))
        if "control_rate_hz" in names:
            self._set_control_rate()


def _last_look(
    session: PolicySession, trajectory: JointTrajectory | None, now_ns: int, read_ns: int
) -> JointTrajectory | None:
    """What may leave of a message that was made for ``now_ns``, which was read at ``read_ns`` of the steady clock.

    By the steady clock, because simulated time stands while a callback runs.
    """
    if trajectory is None:
        return None
    return session.in_time(trajectory, now_ns, time.monotonic_ns() - read_ns)


def decoder(contract: RobotContract, spec: PolicySpec) -> Callable[[Any, str], np.ndarray]:
    """Image sample, camera key -> RGB in the aspect that the policy wants. Callable from any thread."""
    rules = {camera.key: camera for camera in contract.cameras}
    sizes = {camera.key: (camera.height, camera.width) for camera in spec.cameras}

    def decode(sample: Any, key: str) -> np.ndarray:
        rgb = sample if isinstance(sample, np.ndarray) else msgs.image_to_rgb(sample, rules[key].topic)
        return to_aspect(rgb, rules[key].resize, *sizes[key])

    return decode


def main(args: list[str] | None = None, policy_loader: loading.PolicyLoader = loading.load_policy) -> None:
    """Run the node until SIGINT or SIGTERM; then hold the arm, and exit with 0."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    node, stopping = process.start(args, "policy_node", lambda: PolicyNode(policy_loader=policy_loader))
    forward_logging(node.get_logger())
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        bring_up(node)
        while not stopping and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        if node.lifecycle != "finalized":
            node.trigger_shutdown()
        executor.shutdown()
        node.destroy_node()
        process.finish()


def bring_up(node: PolicyNode) -> None:
    """Configure and activate where the parameter ``auto_activate`` asks for it."""
    if parameters.value(node, "auto_activate") and node.trigger_configure() is TransitionCallbackReturn.SUCCESS:
        node.trigger_activate()


if __name__ == "__main__":
    main()

"""``policy_node``: a managed lifecycle node that lets a policy drive an arm through a joint_trajectory_controller.

configure loads, checks and warms up; activate opens the gate; deactivate sends a decelerating hold and closes it.

Subscribes the contract's camera topics and ``joint_states``, and ``~/instruction``; publishes ``joint_trajectory``
and ``/diagnostics``; serves ``~/start``, ``~/stop``, ``~/restart``, ``~/reset_fault`` (std_srvs/Trigger).

Threads: everything runs on the executor's thread except inference, which has one worker thread of its own. Sensor
callbacks check a header and store a message; the control timer sends the window. Neither waits for anything.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_core.errors import ConfigError, ObservationError, OmegaQVLAError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_ros import image_decoding, msgs
from omega_qvla_ros.motion import HOLD_REPEATS
from omega_qvla_ros.nodes import diagnostics, loading, parameters, process, qos
from omega_qvla_ros.nodes.logging_bridge import forward_logging
from omega_qvla_ros.session import PolicySession
from omega_qvla_ros.trajectory import JointTrajectory

AFTER = {
    "configure": "inactive",
    "activate": "active",
    "deactivate": "inactive",
    "cleanup": "unconfigured",
    "shutdown": "finalized",
    "error": "unconfigured",
}
"""Lifecycle state after a transition that succeeded."""
DIAGNOSTICS_PERIOD_S = 1.0
ACKNOWLEDGE_S = 0.5
"""Longest wait for the controller to have received the last hold."""
SWITCH_INTERVAL_S = 0.001
"""Python's default of 5 ms lets the inference thread keep the executor (clock, joint states, timer) waiting."""
SPIN_S = 0.2
"""Longest time after which a signal is noticed."""


class PolicyNode(LifecycleNode):
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
        self._loaded: loading.Loaded | None = None
        self._configure_error = ""
        self._lifecycle = "unconfigured"
        self._unknown_parameters = parameters.declare(self, parameters.POLICY_NODE)
        self._configured_entities: list[Callable[[], object]] = []
        self._ticked_s = 0.0
        self._command = None
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock: the report must come even when simulated time stands.
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_subscription(String, "~/instruction", self._on_instruction, qos.INSTRUCTION)
        for action in (self._start, self._stop, self._restart, self._reset_fault):
            name = action.__name__.lstrip("_")
            self.create_service(Trigger, f"~/{name}", lambda _, response, action=action: self._answer(response, action))
        self._chunk_ready = self.create_guard_condition(self._on_chunk_ready)
        self._simulated = bool(self.get_parameter("use_sim_time").value)
        backwards = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True)
        self._jump_handle = self.get_clock().create_jump_callback(backwards, post_callback=self._on_clock_jump)
        self.add_on_set_parameters_callback(
            parameters.checker(
                parameters.POLICY_NODE,
                lambda: self._session is not None,
                {
                    "instruction": loading.instruction_problem,
                    "execution_horizon": lambda steps: self._check_chunk(loading.horizon_problem, steps),
                    "blend_time_s": lambda time_s: self._check_chunk(loading.blend_problem, time_s),
                },
            )
        )
        self.add_post_set_parameters_callback(self._apply_parameters)

    # Lifecycle. rclpy swallows exceptions of transitions, so each is wrapped.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, check, warm up. A failure leaves the node unconfigured, says why, and may be tried again."""
        return self._transition("configure", self._configure, lambda: super(PolicyNode, self).on_configure(state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Motion allowed."""
        return self._transition(
            "activate", lambda: None, lambda: super(PolicyNode, self).on_activate(state), self._activate
        )

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Decelerating hold, then silence."""
        return self._transition("deactivate", self._send_hold, lambda: super(PolicyNode, self).on_deactivate(state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the policy; configure may follow with another one."""
        return self._transition("cleanup", lambda: None, lambda: super(PolicyNode, self).on_cleanup(state), self._free)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold if the arm may be moving, then free everything."""
        return self._transition(
            "shutdown", self._send_hold, lambda: super(PolicyNode, self).on_shutdown(state), self._free
        )

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold, free everything, back to unconfigured."""
        return self._transition("error", self._send_hold, lambda: super(PolicyNode, self).on_error(state), self._free)

    def _transition(
        self,
        name: str,
        before: Callable[[], None],
        entities: Callable[[], TransitionCallbackReturn],
        after: Callable[[], None] = lambda: None,
    ) -> TransitionCallbackReturn:
        try:
            before()
            result = entities()
            if result is TransitionCallbackReturn.SUCCESS:
                after()
                self._lifecycle = AFTER[name]
            return result
        except OmegaQVLAError as error:
            self._configure_error = str(error)
            self.get_logger().error(f"{name} failed: {error}")
        except Exception as error:  # noqa: BLE001 - rclpy would swallow it without a word
            self._configure_error = f"{type(error).__name__}: {error}"
            self.get_logger().error(f"{name} failed:\n{traceback.format_exc()}")
        if name == "configure":
            self._free()
        return TransitionCallbackReturn.FAILURE

    def _configure(self) -> None:
        self._configure_error = ""
        if self._unknown_parameters:
            raise ConfigError("; ".join(self._unknown_parameters))
        started = time.monotonic()
        self._loaded = loading.load(self, self._policy_loader)
        contract = self._loaded.contract
        self._session = PolicySession(
            contract,
            self._loaded.policy,
            loading.session_options(self, contract, self._loaded.policy.spec),
            self._decode,
            self._wake,
        )
        self._session.set_instruction(loading.instruction(self, contract), self._now())
        self._create_interfaces()
        self.get_logger().info(
            f"configured in {time.monotonic() - started:.1f} s: {self._loaded.summary}, contract {contract.name!r}"
        )

    def _create_interfaces(self) -> None:
        assert self._session is not None and self._loaded is not None
        contract = self._session.contract
        self._command = self.create_lifecycle_publisher(JointTrajectoryMsg, contract.outputs[0].name, qos.COMMAND)
        self._configured_entities.append(lambda: self.destroy_lifecycle_publisher(self._command))
        for camera in contract.cameras:
            subscription = self.create_subscription(
                Image, camera.topic, lambda message, key=camera.key: self._on_image(key, message), qos.IMAGE
            )
            self._configured_entities.append(lambda s=subscription: self.destroy_subscription(s))
        joints = self.create_subscription(
            JointState, contract.sensors.joint_states_topic, self._on_joint_states, qos.JOINT_STATE
        )
        self._configured_entities.append(lambda: self.destroy_subscription(joints))
        timer = self.create_timer(1.0 / loading.control_rate_hz(self, contract), self._on_control_tick)
        self._ticked_s = time.monotonic()
        self._configured_entities.append(lambda: self.destroy_timer(timer))

    def _activate(self) -> None:
        assert self._session is not None
        self._session.activate()
        if parameters.value(self, "start_on_activate"):
            self._session.start(self._now())

    def _send_hold(self) -> None:
        """The last message on the wire is a decelerating hold, sent in three control periods."""
        if self._session is None or self._command is None:
            return
        trajectory = self._session.deactivate(self._now())
        for repeat in range(HOLD_REPEATS):
            if trajectory is None:
                return
            self._publish(trajectory)
            # Simulated time does not go on in here, and how long a period takes is not known.
            if repeat < HOLD_REPEATS - 1 and not self._simulated:
                time.sleep(self._session.contract.period_s)
            trajectory = self._session.motion.tick(self._now())
        if self._command.get_subscription_count():
            self._command.wait_for_all_acked(Duration(seconds=ACKNOWLEDGE_S))

    def _free(self) -> None:
        for destroy in self._configured_entities:
            destroy()
        self._configured_entities.clear()
        self._command = None
        if self._session is not None:
            self._session.close()
        self._session = None
        self._loaded = None

    # Messages and timers.

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _decode(self, message: Image, key: str) -> object:
        return msgs.image_to_rgb(message, key)

    def _on_image(self, key: str, message: Image) -> None:
        now_ns = self._now()
        if self._session is None or self._loaded is None or now_ns == 0:  # simulated time has not begun
            return
        size = self._loaded.image_size[key]
        try:
            image_decoding.check_image(message, self._loaded.topics[key], *size)
        except ObservationError as error:
            self._session.buffer.refuse_image(key, str(error))
            self.get_logger().error(f"image dropped: {error}", throttle_duration_sec=10.0)
            return
        dropped = self._session.buffer.add_image(key, message, msgs.stamp_to_ns(message.header.stamp), now_ns)
        if dropped == "future":
            self.get_logger().warning(
                f"image on {self._loaded.topics[key]!r} is stamped in the future; synchronize the clocks",
                throttle_duration_sec=10.0,
            )
        self._session.request(now_ns)

    def _on_joint_states(self, message: JointState) -> None:
        now_ns = self._now()
        if self._session is None or now_ns == 0:
            return
        stamp_ns = msgs.stamp_to_ns(message.header.stamp)
        dropped = self._session.buffer.add_joints(message.name, message.position, stamp_ns, now_ns)
        if dropped is not None and dropped.startswith("not_finite"):
            self.get_logger().error(f"joint state dropped, {dropped}", throttle_duration_sec=10.0)

    def _on_control_tick(self) -> None:
        now_ns = self._now()
        self._ticked_s = time.monotonic()
        if self._session is None or now_ns == 0:
            return
        state = self._session.safety.state
        self._publish(self._session.step(now_ns))
        if self._session.safety.state is not state:
            diagnostics.log_state(self.get_logger(), state, self._session)

    def _wake(self) -> None:
        """Called on the worker thread. A policy that hung may return when the node is gone."""
        try:
            self._chunk_ready.trigger()
        except InvalidHandle:
            pass

    def _on_chunk_ready(self) -> None:
        """A chunk does not wait for the next control tick."""
        now_ns = self._now()
        if self._session is None:
            return
        if self._session.collect(now_ns):
            self._publish(self._session.motion.tick(now_ns))
        self._session.request(now_ns)

    def _publish(self, trajectory: JointTrajectory | None) -> None:
        if trajectory is not None and self._command is not None:
            self._command.publish(msgs.trajectory_to_msg(trajectory))

    def _on_clock_jump(self, jump: TimeJump) -> None:
        if self._session is not None:
            self.get_logger().warning("the clock jumped back: hold here; the plan and all samples are dropped")
            self._publish(self._session.clock_jumped(self._now()))

    # Parameters, instruction, services.

    def _check_chunk(self, problem: Callable[[object, PolicySpec], str | None], value: object) -> str | None:
        """Against the loaded checkpoint; without one configure checks."""
        return None if self._session is None else problem(value, self._session.policy.spec)

    def _on_instruction(self, message: String) -> None:
        result = self.set_parameters([Parameter("instruction", value=message.data)])[0]
        if not result.successful:
            self.get_logger().warning(f"instruction ignored: {result.reason}")

    def _apply_parameters(self, changed: list[Parameter]) -> None:
        if self._session is None:
            return
        names = {parameter.name for parameter in changed}
        if "instruction" in names:
            self._session.set_instruction(str(parameters.value(self, "instruction")), self._now())
        options = loading.session_options(self, self._session.contract, self._session.policy.spec)
        self._session.options = replace(self._session.options, noise_seed=options.noise_seed)
        self._session.noise_seed = options.noise_seed
        self._session.scheduler.execution_horizon_steps = options.execution_horizon_steps
        self._session.scheduler.blend_time_s = options.blend_time_s

    def _start(self, session: PolicySession) -> str:
        session.start(self._now())
        self._publish(session.motion.tick(self._now()))
        return "started"

    def _stop(self, session: PolicySession) -> str:
        session.stop(self._now())
        self._publish(session.motion.tick(self._now()))
        return "stopped; ~/start begins anew"

    def _restart(self, session: PolicySession) -> str:
        session.restart(self._now())
        self._publish(session.motion.tick(self._now()))
        return f"epoch {session.scheduler.epoch}"

    def _reset_fault(self, session: PolicySession) -> str:
        return "cleared: " + ("; ".join(session.reset_fault()) or "nothing")

    def _answer(self, response: Trigger.Response, action: Callable[[PolicySession], str]) -> Trigger.Response:
        if self._session is None or self._lifecycle != "active":
            response.success, response.message = False, "the node must be activated first (lifecycle)"
        else:
            response.success, response.message = True, action(self._session)
        return response

    @property
    def lifecycle(self) -> str:
        """Present lifecycle state: unconfigured, inactive, active or finalized."""
        return self._lifecycle

    def _report(self) -> None:
        now_ns = self._now()
        name = self.get_fully_qualified_name().lstrip("/")
        extra: dict[str, object] = {"lifecycle": self._lifecycle}
        if self._session is not None and self._loaded is not None:
            extra["weights_file"], extra["weights_bytes"] = self._loaded.weights
            silent_s = time.monotonic() - self._ticked_s
            clock = diagnostics.clock_problem(now_ns, silent_s, self._session.contract.period_s)
            report = diagnostics.session_status(name, self._session, now_ns, extra, clock)
        else:
            level = DiagnosticStatus.ERROR if self._configure_error else DiagnosticStatus.WARN
            message = f"not configured: {self._configure_error}" if self._configure_error else "not configured"
            report = diagnostics.status(f"{name}: policy", "", level, message, extra)
        self._diagnostics.publish(diagnostics.array(now_ns, report))


def main(args: list[str] | None = None, policy_loader: loading.PolicyLoader = loading.load_policy) -> None:
    """Run the node until SIGINT or SIGTERM; then hold the arm, and exit with 0."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    node, stopping = process.start(args, "policy_node", lambda: PolicyNode(policy_loader=policy_loader))
    forward_logging(node.get_logger())
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if parameters.value(node, "auto_activate") and node.trigger_configure() is TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        while not stopping and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        if node.lifecycle != "finalized":
            node.trigger_shutdown()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()

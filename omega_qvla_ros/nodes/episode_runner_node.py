"""Runs episodes over ROS topics: bridge and policy are two other processes, asked by services as anybody could.

From Python: ``run_episodes(requests, on_episode=..., on_frame=...)``. As an executable it prints one log line per
episode and a summary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import Trigger

from omega_qvla_core.envs.tabletop import COLOURS, Task
from omega_qvla_core.errors import OmegaQVLAError
from omega_qvla_ros import msgs
from omega_qvla_ros.nodes import parameters, qos

SERVICE_TIMEOUT_S = 30.0
REPORT_TIMEOUT_S = 5.0
"""Diagnostics come once per second."""
SETTLE_S = 0.8
"""Simulated time between ~/stop and a reset. The tabletop arm's hold lasts 0.2 s and is sent in three control periods
(0.15 s); what of it reached the controller after the reset would lead the arm back to where the last episode ended."""


class EpisodeError(OmegaQVLAError):
    """An episode could not be run: a node is missing, refuses, or does not answer."""


@dataclass(frozen=True)
class EpisodeRequest:
    """One episode: seed and task as ``kind:colour``. The instruction's wording follows from the seed."""

    seed: int
    task: str


@dataclass(frozen=True)
class EpisodeRecord:
    """How one episode ended.

    Attributes:
        index: Position in the run, from 0.
        seed: Seed of the start poses.
        task: ``kind:colour``.
        instruction: What the policy was told.
        success: The task was done.
        stage: Furthest stage reached.
        wrong_colour: Another cube was handled.
        sim_time_s: Simulated seconds from the first command to the end.
        steps: Control periods from the first command to the end.
        wall_s: Wall seconds from the start request to the result.
        rejected_trajectories: Trajectories that the controller refused; must be 0.
        policy: The policy node's newest diagnostics at that time.
    """

    index: int
    seed: int
    task: str
    instruction: str
    success: bool
    stage: str
    wrong_colour: bool
    sim_time_s: float
    steps: int
    wall_s: float
    rejected_trajectories: int
    policy: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class EpisodeRun:
    """All episodes, and both nodes' last diagnostics as text values (``inference_p50_ms``, ``control_rate_hz`` ...)."""

    records: Sequence[EpisodeRecord]
    policy: Mapping[str, str]
    bridge: Mapping[str, str]

    @property
    def successes(self) -> int:
        """Number of episodes that succeeded."""
        return sum(record.success for record in self.records)


def episode_requests(
    count: int, first_seed: int, kinds: Sequence[str] = ("touch", "lift", "place")
) -> list[EpisodeRequest]:
    """``count`` episodes with consecutive seeds; kinds of task in turn, and with each round the next colour."""
    return [
        EpisodeRequest(first_seed + k, str(Task(kinds[k % len(kinds)], COLOURS[(k // len(kinds)) % len(COLOURS)])))
        for k in range(count)
    ]


class EpisodeRunnerNode(Node):
    """Asks for episodes and waits for their results. All methods must be called from one thread.

    Args:
        bridge: Bridge node, relative to the namespace.
        policy: Policy node, relative to the namespace.
        frame_topics: Image topics that are handed to ``on_frame``.
        on_frame: Called with topic, uint8 ``[H, W, 3]`` RGB and simulated time in s, while an episode runs.
        failure: Says what is wrong with the nodes' processes, None while they run; ends every waiting.
        kwargs: For ``rclpy.node.Node``.
    """

    def __init__(
        self,
        bridge: str = "mujoco_bridge_node",
        policy: str = "policy_node",
        frame_topics: Iterable[str] = (),
        on_frame: Callable[[str, np.ndarray, float], None] | None = None,
        failure: Callable[[], str | None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(kwargs.pop("node_name", "episode_client"), **kwargs)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self)
        self._bridge, self._policy = bridge, policy
        self._set_bridge = self.create_client(SetParameters, f"{bridge}/set_parameters")
        self._set_policy = self.create_client(SetParameters, f"{policy}/set_parameters")
        self._reset = self.create_client(Trigger, f"{bridge}/reset")
        self._start = self.create_client(Trigger, f"{policy}/start")
        self._stop = self.create_client(Trigger, f"{policy}/stop")
        self._failure = failure
        self._running = False
        self._results: dict[int, dict[str, Any]] = {}
        self._status: dict[str, DiagnosticStatus] = {}
        self._status_count: dict[str, int] = {}
        self.create_subscription(String, "episode_result", self._on_result, qos.RESULT)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._time_ns = 0
        self.create_subscription(Clock, "/clock", self._on_clock, qos.CLOCK)
        if on_frame is not None:
            for topic in frame_topics:
                self.create_subscription(
                    Image, topic, lambda m, t=topic: self._on_frame(on_frame, t, m), qos_profile_sensor_data
                )

    # Callbacks.

    def _on_result(self, message: String) -> None:
        result = json.loads(message.data)
        self._results[int(result["episode"])] = result

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            node = status.name.partition(":")[0]
            for name in (self._bridge, self._policy):
                if node == self._resolved(name):
                    self._status[name] = status
                    self._status_count[name] = self._status_count.get(name, 0) + 1

    def _on_frame(self, on_frame: Callable[[str, np.ndarray, float], None], topic: str, message: Image) -> None:
        if self._running:
            on_frame(topic, msgs.image_to_rgb(message, topic), msgs.stamp_to_ns(message.header.stamp) * 1e-9)

    def _on_clock(self, message: Clock) -> None:
        self._time_ns = msgs.stamp_to_ns(message.clock)

    # What a caller does.

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the bridge answers and the policy node is active.

        Raises:
            EpisodeError: One is missing after ``timeout_s``, or the policy node's configuration failed.
        """

        def ready() -> bool:
            status = self._status.get(self._policy)
            if status is not None and status.level == DiagnosticStatus.ERROR:
                raise EpisodeError(f"{self._policy}: {status.message}")
            active = _values(status).get("lifecycle") == "active"
            return active and all(
                c.service_is_ready() for c in (self._reset, self._set_bridge, self._start, self._stop)
            )

        if not self._spin_until(ready, timeout_s):
            missing = self._bridge if not self._reset.service_is_ready() else self._policy
            status = self._status.get(missing)
            raise EpisodeError(
                f"{missing} is not ready after {timeout_s:.0f} s: {status.message if status else 'nothing heard of it'}"
            )

    def run_episode(self, index: int, request: EpisodeRequest, timeout_s: float) -> EpisodeRecord:
        """Run one episode: stop, reset, tell, start, wait for the result.

        Raises:
            EpisodeError: A node refuses or there is no result after ``timeout_s`` of wall time.
        """
        self._trigger(self._stop)
        self._settle()
        self._set(self._set_bridge, seed=request.seed, task=request.task)
        episode = json.loads(self._trigger(self._reset))
        self._set(self._set_policy, instruction=episode["instruction"])
        started_s = time.monotonic()
        self._running = True
        self._trigger(self._start)
        number = int(episode["episode"])
        if not self._spin_until(lambda: number in self._results, timeout_s):
            status = self._status.get(self._policy)
            raise EpisodeError(
                f"no result of episode {number} after {timeout_s:.0f} s; {self._policy}: "
                f"{status.message if status else 'nothing heard of it'}"
            )
        self._running = False
        result = self._results.pop(number)
        return EpisodeRecord(
            index=index,
            seed=request.seed,
            task=request.task,
            instruction=episode["instruction"],
            success=bool(result["success"]),
            stage=str(result["stage"]),
            wrong_colour=bool(result["wrong_colour"]),
            sim_time_s=float(result["sim_time_s"]),
            steps=int(result["steps"]),
            wall_s=time.monotonic() - started_s,
            rejected_trajectories=int(result["rejected_trajectories"]),
            policy=_values(self._status.get(self._policy)),
        )

    def finish(self, records: Sequence[EpisodeRecord]) -> EpisodeRun:
        """Stop the policy and collect both nodes' reports from after the last episode."""
        self._trigger(self._stop)
        counts = dict(self._status_count)
        # One more report may have been under way; the second one is surely from after the end.
        fresh = lambda: all(self._status_count.get(n, 0) >= counts.get(n, 0) + 2 for n in (self._bridge, self._policy))  # noqa: E731
        self._spin_until(fresh, REPORT_TIMEOUT_S)
        return EpisodeRun(records, _values(self._status.get(self._policy)), _values(self._status.get(self._bridge)))

    # Inside.

    def _settle(self) -> None:
        """Wait until the arm stands after ~/stop."""
        self._spin_until(lambda: self._time_ns > 0, SERVICE_TIMEOUT_S)
        end_ns = self._time_ns + int(SETTLE_S * 1e9)
        if not self._spin_until(lambda: self._time_ns >= end_ns, SERVICE_TIMEOUT_S):
            raise EpisodeError(f"{self._bridge}: simulated time stands; is the simulation running?")

    def _resolved(self, name: str) -> str:
        if name.startswith("/"):
            return name.lstrip("/")
        return f"{self.get_namespace().rstrip('/')}/{name}".lstrip("/")

    def _spin_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not done():
            failure = self._failure()
            if failure is not None:
                raise EpisodeError(failure)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0 or not self.context.ok():
                return False
            self._executor.spin_once(timeout_sec=min(left_s, 0.2))
        return True

    def _call(self, client: Any, request: Any) -> Any:
        future = client.call_async(request)
        if not self._spin_until(future.done, SERVICE_TIMEOUT_S):
            raise EpisodeError(f"service {client.srv_name!r} does not answer; is its node running?")
        return future.result()

    def _trigger(self, client: Any) -> str:
        response = self._call(client, Trigger.Request())
        if not response.success:
            raise EpisodeError(f"service {client.srv_name!r} refused: {response.message}")
        return str(response.message)

    def _set(self, client: Any, **values: object) -> None:
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        )
        for result, name in zip(self._call(client, request).results, values):
            if not result.successful:
                raise EpisodeError(f"parameter {name!r} was refused: {result.reason}")


def _values(status: DiagnosticStatus | None) -> dict[str, str]:
    return {} if status is None else {pair.key: pair.value for pair in status.values}


def run_episodes(
    requests: Sequence[EpisodeRequest],
    *,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
    on_frame: Callable[[str, np.ndarray, float], None] | None = None,
    frame_topics: Iterable[str] = ("overview/image_raw",),
    bridge: str = "mujoco_bridge_node",
    policy: str = "policy_node",
    namespace: str = "",
    startup_timeout_s: float = 120.0,
    episode_timeout_s: float = 120.0,
    failure: Callable[[], str | None] = lambda: None,
) -> EpisodeRun:
    """Run episodes with nodes that run, or start soon, on the same ROS graph.

    The present process must be in the graph's environment (``process_environment.enter_ros_environment``). A context
    of its own is used, so rclpy may be initialized elsewhere or not at all.

    Args:
        requests: What to run, in order.
        on_episode: Called after each episode.
        on_frame: Called with topic, uint8 ``[H, W, 3]`` RGB and simulated time in s for each image of
            ``frame_topics`` that comes while an episode runs.
        frame_topics: Image topics; the bridge publishes ``overview/image_raw`` with its parameter ``overview``.
        bridge: Name of the bridge node.
        policy: Name of the policy node.
        namespace: Namespace of both nodes.
        startup_timeout_s: Wall time to wait for the nodes.
        episode_timeout_s: Wall time for one episode.
        failure: Who started the nodes says with it what became of them, None while they run: a node that dies is
            then reported at once and not after a timeout.

    Raises:
        EpisodeError: A node is missing or died, its configuration failed, or it does not answer.
    """
    context = Context()
    rclpy.init(context=context, args=[])
    node = EpisodeRunnerNode(
        bridge, policy, frame_topics, on_frame, failure, context=context, namespace=namespace or None
    )
    try:
        node.wait_until_ready(startup_timeout_s)
        records = []
        for index, request in enumerate(requests):
            records.append(node.run_episode(index, request, episode_timeout_s))
            if on_episode is not None:
                on_episode(records[-1])
        return node.finish(records)
    finally:
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def main(args: list[str] | None = None) -> None:
    """Run the episodes that the parameters ask for; exits with 1 if they could not be run."""
    # Python's own Ctrl-C: the nodes that are asked to stop need a context that still works.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    settings = Node("episode_runner_node")
    logger = settings.get_logger()
    try:
        for message in parameters.declare(settings, parameters.EPISODE_RUNNER_NODE):
            raise EpisodeError(message)
        get = lambda name: parameters.value(settings, name)  # noqa: E731
        kinds = [str(kind) for kind in get("tasks")]

        def report(record: EpisodeRecord) -> None:
            outcome = "success" if record.success else f"failure at {record.stage!r}"
            logger.info(f"{record.instruction!r}: {outcome}, {record.sim_time_s:.1f} s (seed {record.seed})")

        run = run_episodes(
            episode_requests(int(get("episodes")), int(get("first_seed")), kinds),
            on_episode=report,
            bridge=str(get("bridge")),
            policy=str(get("policy")),
            namespace=settings.get_namespace(),
            startup_timeout_s=float(get("startup_timeout_s")),
            episode_timeout_s=float(get("episode_timeout_s")),
        )
        logger.info(
            f"{run.successes} of {len(run.records)} episodes succeeded; inference p50 "
            f"{run.policy.get('inference_p50_ms')} ms, p95 {run.policy.get('inference_p95_ms')} ms; control rate "
            f"{run.policy.get('control_rate_hz')} Hz; {run.bridge.get('trajectories_rejected')} trajectories rejected"
        )
    except OmegaQVLAError as error:
        logger.fatal(str(error))
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        logger.info("interrupted")
    finally:
        settings.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()

"""A soak run: bridge, policy node and processor load as processes, and this process between them."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omega_qvla_core.envs.tabletop.seeds import ROS_EVALUATION
from omega_qvla_ros.contract import RobotContract, load_contract
from omega_qvla_ros.nodes.episode_runner_node import episode_requests
from omega_qvla_ros.nodes.soak_node import BRIDGE, POLICY, RELAYED, SoakError, SoakNode, running_soak_node
from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id, ros_environment
from omega_qvla_ros.processes import NodeProcess, first_failure, running
from omega_qvla_ros.resources import resolve_contract
from omega_qvla_ros.soak.load import start_burners
from omega_qvla_ros.soak.report import SoakFigures, memory_growth
from omega_qvla_ros.soak.schedule import Fault, draw_faults

CONTRACT = "tabletop"
STARTUP_S = 180.0
EPISODE_LIMIT_S = 40.0
"""Simulated time after which an episode ends without success; faults make them long."""
SETTLE_S = 0.8
"""Between ~/stop and a reset of the simulator: what is under way must not lead the arm back."""
TEND_S = 0.5
"""Period of looking after the node."""
STUCK_S = 60.0
"""Not allowed to move for so long in spite of an operator who resets and starts is a violation."""
WRITE_S = 5.0
PAGE = os.sysconf("SC_PAGE_SIZE")
COUNTS = (
    "control_ticks_missed",
    "control_ticks_late",
    "chunks_accepted",
    "chunks_dropped_late",
    "trajectories_withdrawn",
    "steps_skipped",
    "holds",
    "plan_ran_out",
    "tracking_lost",
)
LEVELS = (
    "control_jitter_p50_ms",
    "control_jitter_p99_ms",
    "planning_p50_ms",
    "planning_p99_ms",
    "hold_planning_p50_ms",
    "hold_planning_p99_ms",
    "inference_p50_ms",
    "inference_p95_ms",
    "inference_p99_ms",
)


@dataclass(frozen=True)
class SoakOptions:
    """What is run. ``burners`` processes keep the processors busy on and off."""

    minutes: float
    seed: int
    policy: str
    burners: int


class SoakRun:
    """One run; ``figures`` is up to date at any time.

    Args:
        options: What is run.
        node: Sensors, operator and watch.
        bridge: The simulator's process.
        policy: The policy node's process.
        figures: Filled while it runs.
        write: Called now and then with the figures.
    """

    def __init__(
        self,
        options: SoakOptions,
        contract: RobotContract,
        node: SoakNode,
        bridge: NodeProcess,
        policy: NodeProcess,
        figures: SoakFigures,
        write: Callable[[SoakFigures], None],
    ) -> None:
        self._options, self._node, self._bridge, self._policy = options, node, bridge, policy
        self._cameras = [camera.key for camera in contract.cameras]
        self._names = contract.joint_names
        self._jump_limit = dict(zip(self._names, contract.joint_limits().max_jump.tolist()))
        self.figures = figures
        self._write = write
        self._requests = iter(episode_requests(10_000, ROS_EVALUATION.start))
        self._instructions = ["touch the red cube", "touch the green cube", "touch the blue cube"]
        self._episodes_seen = 0
        self._started_s = self._tended_s = self._written_s = 0.0
        self._faults: Counter[str] = Counter()

    def run(self) -> None:
        """Until the time is over.

        Raises:
            SoakError: A process ended or a service does not answer.
        """
        node = self._node
        ready = lambda: node.time_ns > 0 and node.status.get("lifecycle") == "active"  # noqa: E731
        if not node.spin_for(STARTUP_S, ready):
            raise SoakError(f"the nodes were not ready after {STARTUP_S:.0f} s; see their logs")
        self._started_s = time.monotonic()
        duration_s = self._options.minutes * 60.0
        self._next_episode()
        for fault in draw_faults(duration_s, self._options.seed, self._cameras):
            self._wait_until(fault.start_s)
            self._faults[fault.kind] += 1
            self._inject(fault)
        self._wait_until(duration_s)
        node.trigger("stop")
        node.spin_for(2.0)  # the last reports
        self.figures.finished = True

    def collect(self) -> None:
        """Bring the figures up to date."""
        figures, watch, node = self.figures, self._node.watch, self._node
        figures.minutes = (time.monotonic() - self._started_s) / 60.0 if self._started_s else 0.0
        figures.faults = dict(self._faults)
        figures.episodes = len(node.results)
        figures.successes = sum(bool(result["success"]) for result in node.results)
        figures.trajectories = watch.trajectories
        figures.trajectories_rejected = int(node.bridge.get("trajectories_rejected", 0))
        reasons = {key.partition(".")[2]: int(v) for key, v in node.bridge.items() if key.startswith("rejected.")}
        figures.rejections = reasons
        figures.trajectories_not_finite = int(node.bridge.get("trajectories_not_finite", 0))
        figures.trajectories_invalid = int(node.report.get("trajectories_invalid", 0))
        figures.trajectories_beyond_limits = int(node.report.get("trajectories_beyond_limits", 0))
        figures.refused_by_the_watch = dict(watch.refused)
        figures.unguarded, figures.examples = dict(watch.unguarded), list(watch.examples)
        figures.peaks = asdict(watch.peaks)
        figures.controller_jump = self._of_joints("reference_jump")
        figures.controller_jump_limit = self._jump_limit
        figures.controller_acceleration = self._of_joints("reference_acceleration")
        figures.largest_acceleration = dict(zip(self._names, map(float, watch.largest_acceleration)))
        figures.holds, figures.latches = dict(node.holds), dict(node.latches)
        figures.node = {name: float(node.report[name]) for name in (*COUNTS, *LEVELS) if name in node.report}
        figures.memory_growth = memory_growth(figures.memory_samples)

    def _of_joints(self, name: str) -> dict[str, float]:
        return {j: float(self._node.bridge[f"{name}.{j}"]) for j in self._names if f"{name}.{j}" in self._node.bridge}

    # Time.

    def _wait_until(self, at_s: float) -> None:
        while (left_s := self._started_s + at_s - time.monotonic()) > 0.0:
            self._node.spin_for(min(left_s, TEND_S))
            self._tend()

    def _pass(self, seconds: float) -> None:
        self._node.spin_for(seconds)

    def _tend(self) -> None:
        """The operator's round: next episode, resets, starts; and the record."""
        now_s = time.monotonic()
        if now_s - self._tended_s < TEND_S:
            return
        self._tended_s = now_s
        self.figures.memory_samples.append((now_s - self._started_s, resident_bytes(self._policy.pid)))
        if len(self._node.results) > self._episodes_seen:
            self._next_episode()
        elif now_s - self._node.moving_s > 2.0:
            self._recover()
        if now_s - self._node.moving_s > STUCK_S:
            self.figures.stuck.append(f"{now_s - self._started_s:.0f} s: {self._node.status.get('reasons', '')}")
            self._node.moving_s = now_s
        if now_s - self._written_s > WRITE_S:
            self._written_s = now_s
            self.collect()
            self._write(self.figures)

    # The operator.

    def _next_episode(self) -> None:
        self._episodes_seen = len(self._node.results)
        request = next(self._requests)
        self._node.trigger("stop")
        self._node.spin_for(SETTLE_S)
        instruction = self._node.reset_robot(request.seed, request.task)
        self._node.set_parameters(POLICY, instruction=instruction)
        self._recover()

    def _recover(self) -> None:
        """Whatever stopped the arm, a patient operator starts it again."""
        if self._node.status.get("lifecycle") == "inactive":
            self._node.transition("activate")
        if self._node.status.get("state") == "LATCHED":
            self._node.trigger("reset_fault")
        self._node.trigger("start")

    def _inject(self, fault: Fault) -> None:
        """Make a fault, let it last, mend it."""
        node = self._node
        if fault.stream:
            relay = node.streams[fault.stream]
            relay.fault, relay.held_back = fault.kind, None
            self._pass(fault.duration_s)
            relay.fault = ""
        elif fault.kind.startswith("joints"):
            node.joints.fault = fault.kind
            self._pass(fault.duration_s)
            node.joints.fault = ""
        elif fault.kind == "image_burst":
            node.burst = True
            self._pass(fault.duration_s)
            node.burst = False
        elif fault.kind in ("clock_pause", "node_starved"):
            process = self._bridge if fault.kind == "clock_pause" else self._policy
            process.send(signal.SIGSTOP)
            self._pass(fault.duration_s)
            process.send(signal.SIGCONT)
        else:
            self._operate(fault)
        self._tend()

    def _operate(self, fault: Fault) -> None:
        node = self._node
        if fault.kind == "instruction":
            self._instructions.append(self._instructions.pop(0))
            node.set_parameters(POLICY, instruction=self._instructions[0])
        elif fault.kind == "restart":
            node.trigger("restart")
        elif fault.kind == "stop_start":
            node.trigger("stop")
            self._pass(fault.duration_s)
            node.trigger("start")
        elif fault.kind == "disable":
            node.enable(False)
            self._pass(fault.duration_s)
            node.enable(True)
        elif fault.kind == "lifecycle":
            node.transition("deactivate")
            self._pass(fault.duration_s)
            node.transition("activate")
        elif fault.kind == "e_stop":
            node.press(True)
            self._pass(fault.duration_s)
            node.press(False)
            self._pass(0.7)  # a reset is refused for 0.5 s after the release
            self._recover()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def soak(
    options: SoakOptions, out: Path, on_progress: Callable[[SoakFigures], None] = lambda figures: None
) -> SoakFigures:
    """Run a soak; ``out/soak.json`` is renewed every few seconds.

    Args:
        options: What is run.
        out: Folder for the figures and the nodes' logs.
        on_progress: Called whenever the figures were written.

    Returns:
        The figures; ``violations()`` says whether it passed.
    """
    out.mkdir(parents=True, exist_ok=True)
    domain_id = free_domain_id()
    enter_ros_environment(domain_id)
    contract = load_contract(resolve_contract(CONTRACT))
    figures = SoakFigures(options.minutes, options.seed, options.policy)

    def write(current: SoakFigures) -> None:
        current.write(out / "soak.json")
        on_progress(current)

    with (
        running(*_starters(options, contract, domain_id, out)) as nodes,
        running_soak_node(contract, lambda: first_failure(nodes)) as node,
    ):
        burners = start_burners(options.burners, options.seed)
        run = SoakRun(options, contract, node, nodes[0], nodes[1], figures, write)
        try:
            run.run()
        except SoakError as error:
            figures.died.append(str(error))
        finally:
            for process in nodes:
                process.send(signal.SIGCONT)
            for burner in burners:
                burner.kill()
                burner.wait()
            run.collect()
            write(figures)
    return figures


def _starters(
    options: SoakOptions, contract: RobotContract, domain_id: int, out: Path
) -> Sequence[Callable[[], NodeProcess]]:
    environment = ros_environment(domain_id, threads=1)
    topics = [camera.topic for camera in contract.cameras] + [contract.sensors.joint_states_topic]
    return (
        lambda: NodeProcess(
            "omega_qvla_ros.nodes.mujoco_bridge_node",
            environment,
            out / f"{BRIDGE}.log",
            {"episode_limit_s": EPISODE_LIMIT_S},
        ),
        lambda: NodeProcess(
            "omega_qvla_ros.nodes.soak_policy_node",
            environment,
            out / f"{POLICY}.log",
            {
                "checkpoint": options.policy,
                "use_sim_time": True,
                "auto_activate": True,
                "start_on_activate": False,
                "inference_threads": 1,
            },
            {topic: RELAYED + topic for topic in topics},
        ),
    )

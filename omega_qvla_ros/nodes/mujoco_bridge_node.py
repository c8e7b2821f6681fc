"""``mujoco_bridge_node``: the tabletop simulation as a robot on ROS topics, controller included.

Publishes ``<camera>/image_raw`` and ``camera_info``, ``joint_states`` and ``/clock``, executes ``joint_trajectory`` by
the rules of a stock joint_trajectory_controller, resets on ``~/reset`` (std_srvs/Trigger; reads ``seed`` and ``task``)
and judges episodes: ``episode_result`` is a std_msgs/String with JSON.

Threads: physics, rendering and all publishing run on the main thread, because an OpenGL context belongs to one
thread; the executor spins on a second one and hands over trajectories and reset requests under a lock.
Simulated time only goes forward: a reset moves the arm and the cubes, never the clock.
"""

from __future__ import annotations

import json
import re
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory as JointTrajectoryMsg

from omega_qvla_core.envs.tabletop import (
    CAMERAS,
    COMMAND_PERIOD_S,
    CONTROL_PERIOD_S,
    HUMAN_CAMERA,
    JOINT_NAMES,
    TabletopEnv,
    Task,
    limit_command,
)
from omega_qvla_core.errors import ConfigError
from omega_qvla_ros import msgs
from omega_qvla_ros.jtc import TrajectoryExecutor
from omega_qvla_ros.nodes import diagnostics, parameters, process, qos
from omega_qvla_ros.reference_peaks import ReferencePeaks
from omega_qvla_ros.splines import NS_PER_S, nanoseconds, seconds
from omega_qvla_ros.stats import TickMonitor

STEP_NS = nanoseconds(COMMAND_PERIOD_S)
CONTROL_NS = nanoseconds(CONTROL_PERIOD_S)
START_NS = NS_PER_S
"""First value of ``/clock``; 0 would mean "not known yet"."""
MAX_LAG_S = 0.2
"""Further behind real time than this the simulation gives up catching up: it slows down instead of rushing."""
RESET_TIMEOUT_S = 30.0
AUTO_RESET_DELAY_NS = NS_PER_S
AUTO_RESET_DEAF_NS = NS_PER_S // 2
"""After an automatic reset the controller is deaf for so long: the policy has to notice that the arm is elsewhere."""


@dataclass
class Episode:
    """The running episode. ``started`` is False until the first command after the reset was accepted."""

    number: int
    seed: int
    task: Task
    instruction: str
    reset_ns: int
    started_ns: int | None = None
    ended_ns: int | None = None
    rejected: int = 0
    not_finite: int = 0


class MujocoBridgeNode(Node):
    """See the module's text; parameters with their comments: ``config/mujoco_bridge_node.yaml``."""

    def __init__(self, node_name: str = "mujoco_bridge_node", **kwargs: object) -> None:
        super().__init__(node_name, **kwargs)
        for message in parameters.declare(self, parameters.MUJOCO_BRIDGE_NODE):
            raise ConfigError(message)
        self.add_on_set_parameters_callback(
            parameters.checker(parameters.MUJOCO_BRIDGE_NODE, lambda: True, {"task": _check_task})
        )
        self._image_size = int(parameters.value(self, "image_size"))
        self.env = TabletopEnv(image_size=self._image_size)
        self._controller = TrajectoryExecutor(
            JOINT_NAMES, bool(parameters.value(self, "interpolate_from_desired_state"))
        )
        self._peaks = ReferencePeaks(len(JOINT_NAMES), CONTROL_NS)
        self._lock = threading.Lock()
        self._resets: list[Future[str]] = []
        self._now_ns = START_NS
        self._deaf_until_ns = 0
        self._counters: Counter[str] = Counter()
        self._rejections: Counter[str] = Counter()
        self._rate = TickMonitor(COMMAND_PERIOD_S, size=500)
        self._episodes = 0
        self._create_interfaces()
        self._reset(int(parameters.value(self, "seed")), Task.parse(str(parameters.value(self, "task"))))
        self._viewer = _open_viewer(self.env) if parameters.value(self, "viewer") else None

    def _create_interfaces(self) -> None:
        self._clock_publisher = self.create_publisher(Clock, "/clock", qos.CLOCK)
        self._joint_publisher = self.create_publisher(JointState, "joint_states", 10)
        self._cameras = list(CAMERAS)
        self._images = {
            key: self.create_publisher(Image, f"{key}/image_raw", qos_profile_sensor_data) for key in CAMERAS
        }
        self._infos = {
            key: self.create_publisher(CameraInfo, f"{key}/camera_info", qos_profile_sensor_data) for key in CAMERAS
        }
        if parameters.value(self, "overview"):
            self._images[HUMAN_CAMERA] = self.create_publisher(
                Image, f"{HUMAN_CAMERA}/image_raw", qos_profile_sensor_data
            )
        self._results = self.create_publisher(String, "episode_result", qos.RESULT)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(JointTrajectoryMsg, "joint_trajectory", self._on_trajectory, qos.COMMAND_RECEIVED)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._joint_every_ns = self._whole_steps("joint_state_rate_hz")
        self._camera_every_ns = self._whole_steps("camera_rate_hz")
        self._overview_every_ns = self._whole_steps("overview_rate_hz")
        self._fovy_rad = {key: camera.fovy_rad for key, camera in self.env.privileged().cameras.items()}

    def _whole_steps(self, name: str) -> int:
        """Period of a rate parameter, rounded to whole controller steps."""
        steps = max(1, round(1.0 / float(parameters.value(self, name)) / COMMAND_PERIOD_S))
        return steps * STEP_NS

    # Executor thread.

    def _on_trajectory(self, message: JointTrajectoryMsg) -> None:
        trajectory = msgs.trajectory_from_msg(message)
        with self._lock:
            reason = self._deaf_reason(trajectory.stamp_ns)
            if reason is not None:
                self._counters[f"trajectories_ignored_{reason}"] += 1
                return
            reason = self._controller.accept(trajectory, self._now_ns)
            if reason is None:
                self._counters["trajectories_accepted"] += 1
                if self._episode.started_ns is None:
                    self._episode.started_ns = self._now_ns
                return
            self._rejections[re.sub(r"[0-9]+", "#", reason)] += 1
            self._episode.rejected += 1
        self.get_logger().error(f"trajectory rejected: {reason}", throttle_duration_sec=5.0)

    def _deaf_reason(self, stamp_ns: int) -> str | None:
        """A controller that is not active ignores messages: after an episode's end, and what is from before a reset."""
        if self._episode.ended_ns is not None:
            return "after_end"
        if stamp_ns != 0 and stamp_ns < self._episode.reset_ns - CONTROL_NS:
            return "before_reset"
        return "settling" if self._now_ns < self._deaf_until_ns else None

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        future: Future[str] = Future()
        with self._lock:
            self._resets.append(future)
        try:
            response.message = future.result(timeout=RESET_TIMEOUT_S)
            response.success = True
        except (ConfigError, FutureTimeoutError) as error:
            response.success, response.message = False, str(error) or "the simulation does not answer"
        return response

    # Main thread.

    def run(self, stopping: list[int]) -> None:
        """Simulate in real time until ``stopping`` has an element or the context is shut down."""
        wall_per_step_s = COMMAND_PERIOD_S / float(parameters.value(self, "real_time_factor"))
        next_s = time.monotonic()
        self._publish_sensors()
        while not stopping and self.context.ok():
            self._serve_resets()
            self._step()
            self._publish_sensors()
            next_s += wall_per_step_s
            late_s = time.monotonic() - next_s
            if late_s > MAX_LAG_S:
                self._counters["real_time_lost_ms"] += int(late_s * 1e3)
                next_s = time.monotonic()
            elif late_s < 0:
                time.sleep(-late_s)

    def _serve_resets(self) -> None:
        with self._lock:
            waiting, self._resets = self._resets, []
            episode = self._episode
        for future in waiting:
            try:
                task = Task.parse(str(parameters.value(self, "task")))
                future.set_result(self._reset(int(parameters.value(self, "seed")), task))
            except ConfigError as error:
                future.set_exception(error)
        ended = episode.ended_ns is not None and self._now_ns >= episode.ended_ns + AUTO_RESET_DELAY_NS
        if not waiting and ended and parameters.value(self, "auto_reset"):
            self._reset(episode.seed + 1, episode.task)
            self._deaf_until_ns = self._now_ns + AUTO_RESET_DEAF_NS

    def _reset(self, seed: int, task: Task) -> str:
        """Start an episode; returns its description as JSON, with the time: later joint states are of the new pose."""
        self.env.reset(seed, task)
        with self._lock:
            number = self._episodes
            self._episodes += 1
            self._episode = Episode(number, seed, task, task.wording(seed), self._now_ns)
            self._controller.hold(self.env.joint_positions())
            self._peaks.restart()
        self.get_logger().info(f"episode {number}: seed {seed}, {task}: {self._episode.instruction!r}")
        return json.dumps({**self._describe(self._episode), "time_ns": self._now_ns})

    @staticmethod
    def _describe(episode: Episode) -> dict[str, object]:
        return {
            "episode": episode.number,
            "seed": episode.seed,
            "task": str(episode.task),
            "instruction": episode.instruction,
        }

    def _step(self) -> None:
        """10 ms: one command of the controller, then physics."""
        with self._lock:
            target_ns = self._now_ns + STEP_NS
            # The controller's command for the end of its period, as ros2_control writes it.
            target, speed = self._controller.sample(target_ns, self.env.joint_positions(), self.env.joint_velocities())
            if not np.isfinite(target).all():
                target = self._refuse_target(target)
            else:
                self._peaks.sample(target_ns, target, speed)
        self.env.set_command(limit_command(self.env.command(), target, COMMAND_PERIOD_S))
        self.env.advance(COMMAND_PERIOD_S)
        with self._lock:
            self._now_ns = target_ns
            started_ns, ended_ns = self._episode.started_ns, self._episode.ended_ns
        self._rate.tick(time.monotonic_ns())
        if started_ns is not None and ended_ns is None and (target_ns - started_ns) % CONTROL_NS == 0:
            self._judge(target_ns - started_ns)

    def _refuse_target(self, target: np.ndarray) -> np.ndarray:
        """Drop a trajectory that gives no number, as a drive would; returns the last finite command. Lock held."""
        name = JOINT_NAMES[int(np.flatnonzero(~np.isfinite(target))[0])]
        command = self.env.command()
        self._controller.hold(command)
        self._peaks.restart()
        self._counters["trajectories_not_finite"] += 1
        self._episode.not_finite += 1
        self.get_logger().error(
            f"the trajectory gives no finite position for joint {name!r}: dropped, the arm holds its last command",
            throttle_duration_sec=5.0,
        )
        return command

    def _judge(self, elapsed_ns: int) -> None:
        status = self.env.update_status()
        limit_s = float(parameters.value(self, "episode_limit_s"))
        timed_out = status.timed_out if limit_s == 0.0 else float(seconds(elapsed_ns)) >= limit_s
        if not status.success and not timed_out:
            return
        with self._lock:
            episode = self._episode
            episode.ended_ns = self._now_ns
            self._controller.hold(self.env.command())
            self._peaks.restart()
        result = {
            **self._describe(episode),
            "success": bool(status.success),
            "stage": status.stage,
            "wrong_colour": bool(status.wrong_colour),
            "sim_time_s": round(float(seconds(elapsed_ns)), 3),
            "steps": status.steps,
            "rejected_trajectories": episode.rejected,
            "not_finite_trajectories": episode.not_finite,
        }
        self._results.publish(String(data=json.dumps(result)))
        self.get_logger().info(f"episode {episode.number} ended: {'success' if status.success else 'failure'}")

    def _publish_sensors(self) -> None:
        now_ns = self._now_ns
        self._clock_publisher.publish(Clock(clock=msgs.ns_to_stamp(now_ns)))
        if now_ns % self._joint_every_ns == 0:
            positions, velocities = self.env.joint_positions(), self.env.joint_velocities()
            self._joint_publisher.publish(msgs.joint_state(JOINT_NAMES, positions, velocities, now_ns))
        if now_ns % self._camera_every_ns == 0:
            for key in self._cameras:
                self._publish_camera(key, now_ns)
        if HUMAN_CAMERA in self._images and now_ns % self._overview_every_ns == 0:
            height = int(parameters.value(self, "overview_height"))
            width = int(parameters.value(self, "overview_width"))
            rgb = self.env.render(HUMAN_CAMERA, height, width)
            self._images[HUMAN_CAMERA].publish(msgs.rgb_to_image(rgb, now_ns, f"{HUMAN_CAMERA}_optical_frame"))
        if now_ns % NS_PER_S == 0:
            self._report(now_ns)
        if self._viewer is not None and now_ns % CONTROL_NS == 0:
            self._viewer.sync()

    def _publish_camera(self, key: str, now_ns: int) -> None:
        frame = f"{key}_optical_frame"
        rgb = self.env.render(key)
        self._images[key].publish(msgs.rgb_to_image(rgb, now_ns, frame))
        self._infos[key].publish(msgs.camera_info(*rgb.shape[:2], self._fovy_rad[key], now_ns, frame))
        self._counters[f"{key}_images"] += 1

    def _report(self, now_ns: int) -> None:
        with self._lock:
            rejected = sum(self._rejections.values())
            not_finite = self._counters["trajectories_not_finite"]
            values: dict[str, object] = {
                "trajectories_rejected": rejected,
                **{f"rejected.{reason}": count for reason, count in self._rejections.items()},
                **self._counters,
                **{f"reference_jump.{name}": float(value) for name, value in zip(JOINT_NAMES, self._peaks.jump)},
                **{f"reference_acceleration.{n}": float(a) for n, a in zip(JOINT_NAMES, self._peaks.acceleration)},
                "real_time_factor": self._rate.rate_hz * COMMAND_PERIOD_S,
                **self._describe(self._episode),
            }
        faults = [f"{rejected} trajectories rejected"] if rejected else []
        faults += [f"{not_finite} trajectories without finite positions"] if not_finite else []
        level = DiagnosticStatus.WARN if faults else DiagnosticStatus.OK
        message = "; ".join(faults) or "simulating"
        name = self.get_fully_qualified_name().lstrip("/")
        status = diagnostics.status(f"{name}: controller", "tabletop", level, message, values)
        self._diagnostics.publish(diagnostics.array(now_ns, status))

    def close(self) -> None:
        """Free the OpenGL context; call it on the main thread."""
        if self._viewer is not None:
            self._viewer.close()
        self.env.close()


def _check_task(text: object) -> str | None:
    try:
        Task.parse(str(text))
    except ConfigError as error:
        return str(error)
    return None


def _open_viewer(env: TabletopEnv) -> object:
    import mujoco.viewer  # only where a window is wanted: it needs a display

    return mujoco.viewer.launch_passive(env.model, env.data)


def main(args: list[str] | None = None) -> None:
    """Run the simulation until SIGINT or SIGTERM; exits with 0, with 1 if its executor died."""
    node, stopping = process.start(args, "mujoco_bridge_node", MujocoBridgeNode)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    died: list[Exception] = []
    spinner = threading.Thread(target=_spin, args=(executor, stopping, died), name="executor", daemon=True)
    spinner.start()
    try:
        node.run(stopping)
    finally:
        executor.shutdown()
        spinner.join(timeout=5.0)
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()
    if died:
        raise SystemExit(1)


def _spin(executor: SingleThreadedExecutor, stopping: list[int], died: list[Exception]) -> None:
    """The executor's thread. A robot that is deaf must not look alive: if this ends, so does the process."""
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
    except Exception as error:  # noqa: BLE001 - whatever a callback raises
        get_logger("mujoco_bridge_node").fatal(f"the executor died:\n{traceback.format_exc()}")
        died.append(error)
        stopping.append(0)


if __name__ == "__main__":
    main()

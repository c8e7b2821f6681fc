"""A fake robot and policy nodes as real processes, and what every row does with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fake_robot import FakeRobot, Received, Reported
from graph_fixtures import Graph
from scripted_policy import Script

from omega_qvla_ros.processes import NodeProcess
from omega_qvla_ros.resources import config_file
from omega_qvla_ros.trajectory import REST_NS

SCRIPTED = "scripted_policy"
PERIOD_S = 0.05
NAME = "policy_node"
QUIET_S = 0.6
"""Twelve control periods: long enough to see that nothing is sent."""
SUITE = Path(__file__).resolve().parent


class Stage:
    """One ROS graph: a probe (``graph``), a robot, and policy nodes with the scripted policy.

    Args:
        folder: For log files.
        checkpoint: A real checkpoint folder; script and list of inferences lie beside it.
        robot: For ``FakeRobot``.
    """

    def __init__(self, folder: Path, checkpoint: Path, **robot: Any) -> None:
        self.graph = Graph(folder)
        # The robot is the only one that takes commands: without it nobody must be left to hear them.
        self.graph.node.destroy_subscription(self.graph.command_subscription)
        modules = [str(SUITE), self.graph.environment.get("PYTHONPATH", "")]
        self.graph.environment["PYTHONPATH"] = os.pathsep.join(filter(None, modules))
        self.checkpoint = checkpoint
        self.script = Script(checkpoint)
        self.script.write()
        self.contract = patient_contract(folder)
        self.robot = FakeRobot(self.graph.domain_id, **robot)
        self.policy: NodeProcess | None = None
        self._changed: dict[str, object] = {}

    def start_policy(self, module: str = SCRIPTED, **parameters: object) -> NodeProcess:
        """A policy node that configures and activates itself; its node name and namespace by ``__node``, ``__ns``."""
        remappings = {key: str(parameters.pop(key)) for key in ("__node", "__ns") if key in parameters}
        values: dict[str, object] = {
            "checkpoint": str(self.checkpoint),
            "contract": str(self.contract),
            "use_sim_time": False,
            "auto_activate": True,
            "inference_threads": 1,
            "instruction": "touch the red cube",
            **parameters,
        }
        self.policy = self.graph.start(module, values, remappings or None)
        return self.policy

    def close(self) -> None:
        self.script.write()
        self.robot.close()
        self.graph.close()

    # Waiting.

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait with a generous deadline; a node that died ends it at once."""

        def checked() -> Any:
            failure = self.policy.failure() if self.policy is not None else None
            assert failure is None, failure
            return condition()

        self.graph.wait(checked, f"{what} ({self.robot.state}: {self.robot.reasons})")

    def wait_state(self, state: str, words: str = "", since_s: float = 0.0) -> Reported:
        """First status since a steady time with this state and these words among the reasons."""
        found: list[Reported] = []

        def reached() -> bool:
            status = self.robot.first(lambda s: s.state == state and words in s.reasons, since_s)
            found[:] = [status] if status else []
            return bool(found)

        self.wait(reached, f"state {state} with {words!r}")
        return found[0]

    def wait_words(self, words: str, since_s: float) -> Reported:
        """First status since a steady time that has the words in any of its values or in its message."""

        def has(status: Reported) -> bool:
            return words in status.message or any(words in value for value in status.values.values())

        self.wait(lambda: self.robot.first(has, since_s), f"{words!r} in the status")
        found = self.robot.first(has, since_s)
        assert found is not None
        return found

    def report(self) -> dict[str, str]:
        """The next report of the node in ``/diagnostics``, with its counters."""
        count = len(self.robot.reports)
        self.graph.wait(lambda: len(self.robot.reports) > count, "a report")
        return self.robot.reports[-1].values

    def wait_report(self, condition: Callable[[dict[str, str]], Any], what: str) -> dict[str, str]:
        """The first report from now on that says so: one that arrives now may have been written before the fault."""
        count = len(self.robot.reports)
        found: list[dict[str, str]] = []

        def said() -> bool:
            found[:] = [report.values for report in self.robot.reports[count:] if condition(report.values)][:1]
            return bool(found)

        self.wait(said, f"a report with {what}")
        return found[0]

    def wait_count(self, name: str, least: int) -> int:
        """The counter of the first report from now on in which it has come to ``least``."""
        return int(self.wait_report(lambda report: int(report.get(name, "0")) >= least, f"{name} >= {least}")[name])

    def spin(self, seconds: float) -> None:
        """Let everything go on for a while."""
        self.graph.spin(seconds)

    def motion_left_s(self) -> float:
        """Time to the end of the motion that the newest command asks for."""
        return (self.robot.commands[-1].trajectory.end_ns - REST_NS - self.robot.now_ns) * 1e-9

    def wait_moving(self) -> None:
        """The arm moves by fresh commands."""
        count, start = len(self.robot.commands), self.robot.arm
        self.wait(
            lambda: len(self.robot.commands) > count + 3 and np.abs(self.robot.arm - start).max() > 0.01,
            "the arm moves",
        )

    # Rows in common.

    def recover(self) -> None:
        """Everything mended, faults reset, active, started, moving."""
        self.script.write()
        self.robot.mend()
        if self.policy is not None and self.policy.returncode is not None:
            self.start_policy()
        for name, value in self._changed.items():
            assert self.graph.set_parameter(NAME, name, value).successful, name
        self._changed.clear()
        self._bring_up()
        self.robot.commands.clear()
        if self.robot.state != "OK":
            self.graph.wait(lambda: self.graph.trigger(f"{NAME}/reset_fault").success, "the reset")
            self._start()
        self.wait(lambda: self.robot.state == "OK", "OK")
        self.wait_moving()

    def _start(self) -> None:
        def started() -> bool:
            response = self.graph.trigger(f"{NAME}/start")
            return response.success or "running" in response.message

        self.graph.wait(started, "the start")

    def _bring_up(self) -> None:
        state = self.graph.lifecycle()
        if state == "unconfigured":
            assert self.graph.transition("configure"), self.graph.logs()[-3000:]
            state = "inactive"
        if state == "inactive":
            self.graph.wait(lambda: self.graph.transition("activate"), "activation")

    def set(self, name: str, value: object, restore: object) -> None:
        """Set a parameter of the policy node until the row is over."""
        result = self.graph.set_parameter(NAME, name, value)
        assert result.successful, result.reason
        self._changed[name] = restore

    def commands_since(self, at_s: float) -> Sequence[Received]:
        return [command for command in self.robot.commands if command.at_s >= at_s]

    def check_stopped(self, stood: bool = False) -> None:
        """The arm has come to rest by a decelerating hold, nothing more is sent, and no command was refused.

        With ``stood`` it was at the end of its window already, where nothing has to be sent.
        """
        self.wait(lambda: self.robot.speed == 0.0, "rest")
        self.spin(QUIET_S)  # the hold is sent in three periods, and braking from low speed takes less
        last = self.robot.commands[-1].trajectory
        if not stood:
            check_hold_message(last)
        count, position = len(self.robot.commands), self.robot.arm
        self.spin(QUIET_S)
        assert len(self.robot.commands) == count
        np.testing.assert_array_equal(self.robot.arm, position)
        np.testing.assert_allclose(position, last.points[-1].positions[:6], atol=1e-6)
        self.check_commands()

    def check_commands(self) -> None:
        """Every command so far: finite, ends at rest, taken by the controller."""
        assert self.robot.refused == []
        for command in self.robot.commands:
            points = command.trajectory.points
            assert all(np.isfinite([point.positions, point.velocities]).all() for point in points)
            np.testing.assert_array_equal(points[-1].velocities, 0.0)


def patient_contract(folder: Path) -> Path:
    """The tabletop robot with longer sensor timeouts: a busy machine that runs the tests is not the fault in question.

    The rows that are about timeouts set the matrix's numbers by parameter.
    """
    text = config_file("robots/tabletop.yaml").read_text(encoding="utf-8")
    for old, new in (
        ("timeout_s: 0.25", "timeout_s: 0.6"),
        ("joint_states_timeout_s: 0.1", "joint_states_timeout_s: 0.6"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "tabletop.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def check_hold_message(message: Any) -> None:
    """Comes to rest and stays: the last two points are the same, shortly after the stamp."""
    np.testing.assert_array_equal(message.points[-1].velocities, 0.0)
    np.testing.assert_allclose(message.points[-1].positions, message.points[-2].positions)
    assert message.end_ns - REST_NS - message.stamp_ns < 600_000_000

"""Nodes as processes of this machine: start, log file, clean end. For demo and tests; elsewhere launch does it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_TIMEOUT_S = 10.0


class NodeProcess:
    """One node, started at once.

    Args:
        module: Module with a ``main``, such as ``omega_qvla_ros.nodes.policy_node``.
        environment: From ``process_environment.ros_environment``.
        log: File that receives stdout and stderr.
        parameters: Name -> value.
        remappings: Topic or name -> replacement (``__node`` and ``__ns`` included).
    """

    def __init__(
        self,
        module: str,
        environment: Mapping[str, str],
        log: Path,
        parameters: Mapping[str, object] | None = None,
        remappings: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        arguments = [*_parameter_arguments(parameters or {}), *_remapping_arguments(remappings or {})]
        command = [sys.executable, "-m", module, *(["--ros-args", *arguments] if arguments else [])]
        with log.open("wb") as stream:
            # A session of its own: Ctrl-C in the terminal reaches the parent alone, which then stops nodes in order.
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, None while running."""
        return self._process.poll()

    def log_text(self) -> str:
        """Everything that the node has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End the node with SIGINT, with SIGKILL if that does not help; returns the exit code."""
        self.send(signal.SIGINT)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End the node with SIGKILL; returns the exit code."""
        self.send(signal.SIGKILL)
        return self._process.wait()


def _parameter_arguments(parameters: Mapping[str, object]) -> Sequence[str]:
    """JSON is YAML, so strings keep their type whatever they look like."""
    return [item for name, value in parameters.items() for item in ("-p", f"{name}:={json.dumps(value)}")]


def _remapping_arguments(remappings: Mapping[str, str]) -> Sequence[str]:
    return [item for name, value in remappings.items() for item in ("-r", f"{name}:={value}")]

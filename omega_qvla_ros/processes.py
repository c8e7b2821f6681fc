"""Nodes as processes of this machine: start, log file, clean end. For demo and tests; elsewhere launch does it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

STOP_TIMEOUT_S = 10.0
LOG_LINES = 8
"""Lines of a dead node's log that are shown: a traceback's end with its message."""
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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
        self.module = module
        self.log = log
        arguments = [*_parameter_arguments(parameters or {}), *_remapping_arguments(remappings or {})]
        command = [sys.executable, "-m", module, *(["--ros-args", *arguments] if arguments else [])]
        log.write_bytes(b"")
        self._process = self._start(command, dict(environment), log)

    @staticmethod
    def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
        with log.open("ab") as stream:
            # A session of its own: Ctrl-C in the terminal reaches the parent alone, which then stops nodes in order.
            return subprocess.Popen(
                command,
                env=environment,
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

    def failure(self) -> str | None:
        """None while the node runs, else with which code it ended and what it last wrote."""
        if self.returncode is None:
            return None
        lines = self.log_text().rstrip().splitlines()[-LOG_LINES:]
        return f"{self.module} ended with code {self.returncode}; the end of {self.log}:\n" + "\n".join(lines)

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


@contextmanager
def running(*starters: Callable[[], NodeProcess]) -> Iterator[Sequence[NodeProcess]]:
    """Start nodes in order, and stop them in the opposite order whatever ends the block."""
    nodes: list[NodeProcess] = []
    with ExitStack() as stack:
        # A signal between a process's start and its entry in the list would leave it behind.
        with _signals_deferred():
            for start in starters:
                nodes.append(start())
                stack.callback(nodes[-1].stop)
        yield nodes


def first_failure(nodes: Sequence[NodeProcess]) -> str | None:
    """What ``failure`` says about the first node that has ended, None while all run."""
    return next((text for text in (node.failure() for node in nodes) if text is not None), None)


def exit_on_signals() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does, through every ``finally``; for a program's ``main``.

    Without this they end it at once, and the nodes that it started go on.
    """

    def end(number: int, _: FrameType | None) -> None:
        for other in END_SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # once: what stops the nodes must not be interrupted
        raise SystemExit(128 + number)

    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, end)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Signals that come inside are handled at the end. (Blocking them would be inherited by the processes.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, *END_SIGNALS)
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda caught, _: came.append(caught))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _parameter_arguments(parameters: Mapping[str, object]) -> Sequence[str]:
    """JSON is YAML, so strings keep their type whatever they look like."""
    return [item for name, value in parameters.items() for item in ("-p", f"{name}:={json.dumps(value)}")]


def _remapping_arguments(remappings: Mapping[str, str]) -> Sequence[str]:
    return [item for name, value in remappings.items() for item in ("-r", f"{name}:={value}")]

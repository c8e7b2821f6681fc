"""Node processes that need not import what every node imports: forks of one process that has done it already.

torch, MuJoCo and rosbags take a node four seconds of a core at every start, and the tests over topics start a
hundred. A fork runs the module as ``python -m`` does, in a process of its own with its own session, environment, log
and exit code. The demo, the launch files and the tests of ``NodeProcess`` itself start nodes as a user does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omega_qvla_ros.process_environment import ros_environment
from omega_qvla_ros.processes import NodeProcess

IMPORTED_BEFORE = [
    "omega_qvla_core.runtime.random_policy",
    "omega_qvla_core.envs.tabletop",
    "omega_qvla_ros.session",
    "omega_qvla_ros.bags.recorder",
]
"""What the nodes import, but for rclpy: that starts threads, and a fork has only the one that forked."""
ANSWER_TIMEOUT_S = 90.0
"""For the imports, on a loaded machine."""
LONGEST_MESSAGE = 1 << 20
POLL_S = 0.01


class ForkedNode(NodeProcess):
    """A node that starts as a fork."""

    @staticmethod
    def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkedProcess:
        return ForkedProcess(command[2:], environment, log)


class ForkedProcess:
    """What ``NodeProcess`` needs of ``subprocess.Popen``, for a process that is no child of this one.

    Args:
        arguments: Module and its arguments.
        environment: All variables.
        log: File that receives stdout and stderr.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log),
            "folder": os.getcwd(),
        }
        self.pid: int = _ask(request)
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, None while running."""
        if self._returncode is None:
            self._returncode = _ask({"ended": self.pid})
        return self._returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code."""
        deadline_s = time.monotonic() + (timeout or float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal. The process keeps its number until ``poll`` has told its end."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _ask(request: dict[str, Any]) -> Any:
    channel = _server()
    channel.send(json.dumps(request).encode())
    answer = channel.recv(LONGEST_MESSAGE)
    assert answer, "the process that nodes are forked from has ended"
    return json.loads(answer)


@cache
def _server() -> socket.socket:
    """The channel to the process that is forked, started when it is first needed and ended with the tests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_MESSAGE)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        # The domain is that of no graph; each fork gets the environment that it is started with.
        env=ros_environment(0, threads=1),
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    ours.settimeout(ANSWER_TIMEOUT_S)

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# From here on: what runs in the process that is forked.


def main() -> None:
    """Serve; in a fork, run the module that was asked for."""
    for module in IMPORTED_BEFORE:
        importlib.import_module(module)
    assert "rclpy" not in sys.modules
    gc.collect()
    gc.freeze()  # the collector of a fork would touch, and with that copy, all of these
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request)
        runpy.run_module(request["arguments"][0], run_name="__main__", alter_sys=True)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer until the other side closes. Returns in the server with None, and in each fork with its request."""
    while message := channel.recv(LONGEST_MESSAGE):
        request = json.loads(message)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                return request
        channel.send(json.dumps(answer).encode())
    return None


def become(request: dict[str, Any]) -> None:
    """Make this fork what ``NodeProcess`` makes of a new process."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # PYTHONUNBUFFERED
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    modules = request["environment"].get("PYTHONPATH", "")
    sys.path[:1] = [request["folder"], *filter(None, modules.split(os.pathsep))]
    sys.argv = list(request["arguments"])


if __name__ == "__main__":
    main()

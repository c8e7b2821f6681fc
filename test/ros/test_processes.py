"""Node processes end with the program that started them, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omega_qvla_ros.process_environment import free_domain_id, ros_environment
from omega_qvla_ros.processes import NodeProcess, first_failure, running

DEADLINE_S = 90.0
FOREVER = "import time; time.sleep(600)"


def children(pid: int) -> set[int]:
    """Processes whose parent is ``pid``."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.add(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait(condition, what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_demo_that_is_told_to_end_ends_its_nodes(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "omega_qvla_ros.demo", "--policies", "tabletop_w4a4", "--out", str(tmp_path)]
    with (tmp_path / "demo.log").open("wb") as log:
        demo = subprocess.Popen(command, env=ros_environment(free_domain_id(60)), stdout=log, stderr=log)
    try:
        wait(lambda: len(children(demo.pid)) == 2, "both nodes")
        nodes = children(demo.pid)
        demo.send_signal(number)
        assert demo.wait(DEADLINE_S) == 128 + number, (tmp_path / "demo.log").read_text()
        wait(lambda: not any(alive(pid) for pid in nodes), "the nodes' end")
    finally:
        demo.kill()


def module(folder: Path, name: str, text: str) -> dict[str, str]:
    (folder / f"{name}.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_nodes_end_when_one_of_them_cannot_be_started(tmp_path: Path) -> None:
    environment = module(tmp_path, "sleeper", FOREVER)
    pids = []

    def start() -> NodeProcess:
        made = NodeProcess("sleeper", environment, tmp_path / "a.log")
        pids.append(made.pid)
        return made

    with (
        pytest.raises(FileNotFoundError),
        running(start, lambda: NodeProcess("sleeper", environment, tmp_path / "missing" / "b.log")),
    ):
        pass
    assert pids and not alive(pids[0])


def test_signal_during_the_start_comes_after_it(tmp_path: Path) -> None:
    environment = module(tmp_path, "sleeper", FOREVER)
    pids = []

    def start() -> NodeProcess:
        signal.raise_signal(signal.SIGINT)
        made = NodeProcess("sleeper", environment, tmp_path / "a.log")
        pids.append(made.pid)
        return made

    with pytest.raises(KeyboardInterrupt), running(start):
        pass
    assert pids and not alive(pids[0])


def test_failure_has_the_code_and_the_last_lines(tmp_path: Path) -> None:
    environment = module(tmp_path, "broken", "raise SystemExit('no EGL device')")
    with running(lambda: NodeProcess("broken", environment, tmp_path / "broken.log")) as nodes:
        wait(lambda: first_failure(nodes) is not None, "the end")
        assert first_failure(nodes).startswith("broken ended with code 1")
        assert "no EGL device" in first_failure(nodes)


def test_a_finished_node_leaves_nothing_to_collect() -> None:
    """Objects that are tracked when ``main`` ends are not looked at again: their number is what the end would take."""
    program = "import gc; from omega_qvla_ros.nodes import process; process.finish(); print(len(gc.get_objects()))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert int(found.stdout) < 100

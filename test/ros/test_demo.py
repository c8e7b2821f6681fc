"""The demo as a user runs it: two processes, the shipped 4-bit policy, a video, a table, figures as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import imageio.v2 as imageio

from omega_qvla_ros.process_environment import free_domain_id, ros_environment

DEADLINE_S = 300.0


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omega_qvla_ros.demo", *arguments]
    environment = ros_environment(free_domain_id(salt=40))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_demo_writes_video_contact_sheet_and_figures(tmp_path):
    result = run_demo("--episodes", "2", "--policies", "tabletop_w4a4", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = json.loads((tmp_path / "demo.json").read_text())
    assert [episode["task"] for episode in run["episodes"]] == ["touch:red", "lift:red"]
    assert run["rejected_trajectories"] == 0
    assert run["diagnostics"]["quantization"] == "executable_w4a4"
    assert float(run["diagnostics"]["inference_p50_ms"]) > 0
    assert sum(1 for _ in imageio.get_reader(tmp_path / "demo.mp4")) > 10
    assert imageio.imread(tmp_path / "demo.png").ndim == 3
    assert "successes" in result.stdout and "inference p95" in result.stdout


def test_a_policy_that_is_not_there_is_one_line_and_an_exit_code(tmp_path):
    result = run_demo("--episodes", "1", "--policies", "no_such_policy", "--out", str(tmp_path))
    assert result.returncode == 1
    assert "no_such_policy" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr

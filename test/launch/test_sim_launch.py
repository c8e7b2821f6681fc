"""sim.launch.py for real: both nodes, the lifecycle transitions by launch events, until the arm has moved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("launch_testing.launch_test", reason="launch_testing comes with a ROS installation only")
pytest.importorskip("launch_ros.actions", reason="launch_ros comes with a ROS installation only")
ament_index = pytest.importorskip("ament_index_python", reason="ament_index_python is not installed")

from omega_qvla_core.runtime.random_policy import random_policy
from omega_qvla_ros.process_environment import free_domain_id, ros_environment


def test_sim_launch_moves_the_arm_with_a_random_policy(tmp_path):
    # The launch file itself sets the Fast DDS profile and MUJOCO_GL, which is part of what is tested.
    environment = ros_environment(free_domain_id(salt=5), profile=None, mujoco_gl=None, threads=1)
    environment["SIM_TEST_CHECKPOINT"] = str(tmp_path / "policy")
    if not any((Path(p) / "share" / "omega_qvla_ros").is_dir() for p in environment["AMENT_PREFIX_PATH"].split(":")):
        pytest.skip("omega_qvla_ros is not on AMENT_PREFIX_PATH")
    random_policy().save(tmp_path / "policy")
    result = subprocess.run(
        [sys.executable, "-m", "launch_testing.launch_test", str(Path(__file__).with_name("sim_bringup.py"))],
        check=False, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]

"""A few rows again with launch_testing, where launch is installed; the rows count by the tests over topics alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stage import patient_contract

from omega_qvla_ros.process_environment import free_domain_id, ros_environment

pytest.importorskip("launch_testing.launch_test", reason="launch_testing comes with a ROS installation only")
SUITE = Path(__file__).resolve().parents[1]
SALT = 40
TIMEOUT_S = 240


def run_row(row: str, checkpoint: Path, folder: Path) -> None:
    environment = ros_environment(free_domain_id(SALT + int(row)), threads=1)
    modules = [str(SUITE), str(SUITE.parent / "ros"), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "FAULT_ROW": row,
        "FAULT_CHECKPOINT": str(checkpoint),
        "FAULT_CONTRACT": str(patient_contract(folder)),
    }
    description = str(Path(__file__).with_name("fault_bringup.py"))
    result = subprocess.run(
        [sys.executable, "-m", "launch_testing.launch_test", description],
        check=False,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]


def test_fault_02_camera_that_stops_holds_in_a_launched_node(checkpoint: Path, tmp_path: Path) -> None:
    run_row("02", checkpoint, tmp_path)


def test_fault_44_launch_that_ends_the_node_gets_a_decelerating_hold(checkpoint: Path, tmp_path: Path) -> None:
    run_row("44", checkpoint, tmp_path)


def test_fault_45_killed_node_leaves_a_window_that_ends_at_rest_in_a_launch(checkpoint: Path, tmp_path: Path) -> None:
    run_row("45", checkpoint, tmp_path)

"""The soak itself for half a minute: simulator, unreliable policy, faults, figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from omega_qvla_ros.soak.report import SoakFigures


@pytest.mark.slow
def test_soak_of_half_a_minute_passes_and_leaves_its_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "omega_qvla_ros.soak",
        "--minutes",
        "0.5",
        "--burners",
        "1",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    figures = SoakFigures.read(tmp_path / "soak.json")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:] + str(figures.violations())
    assert figures.finished and figures.minutes >= 0.5
    assert sum(figures.faults.values()) >= 3 and figures.trajectories > 50 and len(figures.memory_samples) > 20
    assert figures.trajectories_rejected == 0 and figures.unguarded == {}
    assert "rejected by the controller" in result.stdout

"""``omega-qvla large``: quantize from disk, memory figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.observation_file import save_observations

RUNNER = CliRunner()


@pytest.fixture
def checkpoint(policy, tmp_path):
    policy.save(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.mark.parametrize("recipe", ["rtn", "rtn_whole"])
def test_quantize_writes_a_pack_that_runs(recipe, checkpoint, calibration_observations, tmp_path):
    out = tmp_path / "pack"
    result = RUNNER.invoke(app, ["large", "quantize", checkpoint, "--out", str(out), "--recipe", recipe])
    assert result.exit_code == 0, result.output
    assert "peak" in result.output and "GiB" in result.output
    loaded = Policy.load(out)
    assert loaded.spec.quantization == recipe
    assert np.isfinite(loaded.infer(calibration_observations[0]).actions).all()


def test_a_fitted_recipe_takes_observations_from_a_file(checkpoint, calibration_observations, tmp_path):
    seen, out = tmp_path / "seen.safetensors", tmp_path / "pack"
    save_observations(seen, calibration_observations, [str(number) for number in range(8)])
    arguments = ["large", "quantize", checkpoint, "--out", str(out), "--recipe", "executable_w4a4"]
    result = RUNNER.invoke(app, [*arguments, "--calibration", str(seen)])
    assert result.exit_code == 0, result.output
    loaded = Policy.load(out)
    assert loaded.spec.quantization == "executable_w4a4"
    assert np.isfinite(loaded.infer(calibration_observations[0]).actions).all()
    missing = RUNNER.invoke(app, [*arguments, "--calibration", str(tmp_path / "missing.safetensors")])
    assert missing.exit_code == 1 and "missing.safetensors" in missing.output and "Traceback" not in missing.output


def test_a_recipe_that_needs_calibration_is_one_line(checkpoint, tmp_path):
    arguments = ["large", "quantize", checkpoint, "--out", str(tmp_path / "pack"), "--recipe", "executable_w4a4"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1 and "error:" in result.output and "Traceback" not in result.output


def test_memory_prints_the_figures_and_the_file_beside_them():
    result = RUNNER.invoke(app, ["large", "memory", "tabletop_w4a4", "--json"])
    rows = json.loads(result.output)
    assert {"Pi 0.5", "GR00T N1.5", "tabletop"} == {row["model"] for row in rows}
    pack = next(row for row in rows if row["file_bytes"] is not None)
    assert 0 < pack["file_bytes"] - pack["stored_bytes"] < 64 * 1024
    assert RUNNER.invoke(app, ["large", "memory"]).exit_code == 0


def test_memory_of_a_folder_without_a_pack_is_one_line(checkpoint):
    result = RUNNER.invoke(app, ["large", "memory", checkpoint])
    assert result.exit_code == 1 and "error:" in result.output and "Traceback" not in result.output

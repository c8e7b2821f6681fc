"""The report on disk, and what it measures of actions and channels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from omega_qvla_core.cli import app
from omega_qvla_core.quant import AutoChoice, Recipe, load_pack, quantize_policy, report, save_pack, write_report
from omega_qvla_core.quant.action_error import compare_actions
from omega_qvla_core.quant.profile import CURVE_POINTS
from omega_qvla_core.runtime.observation_file import save_observations

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = {"errors.png", "bytes.png", "channel_energies.png", "activation_ranges.png"}


def test_everything_is_written(executable, tmp_path):
    paths = write_report(executable[1], tmp_path / "new" / "folder")
    assert {path.name for path in paths} == {"report.json", "report.md"} | PICTURES
    for path in paths[2:]:
        assert path.read_bytes().startswith(PNG)
    data = json.loads(paths[0].read_text())
    assert len(data["sites"]) == len(data["profiles"]) == 16
    assert {"relative", "median", "gripper_flips", "jerk", "jerk_change"} <= set(data["actions"])
    text = paths[1].read_text()
    for part in ("Error per denoise step", "weight_scales", "Jerk", "![errors](errors.png)"):
        assert part in text


def test_a_loaded_pack_has_a_report_without_profiles(executable, tmp_path):
    save_pack(executable[0], tmp_path / "pack")
    paths = write_report(report(load_pack(tmp_path / "pack")), tmp_path)
    assert {path.name for path in paths} == {"report.json", "report.md", "errors.png", "bytes.png"}


def test_nothing_quantized_has_a_report_without_pictures(policy, calibration_observations, tmp_path):
    _, result = quantize_policy(policy, Recipe.preset("fp16"), calibration_observations)
    assert [path.name for path in write_report(result, tmp_path)] == ["report.json", "report.md"]


def test_decisions_are_in_the_report_and_in_the_pack(policy, calibration_observations, tmp_path):
    auto = AutoChoice(smoothings=(0.5,), permutations=("none",), clips=("output",), byte_budget=0.6)
    recipe = replace(Recipe.preset("auto_w4a4"), auto=auto)
    quantized, result = quantize_policy(policy, recipe, calibration_observations)
    assert result.quantized_bytes <= 0.6 * result.fp16_bytes
    assert all(site.decision["taken"]["error"] > 0 for site in result.sites)
    save_pack(quantized, tmp_path / "pack")
    assert report(load_pack(tmp_path / "pack")).sites == result.sites
    write_report(result, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Decisions of the automatic choice" in text and "svd_hadamard" in (tmp_path / "report.json").read_text()


def test_rotation_evens_out_the_channels(executable):
    for profile in executable[1].profiles.values():
        for kind in ("activations_before", "activations_after", "weights_before", "weights_after"):
            curve = getattr(profile, kind)
            assert len(curve) == CURVE_POINTS and list(curve) == sorted(curve, reverse=True)
        assert all(0 < high <= top for high, top in zip(profile.q999, profile.largest))
    steps = {len(profile.largest) for profile in executable[1].profiles.values()}
    assert steps == {1, 4}


def test_gripper_flips_count_commands_on_the_other_side():
    theirs = torch.zeros(2, 4, 3)
    theirs[:, 2:, 1] = 1.0
    ours = theirs.clone()
    ours[0, 2, 1] = 0.4
    ours[:, :, 0] = 5.0
    assert compare_actions(ours, theirs, ("joint", "gripper")).gripper_flips == pytest.approx(1 / 8)
    assert compare_actions(ours, theirs, ("joint", "tool")).gripper_flips is None
    assert compare_actions(ours, torch.zeros(2, 4, 3), ("joint", "gripper")).gripper_flips is None


def test_jerk_is_the_third_difference():
    step = torch.arange(6.0)[None, :, None]
    cubic, straight = step**3, step * 2
    assert compare_actions(cubic, cubic).jerk == pytest.approx(6.0)
    assert compare_actions(straight, cubic).jerk_change == pytest.approx(-1.0)
    assert compare_actions(cubic, straight).jerk_change is None
    padded = torch.cat((straight, cubic), dim=2)
    assert compare_actions(padded, padded, ("joint",)).jerk == pytest.approx(0.0, abs=1e-5)
    assert compare_actions(cubic[:, :3], cubic[:, :3]).jerk is None


def test_the_command_writes_pack_and_report(policy, calibration_observations, tmp_path):
    policy.save(tmp_path / "policy")
    save_observations(tmp_path / "observations.safetensors", calibration_observations, ["test"] * 8)
    arguments = ["quantize", tmp_path / "policy", "--recipe", "rtn_static_absmax"]
    arguments += ["--calibration", tmp_path / "observations.safetensors", "--out", tmp_path / "pack"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--report", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md"} | PICTURES
    assert load_pack(tmp_path / "pack").spec.quantization == "rtn_static_absmax"
    assert not (tmp_path / "pack" / "report.json").exists()


def test_a_byte_budget_needs_a_recipe_that_chooses(tmp_path, capfd):
    arguments = ["quantize", "tabletop", "--out", str(tmp_path / "pack"), "--byte-budget", "0.3"]
    result = CliRunner().invoke(app, arguments)
    text = result.output + capfd.readouterr().err
    assert result.exit_code == 1 and "auto_w4a4" in text and "Traceback" not in text
    assert not (tmp_path / "pack").exists()

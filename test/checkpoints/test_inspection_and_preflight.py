"""Inspection and preflight: what they find, and what each failure says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foundation_folders import GOLDEN, change_json, change_tensors
from typer.testing import CliRunner

from omega_qvla_core.checkpoints.inspection import UNUSED, inspect_checkpoint, part_sizes, scoped_linears
from omega_qvla_core.checkpoints.preflight import PreflightReport, RobotRequirements, preflight, read_requirements
from omega_qvla_core.checkpoints.weight_files import StoredTensor, WeightFiles
from omega_qvla_core.cli import app
from omega_qvla_core.commands.inspect import predicted_bytes, to_json
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import quantize_policy, save_pack
from omega_qvla_core.quant.presets import PRESETS
from omega_qvla_core.quant.report import in_scope_bytes
from omega_qvla_core.runtime.random_policy import random_policy

JOINTS = ("shoulder", "elbow", "gripper")
ROBOT = RobotRequirements("lab", ("front", "wrist"), JOINTS, JOINTS, 20.0, 4)
STATS = "assets/lab/robot/norm_stats.json"

CONTRACT = """
format_version: 1
name: lab
control_rate_hz: 20.0
cameras:
  - {key: front, topic: front/image_raw}
  - {key: wrist, topic: wrist/image_raw}
joints:
  - {name: shoulder, position_min: -1, position_max: 1, max_velocity: 1, max_acceleration: 1}
  - {name: joint_2, state_name: elbow, action_name: elbow, position_min: -1, position_max: 1, max_velocity: 1}
  - {name: gripper, position_min: -1, position_max: 1, max_velocity: 1, max_acceleration: 1}
chunk: {execution_horizon_steps: 3}
"""


def headers(keys: dict[str, list[int]]) -> WeightFiles:
    path = Path("model.safetensors")
    return WeightFiles(path, (path,), {name: StoredTensor(path, "BF16", tuple(shape)) for name, shape in keys.items()})


def failed(report: PreflightReport, check: str) -> str:
    """Finding and remedy of the one failed row of that name."""
    assert not report.passed
    row = next(row for row in report.failures if row.check == check)
    assert row.remedy
    return f"{row.found} | {row.expected} | {row.remedy}"


@pytest.mark.parametrize("layout", ["openpi", "lerobot", "nvidia"])
def test_good_folders_pass_every_check(pristine, layout):
    report = preflight(pristine[layout], ROBOT)
    assert report.passed, report.failures
    report.require()
    checks = {row.check for row in report.rows}
    assert {"files and layout", "tensors", "state normalization", "action normalization", "tokenizer"} <= checks
    assert {"cameras", "state entries", "action entries", "action mode", "control rate", "horizon"} <= checks
    assert ("embodiment" in checks) == (layout == "nvidia")
    tensors = next(row for row in report.rows if row.check == "tensors")
    assert tensors.found.endswith("(100.0%)")


def test_our_own_folders_and_packs_pass_too(tmp_path):
    policy = random_policy(0)
    policy.save(tmp_path / "plain")
    observation = Observation(
        {key: torch.zeros(56, 56, 3, dtype=torch.uint8).numpy() for key in ("front", "wrist")},
        policy.description.stats.state.centre,
        "lift the green cube",
    )
    quantized, _ = quantize_policy(policy, PRESETS["rtn_static_absmax"], [observation] * 8)
    save_pack(quantized, tmp_path / "pack")
    names = policy.spec.state_names
    robot = RobotRequirements("tabletop", ("front", "wrist"), names, names, 20.0, 4)
    for folder in ("plain", "pack"):
        assert preflight(tmp_path / folder, robot).passed
    (tmp_path / "pack" / "pack.safetensors").write_bytes(b"PK")
    assert "holds a pickle" in failed(preflight(tmp_path / "pack", robot), "files and layout")
    found = inspect_checkpoint(tmp_path / "plain")
    assert (found.layout, found.family, len(found.linears)) == ("omega_qvla", "pi05", 28)


@pytest.mark.parametrize(
    ("changes", "check", "parts"),
    [
        ({"cameras": ("front", "side")}, "cameras", ["front, wrist", "front, side", "'wrist'"]),
        ({"state_names": ("shoulder", "elbow")}, "state entries", ["3: shoulder, elbow, gripper", "state_name"]),
        ({"action_names": ("shoulder", "elbo", "gripper")}, "action entries", ["'elbow'", "nearest: 'elbo'"]),
        ({"control_hz": 30.0}, "control rate", ["20 Hz", "30 Hz", "control_rate_hz"]),
        ({"execution_horizon_steps": 50}, "horizon", ["10 steps", "execution_horizon_steps"]),
    ],
)
def test_what_does_not_fit_the_robot(pristine, changes, check, parts):
    message = failed(preflight(pristine["openpi"], replace(ROBOT, **changes)), check)
    assert all(part in message for part in parts), message


def test_velocities_are_no_position_targets(copy_of):
    folder = copy_of("openpi")
    modes = ["velocity", "relative", "absolute"]
    change_json(folder / "omega_qvla.json", lambda data: data["robot"].update(action_modes=modes))
    message = failed(preflight(folder, ROBOT), "files and layout")
    assert "'shoulder' is velocity, but bears the name of a measured entry" in message
    names = ["shoulder_velocity", "elbow_relative", "gripper"]
    change_json(folder / "omega_qvla.json", lambda data: data["robot"].update(action_names=names))
    robot = replace(ROBOT, action_names=tuple(names))
    assert "shoulder_velocity is no position target" in failed(preflight(folder, robot), "action mode")
    assert preflight(folder, replace(robot, position_targets=False)).passed


def test_missing_tensors_are_counted_and_named(copy_of):
    folder = copy_of("openpi")
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("time_mlp_in.bias"))
    message = failed(preflight(folder, ROBOT), "tensors")
    assert "99." in message and "time_mlp_in.bias" in message


@pytest.mark.parametrize(
    ("layout", "file", "change", "check", "part"),
    [
        (
            "openpi",
            STATS,
            lambda data: data["norm_stats"]["state"].update(q99=[-1.0] * 8),
            "state normalization",
            "degenerate: shoulder, elbow, gripper",
        ),
        (
            "openpi",
            STATS,
            lambda data: data["norm_stats"].pop("actions"),
            "normalization",
            "norm_stats.actions is missing",
        ),
        (
            "nvidia",
            "experiment_cfg/metadata.json",
            lambda data: data["tiny"]["statistics"]["state"]["gripper"].update(min=[3.0]),
            "state normalization",
            "degenerate: gripper",
        ),
        (
            "nvidia",
            "experiment_cfg/metadata.json",
            lambda data: data.pop("tiny"),
            "normalization",
            "no embodiment 'tiny'",
        ),
    ],
)
def test_statistics(copy_of, layout, file, change, check, part):
    folder = copy_of(layout)
    change_json(folder / file, change)
    assert part in failed(preflight(folder, ROBOT), check)


def test_one_failure_does_not_hide_the_others(copy_of):
    folder = copy_of("openpi")
    (folder / "tokenizer.json").unlink()
    (folder / "assets" / "lab" / "robot" / "norm_stats.json").unlink()
    report = preflight(folder, ROBOT)
    failed(report, "tokenizer")
    failed(report, "normalization")
    with pytest.raises(ConfigError, match=r"^preflight: .*and \d+ more"):
        report.require()


def test_nothing_is_checked_is_not_passed():
    assert not PreflightReport(()).passed


def test_the_contract_is_read(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(CONTRACT)
    assert read_requirements(path) == replace(ROBOT, execution_horizon_steps=3)
    for text, message in (
        ("[", "not valid YAML"),
        ("- 1", "must be a mapping"),
        (CONTRACT.replace("key: wrist", "name: wrist"), r"cameras\[1\].key is missing"),
        (CONTRACT.replace("20.0", "-1"), "control_rate_hz is -1"),
        (CONTRACT.replace("steps: 3", "steps: 0"), "execution_horizon_steps is 0"),
        (CONTRACT.replace("joints:", "arms:"), "joints is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_requirements(path)


def test_the_commands(pristine, tmp_path):
    contract = tmp_path / "lab.yaml"
    contract.write_text(CONTRACT)
    arguments = ["check", "preflight", str(pristine["nvidia"]), "--contract", str(contract)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    contract.write_text(CONTRACT.replace("20.0", "30.0"))
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [row["check"] for row in report["rows"] if not row["ok"]] == ["control rate"]
    for layout, folder in pristine.items():
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["layout"] == layout and found["cameras"] == ["front", "wrist"]
        assert CliRunner().invoke(app, ["inspect", str(folder)]).exit_code == 0
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 1


def test_full_size_gr00t():
    keys = json.loads((GOLDEN / "gr00t" / "full_keys.json").read_text())
    linears = scoped_linears(headers(keys["keys"]), "gr00t_n15")
    assert len(linears) == 180
    assert sum(one.side == "language" for one in linears) == 84
    assert sum(one.out_features * one.in_features for one in linears) == 1_069_547_520
    parts = part_sizes(headers(keys["keys"]), "gr00t_n15")
    stated = keys["parameters_by_part"]
    assert parts["diffusion transformer"].parameters == stated["action_head.model"]
    assert parts["language tower"].parameters == 604032000 + 2048
    assert parts[UNUSED].parameters == 15238352 + stated["total_with_untied_lm_head"] - stated["total"]
    assert sum(part.parameters for part in parts.values()) == stated["total_with_untied_lm_head"]


def test_full_size_pi05():
    from omega_qvla_core.checkpoints.families import build_model
    from omega_qvla_core.evaluate.bench_presets import preset

    with torch.device("meta"):
        state = build_model(preset("pi05", "full")).state_dict()
    linears = scoped_linears(headers({name: list(value.shape) for name, value in state.items()}), "pi05")
    assert len(linears) == 252
    assert sum(one.out_features * one.in_features for one in linears) == 2_293_235_712
    # METHOD A.11: codes 1093.5 MiB, float16 scale per 64 of them 68.3 MiB, and small tables.
    codes_and_scales = 2_293_235_712 // 2 + 2_293_235_712 // 64 * 2
    assert 0 < predicted_bytes(linears, PRESETS["executable_w4a4"], 10) - codes_and_scales < 4e6
    assert predicted_bytes(linears, PRESETS["fp16"], 10) == 2 * 2_293_235_712


@pytest.mark.parametrize("recipe", ["executable_w4a4", "paper_w4a4", "w8a8", "rtn_static_absmax"])
def test_predicted_bytes_are_those_of_a_quantized_policy(recipe, tmp_path):
    policy = random_policy(0)
    policy.save(tmp_path / "plain")
    found = inspect_checkpoint(tmp_path / "plain")
    observation = policy.description.blank_observation()
    quantized, _ = quantize_policy(policy, PRESETS[recipe], [observation] * 8)
    assert to_json(found)["predicted_bytes"][recipe] == in_scope_bytes(quantized)


def test_inspection_needs_no_robot_and_says_so(copy_of):
    folder = copy_of("lerobot")
    change_json(folder / "omega_qvla.json", lambda data: data.pop("robot"))
    found = inspect_checkpoint(folder)
    assert found.cameras == (
        "observation.images.front",
        "observation.images.empty_camera_0",
        "observation.images.wrist",
    )
    assert "does not say which robot" in found.notes[0]

"""Replay: the same policy repeats its chunks exactly, another one differs, and the figures are those of the arrays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bag_fixtures import episode, write_bag
from robot_fixtures import CONTRACT, PERIOD_NS, T0, toy_contract, toy_spec
from typer.testing import CliRunner

from omega_qvla_core.errors import ConfigError, RecordingError
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.policy_types import ActionChunk, Observation
from omega_qvla_ros import msgs
from omega_qvla_ros.bags.playback import Playback
from omega_qvla_ros.bags.reader import Bag
from omega_qvla_ros.bags.replay import ReplayOptions, differences, replay
from omega_qvla_ros.bags.replay_report import ReplayReport
from omega_qvla_ros.cli import app
from omega_qvla_ros.trace import ChunkRecord, Trace, TraceHeader, rows
from omega_qvla_ros.trajectory import JointTrajectory, TrajectoryPoint

STEPS = 8


class ToyPolicy:
    """Plans from the state, the pictures and the noise, so that any difference in them shows."""

    def __init__(self, offset: float = 0.0, **changes: Any) -> None:
        self.spec = toy_spec(**changes)
        self.offset = offset
        self.seeds: list[int] = []

    def infer(self, observation: Observation, noise: np.ndarray | None = None, seed: int = 0) -> ActionChunk:
        self.seeds.append(seed)
        brightness = sum(float(image.mean()) for image in observation.images.values()) * 1e-6
        drawn = np.random.default_rng(seed).standard_normal((STEPS, 2)) * 1e-3
        return ActionChunk(observation.state + brightness + drawn + self.offset, 0.05, 0.05)


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """20 periods; the commands hold the shoulder at 0.5 and the finger at 0.03 for all of them."""
    points = tuple(TrajectoryPoint(np.array([0.03, 0.5]), k * 10**9, np.zeros(2)) for k in range(3))
    message = msgs.trajectory_to_msg(JointTrajectory(("finger", "shoulder"), T0, points))
    return write_bag(tmp_path / "bag", [*episode(20), ("/joint_trajectory", T0 + 10**9, message)])


def run(bag: Path, policy: ToyPolicy, options: ReplayOptions | None = None, **more: Any):
    with Bag(bag) as opened:
        playback = Playback(opened, toy_contract(), policy.spec)
        return replay(playback, policy, options or ReplayOptions(), **more)


def test_it_plans_once_per_execution_horizon_with_the_seeds_of_a_run(bag: Path) -> None:
    policy = ToyPolicy()
    found = run(bag, policy, ReplayOptions(seed=3))
    assert [one.observation_ns for one in found] == [T0 + 4 * k * PERIOD_NS for k in range(5)]
    assert policy.seeds == [inference_seed(3, k) for k in range(5)]
    assert len(run(bag, policy, ReplayOptions(rate_hz=20.0))) == 20
    assert len(run(bag, policy, ReplayOptions(rate_hz=20.0, max_inferences=7))) == 7


def test_commands_and_another_policy_are_compared_joint_by_joint(bag: Path) -> None:
    found = run(bag, ToyPolicy(), other=ToyPolicy(offset=0.25))
    made = differences(found, steps=4)
    assert set(made) == {"commands", "policy"}
    # Equal noise: the difference is the offset and nothing else, in both joints.
    np.testing.assert_allclose(made["policy"].mean, 0.25)
    np.testing.assert_allclose(made["policy"].largest, 0.25)
    assert made["policy"].count == 5 * STEPS and made["commands"].count == 5 * 4
    # Contract order is shoulder, finger; the shoulder was recorded at 0.01 per period, the finger at 0.02.
    expected = np.mean([0.5 - 0.04 * k for k in range(5)])
    np.testing.assert_allclose(made["commands"].mean, [expected, 0.01], atol=2e-3)


def test_the_same_run_gives_the_chunks_of_its_trace_exactly(bag: Path) -> None:
    policy = ToyPolicy()
    planned = run(bag, policy, ReplayOptions(rate_hz=10.0, seed=5))
    header = TraceHeader("toy", ("shoulder", "finger"), "toy", "none", ("finger", "shoulder"), 0.05, 0.05)
    records = tuple(
        ChunkRecord(
            time_ns=one.observation_ns,
            sequence=k,
            epoch=0,
            task=0,
            instruction=one.instruction,
            observation_ns=one.observation_ns,
            image_stamps_ns={},
            positions=(0.01 * 2 * k, 0.02),  # as recorded in every second period
            noise_seed=one.seed,
            latency_s=0.0,
            age_s=0.0,
            outcome="placed",
            actions=rows(one.targets[:, ::-1]),
        )
        for k, one in enumerate(planned)
    )
    trace = Trace(Path("run.jsonl"), header, records)
    again = run(bag, ToyPolicy(), trace=trace)
    assert len(again) == len(planned)
    difference = differences(again, 4)["trace"]
    np.testing.assert_array_equal(difference.largest, 0.0)
    other_run = replace(trace, records=tuple(replace(r, observation_ns=r.observation_ns + 1) for r in records))
    with pytest.raises(RecordingError, match="no moment to plan at that is in the trace run.jsonl; .*same run"):
        run(bag, ToyPolicy(), trace=other_run)


def test_policies_for_other_robots_are_refused(bag: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be compared .* horizon is 4, not 8"):
        run(bag, ToyPolicy(), other=ToyPolicy(horizon=4))
    with pytest.raises(ConfigError, match="must be positive"):
        ReplayOptions(rate_hz=-1.0)


def test_report_has_a_row_per_joint_and_a_picture(bag: Path, tmp_path: Path) -> None:
    found = run(bag, ToyPolicy(), other=ToyPolicy(offset=0.25))
    report = ReplayReport("bag", toy_contract(), "toy (none)", "toy (w4a4)", found, 0.05, 0.05)
    report.write(tmp_path / "out")
    text = (tmp_path / "out" / "replay.md").read_text()
    assert "## Against toy (w4a4)" in text and "| shoulder | rad | 0.25000 | 0.25000 | 0.25000 |" in text
    data = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert data["inferences"] == 5 and data["differences"]["policy"]["joints"]["finger"]["unit"] == "m"
    assert "\n5 inferences.\n" in text and data["traced_inferences"] is None
    assert "\n5 inferences of the 9 in the trace.\n" in replace(report, traced=9).to_markdown()
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_bag_without_commands_has_nothing_to_compare_with(tmp_path: Path) -> None:
    found = run(write_bag(tmp_path / "bag", episode(6)), ToyPolicy())
    assert differences(found, 4) == {}
    report = ReplayReport("bag", toy_contract(), "toy (none)", "", found, 0.05, 0.05)
    assert "Nothing to compare with" in report.to_markdown()


runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bag", "{tmp}/gone"], "does not exist"),
        (["repair", "{tmp}"], "is no bag"),
        (["trace", "{tmp}/gone"], "does not exist"),
        (["contract", "check", "{tmp}/gone.yaml"], "shipped robot"),
        (["contract", "check", "tabletop", "--urdf", "{tmp}/gone.urdf"], "cannot be read as a URDF"),
        (["contract", "check", "{tmp}/toy.yaml", "--checkpoint", "tabletop"], "differ"),
        (
            ["replay", "{tmp}/gone", "--contract", "{tmp}/toy.yaml", "--checkpoint", "nobody", "--out", "{tmp}/o"],
            "nobody",
        ),
        (
            ["calibration", "{tmp}/gone", "--contract", "tabletop", "--checkpoint", "tabletop", "--out", "{tmp}/o"],
            "does not exist",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str, tmp_path: Path, capfd) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONTRACT), encoding="utf-8")
    result = runner.invoke(app, [argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    error = result.output + capfd.readouterr().err
    assert result.exit_code == 1 and "error:" in error and named in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_bag_and_contract_are_shown(bag: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["bag", str(bag)])
    assert result.exit_code == 0 and "/front/image_raw" in result.output and "20" in result.output
    result = runner.invoke(app, ["contract", "check", "tabletop", "--checkpoint", "tabletop_w4a4"])
    assert result.exit_code == 0 and "fits 'tabletop'" in result.output
    for columns, arguments in (("50", ["bag", str(bag)]), ("80", ["contract", "check", "ur5e"])):
        assert "…" not in runner.invoke(app, arguments, env={"COLUMNS": columns}).output
    (bag / "metadata.yaml").unlink()
    (bag / "bag.mcap").write_bytes((bag / "bag.mcap").read_bytes()[:-3])
    result = runner.invoke(app, ["repair", str(bag)])
    assert result.exit_code == 0 and "mended, " in result.output and "reindex" in result.output
    assert "was whole, " in runner.invoke(app, ["repair", str(bag)]).output
    assert runner.invoke(app, ["bag", str(bag)]).exit_code == 0

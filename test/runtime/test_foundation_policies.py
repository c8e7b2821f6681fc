"""Policy on public checkpoint folders: the same calls as on our own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla_core.errors import CheckpointError, ConfigError, InstructionError, ObservationError
from omega_qvla_core.processing.robot_setup import RobotSetup
from omega_qvla_core.runtime import Observation, Policy

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from foundation_folders import BUILDERS, change_json

LAYOUTS = list(BUILDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    return {layout: build(base / layout) for layout, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def policies(folders) -> dict[str, Policy]:
    return {layout: Policy.load(folder) for layout, folder in folders.items()}


def observation(seed: int = 0, instruction: str = "lift the red cube") -> Observation:
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for key in ("front", "wrist")}
    return Observation(images, rng.uniform(-0.5, 0.5, 3), instruction)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_spec_says_what_the_robot_must_have(policies, layout):
    spec = policies[layout].spec
    assert [camera.key for camera in spec.cameras] == ["front", "wrist"]
    assert spec.state_names == spec.action_names == ("shoulder", "elbow", "gripper")
    assert (spec.family, spec.horizon) == (("gr00t_n15", 8) if layout == "nvidia" else ("pi05", 10))
    # openpi's default, LeRobot's num_inference_steps, NVIDIA's num_inference_timesteps.
    assert spec.num_steps == {"openpi": 10, "lerobot": 5, "nvidia": 4}[layout]
    assert (spec.control_hz, spec.first_action_delay_s) == (20.0, 0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chunk_is_what_the_model_makes_of_the_processors_tensors(policies, layout):
    policy, seen = policies[layout], observation()
    noise = policy.noise(1, [3])
    chunk = policy.infer(seen, noise=noise[0].numpy())
    np.testing.assert_array_equal(chunk.actions, policy.infer(seen, seed=3).actions)
    with torch.inference_mode():
        prefix = policy.processor.prepare([seen]).embed(policy.model)
        predicted = policy.model.sample_actions(prefix, noise, policy.spec.num_steps).numpy()[0, :, :3]
    scaled = policy.description.actions.unnormalize(predicted).astype(np.float64)
    wanted = scaled + seen.state * [1, 1, 0]
    # The policy runs through an engine where there is one, which sums in another order.
    np.testing.assert_allclose(chunk.actions, wanted, rtol=0, atol=1e-5)
    assert policy.warm_up() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_is_seen_and_told_counts(policies, layout):
    policy, base = policies[layout], observation()
    plan = policy.infer(base).actions
    other_image = replace(base, images={**base.images, "wrist": 255 - base.images["wrist"]})
    moved = replace(base, state=base.state + 0.3)
    for changed in (other_image, replace(base, instruction="lift the cube"), moved):
        assert np.abs(policy.infer(changed).actions - plan).max() > 1e-3
    assert np.abs(policy.infer(base, seed=1).actions - plan).max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_equal_single_calls(policies, layout):
    """Prompts of one length: padding counts in GR00T N1.5, as in NVIDIA's own batches."""
    policy = policies[layout]
    seen = [observation(seed) for seed in range(3)]
    together = policy.infer_batch(seen, seeds=[4, 5, 6])
    for one, chunk, seed in zip(seen, together, (4, 5, 6)):
        np.testing.assert_allclose(chunk.actions, policy.infer(one, seed=seed).actions, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_checkpoint_comes_back_bit_for_bit(policies, layout, tmp_path):
    policies[layout].save(tmp_path / "own")
    again = Policy.load(tmp_path / "own")
    assert again.spec == policies[layout].spec
    np.testing.assert_array_equal(again.infer(observation()).actions, policies[layout].infer(observation()).actions)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "config.json",
        "model.safetensors",
        "norm_stats.json",
        "tokenizer.json",
    ]
    change_json(tmp_path / "own" / "config.json", lambda data: data["robot"].update(control_hz=-1.0))
    with pytest.raises(ConfigError, match=r"robot.control_hz is -1.0"):
        Policy.load(tmp_path / "own")
    change_json(tmp_path / "own" / "config.json", lambda data: data.update(family="pi0"))
    with pytest.raises(CheckpointError, match=r"config.json: family is 'pi0'"):
        Policy.load(tmp_path / "own")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_near_float32(folders, policies, layout):
    half = Policy.load(folders[layout], dtype="bfloat16")
    assert torch.bfloat16 in {value.dtype for value in half.model.parameters()}
    exact, near = (policy.infer(observation()).actions for policy in (policies[layout], half))
    assert 0 < np.abs(exact - near).max() < 0.05 * np.abs(exact).max()


def test_the_robot_and_the_tokenizer_can_be_given(folders, tmp_path):
    folder = folders["openpi"]
    setup = json.loads((folder / "omega_qvla.json").read_text())["robot"]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps({**setup, "control_hz": 10.0}))
    assert Policy.load(folder, robot=slower).spec.control_hz == 10.0
    assert Policy.load(folder, robot=RobotSetup.from_json({**setup, "num_steps": 7})).spec.num_steps == 7
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Policy.load(folder, tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="dtype 'int4' is not known"):
        Policy.load(folder, dtype="int4")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_observations_that_do_not_fit_are_refused(policies, layout):
    policy, good = policies[layout], observation()
    for bad, error, message in (
        (replace(good, images={"front": good.images["front"]}), ObservationError, "camera 'wrist' is missing"),
        (
            replace(good, images={key: value[:40, :50] for key, value in good.images.items()}),
            ObservationError,
            "40 x 50",
        ),
        (replace(good, images={key: value / 255 for key, value in good.images.items()}), ObservationError, "float64"),
        (replace(good, state=np.zeros(2)), ObservationError, r"shape \(2,\)"),
        (replace(good, state=np.array([0, np.inf, 0])), ObservationError, "elbow = inf"),
        (replace(good, instruction=""), InstructionError, "is empty"),
        (replace(good, instruction="lift the red cube " * 200), InstructionError, r"prompt has \d+ t"),
    ):
        with pytest.raises(error, match=message):
            policy.infer(bad)

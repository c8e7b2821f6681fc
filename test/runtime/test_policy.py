"""Policy: observation in, action chunk out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omega_qvla_core.checkpoints.description import PolicyDescription
from omega_qvla_core.errors import CheckpointError, ConfigError, ObservationError
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.runtime import Observation, Policy
from omega_qvla_core.runtime.random_policy import CONTROL_HZ, HORIZON, random_policy


def make_observation(seed: int = 0, instruction: str = "lift the green cube") -> Observation:
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for key in ("front", "wrist")}
    return Observation(images, np.append(rng.uniform(-1, 1, 6), 0.02), instruction)


def make_keypoint_policy() -> Policy:
    """The random policy with the other vision encoder, which reads the state."""
    base = random_policy(0).description
    config = replace(
        base.model,
        vision=KeypointConfig(image_size=32, stem_channels=(4, 8, 8), num_queries=2, key_dim=4, value_dim=4),
    )
    cameras = tuple(CameraSpec(camera.key, 32, 32) for camera in base.policy.cameras)
    description = PolicyDescription(
        "keypoint", config, replace(base.policy, cameras=cameras), base.stats, base.tokenizer
    )
    torch.manual_seed(0)
    return Policy(Pi05(config), description)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(0)


def test_a_chunk_has_the_shape_and_timing_that_the_spec_says(policy):
    chunk = policy.infer(make_observation())
    assert chunk.actions.shape == (policy.spec.horizon, len(policy.spec.action_names)) == (HORIZON, 7)
    assert chunk.actions.dtype == np.float64
    assert chunk.period_s == 1 / CONTROL_HZ
    assert chunk.first_action_delay_s == policy.spec.first_action_delay_s == 0.05
    assert policy.spec.quantization == "none"


def test_noise_and_seed_decide(policy):
    observation = make_observation()
    chunk = policy.infer(observation, seed=5)
    np.testing.assert_array_equal(chunk.actions, policy.infer(observation, seed=5).actions)
    assert (chunk.actions != policy.infer(observation, seed=6).actions).any()
    noise = policy.noise(1, [5])[0].numpy()
    np.testing.assert_array_equal(chunk.actions, policy.infer(observation, noise=noise, seed=99).actions)


def test_the_global_generator_is_neither_read_nor_moved(policy):
    before = torch.get_rng_state()
    policy.infer(make_observation())
    random_policy(3)
    assert torch.equal(before, torch.get_rng_state())


def test_images_words_and_state_have_an_effect(policy):
    observation = make_observation()
    deltas = policy.infer(observation).actions - observation.state
    darker = replace(observation, images={key: image // 2 for key, image in observation.images.items()})
    for changed in (darker, replace(observation, instruction="touch the red cube")):
        assert np.abs(policy.infer(changed).actions - observation.state - deltas).max() > 1e-6
    moved = replace(observation, state=observation.state + 0.1)
    np.testing.assert_allclose(policy.infer(moved).actions - moved.state, deltas, atol=1e-9)


def test_the_keypoint_encoder_gets_the_state():
    policy = make_keypoint_policy()
    observation = make_observation()
    moved = replace(observation, state=observation.state + 0.1)
    inputs = [policy.processor.prepare([item]) for item in (observation, moved)]
    tokens = [policy.model.embed_prefix(i.images, i.image_masks, i.tokens, i.token_mask, i.state) for i in inputs]
    assert not torch.equal(tokens[0].embeddings, tokens[1].embeddings)
    assert np.isfinite(policy.infer(observation).actions).all()


def test_a_batch_equals_its_rows(policy):
    observations = [make_observation(0), make_observation(1, "touch the red cube")]
    chunks = policy.infer_batch(observations, seeds=[3, 4])
    for chunk, observation, seed in zip(chunks, observations, (3, 4), strict=True):
        np.testing.assert_allclose(chunk.actions, policy.infer(observation, seed=seed).actions, atol=1e-6)
    defaults = policy.infer_batch(observations)
    np.testing.assert_allclose(defaults[1].actions, policy.infer(observations[1]).actions, atol=1e-6)


def test_noise_and_seeds_that_do_not_fit_are_refused(policy):
    with pytest.raises(ValueError, match="2 seeds for 1 observations"):
        policy.infer_batch([make_observation()], seeds=[1, 2])
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 7\)"):
        policy.infer(make_observation(), noise=np.zeros((3, 7)))
    with pytest.raises(ValueError, match="no observations"):
        policy.infer_batch([])


def test_the_random_policy_moves_the_arm_slowly():
    for seed in range(5):
        policy, observation = random_policy(seed), make_observation(seed)
        path = np.vstack([observation.state, policy.infer(observation, seed=seed).actions])
        speeds = np.abs(np.diff(path, axis=0)) * CONTROL_HZ
        assert speeds[:, :6].max() < 0.3
        assert speeds[:, 6].max() < 0.01
        assert (path[-1, :6] - path[0, :6]).min() > 0.05


def test_saved_policies_plan_the_same(policy, tmp_path):
    for index, made in enumerate((policy, make_keypoint_policy())):
        made.save(tmp_path / str(index))
        loaded = Policy.load(tmp_path / str(index))
        loaded.save(tmp_path / "again")
        again = Policy.load(str(tmp_path / "again"))
        assert loaded.spec == again.spec == made.spec
        observation = make_observation()
        # The first save rounds to bfloat16, the second has nothing to round.
        np.testing.assert_allclose(loaded.infer(observation).actions, made.infer(observation).actions, atol=1e-3)
        np.testing.assert_array_equal(loaded.infer(observation).actions, again.infer(observation).actions)


def test_warm_up_measures_and_refuses_damaged_weights():
    policy = random_policy(0)
    assert policy.warm_up() > 0
    with torch.no_grad():
        policy.model.action_out_proj.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        policy.warm_up()
    # At run time the guard of the robot refuses it; the policy hides nothing.
    assert np.isnan(policy.infer(make_observation()).actions[:, 0]).all()


def test_bad_input_does_not_reach_the_network(policy):
    with pytest.raises(ObservationError, match="joint_3 = nan"):
        state = make_observation().state.copy()
        state[2] = np.nan
        policy.infer(replace(make_observation(), state=state))


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="device 'tpu9' is not known"):
        random_policy(0, device="tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no CUDA GPU; use cpu"):
            random_policy(0, device="cuda")


def test_missing_checkpoints_are_an_error():
    with pytest.raises(CheckpointError, match="no checkpoint folder 'nowhere'; shipped names"):
        Policy.load("nowhere")

"""Observation -> tensors and predictions -> targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omega_qvla_core.errors import ConfigError, InstructionError, ObservationError
from omega_qvla_core.policy_types import CameraSpec, Observation
from omega_qvla_core.processing.image_tensors import image_tensor
from omega_qvla_core.processing.normalization import AxisStats, NormStats
from omega_qvla_core.processing.policy_config import PolicyConfig
from omega_qvla_core.processing.policy_processor import PolicyProcessor
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer

HORIZON = 3
CONFIG = PolicyConfig(
    cameras=(CameraSpec("front", 16, 16), CameraSpec("wrist", 16, 16)),
    state_names=("joint_a", "joint_b", "gripper"),
    action_names=("joint_b", "joint_a", "gripper"),
    action_modes=("delta", "delta", "absolute"),
    control_hz=20.0,
    first_action_delay_s=0.05,
    num_steps=4,
)
STATS = NormStats(
    AxisStats("min_max", np.array([-1.0, -2.0, 0.0]), np.array([1.0, 2.0, 0.04])),
    AxisStats(
        "min_max",
        np.array([-0.1, -0.2, 0.0]) * np.arange(1, 4)[:, None] - np.array([0, 0, 0.01]),
        np.array([0.1, 0.2, 0.04]) * np.arange(1, 4)[:, None],
    ),
)
TOKENIZER = WordTokenizer.from_texts(["lift the red cube"], state_bins=True)


def make_processor(config: PolicyConfig = CONFIG) -> PolicyProcessor:
    return PolicyProcessor(config, STATS, TOKENIZER, max_tokens=8, horizon=HORIZON)


def make_observation(size: int = 32, **changes) -> Observation:
    rng = np.random.default_rng(3)
    images = {key: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for key in ("front", "wrist")}
    observation = Observation(images, np.array([0.5, -1.0, 0.03]), "lift the red cube")
    return replace(observation, **changes)


def test_an_observation_becomes_tensors_in_network_order():
    observation = make_observation()
    inputs = make_processor().prepare([observation, make_observation(state=np.zeros(3))])
    assert [tuple(image.shape) for image in inputs.images] == [(2, 3, 16, 16)] * 2
    blocks = observation.images["wrist"].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    found = inputs.images[1][0].numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(found, blocks / 127.5 - 1, atol=0.51 / 127.5)
    np.testing.assert_allclose(inputs.state.numpy(), [[0.5, -0.5, 0.5], [0.0, 0.0, -1.0]], atol=1e-6)
    assert inputs.measured.dtype == np.float64
    assert all(mask.all() for mask in inputs.image_masks)
    assert inputs.tokens.shape == inputs.token_mask.shape == (2, 8)


def test_image_values_reach_both_ends_of_the_range():
    image = np.array([[[0, 127, 255]]], dtype=np.uint8)
    tensor = image_tensor(image)
    assert tensor.shape == (3, 1, 1)
    np.testing.assert_array_equal(
        tensor.numpy().ravel(), np.float32([0, 127, 255]) / np.float32(255) * np.float32(2) - np.float32(1)
    )


def test_extra_cameras_and_odd_memory_layouts_are_fine():
    observation = make_observation()
    images = {key: np.asfortranarray(image[::-1, ::-1]) for key, image in observation.images.items()}
    images["overview"] = np.zeros((4, 4, 3), np.uint8)
    plain = {key: np.ascontiguousarray(image) for key, image in images.items()}
    processor = make_processor()
    found = processor.prepare([replace(observation, images=images)]).images
    wanted = processor.prepare([replace(observation, images=plain)]).images
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


def test_deltas_start_at_the_measured_joint_of_the_same_name():
    processor = make_processor()
    measured = np.array([0.5, -1.0, 0.03])
    predicted = np.zeros((HORIZON, 5))
    predicted[:, :3] = [1.0, -1.0, 1.0]
    predicted[:, 3:] = 99.0
    targets = processor.targets(predicted, measured)
    np.testing.assert_allclose(targets[:, 0], -1.0 + 0.1 * np.arange(1, 4))
    np.testing.assert_allclose(targets[:, 1], 0.5 - 0.2 * np.arange(1, 4))
    np.testing.assert_allclose(targets[:, 2], 0.04 * np.arange(1, 4))


def test_normalize_actions_is_the_inverse_of_targets():
    processor, rng = make_processor(), np.random.default_rng(0)
    measured, predicted = rng.normal(size=(5, 3)), rng.normal(size=(5, HORIZON, 3))
    targets = processor.targets(predicted, measured)
    np.testing.assert_allclose(processor.normalize_actions(targets, measured), predicted, atol=1e-12)


def test_nan_in_predictions_is_not_hidden():
    predicted = np.zeros((HORIZON, 3))
    predicted[1, 2] = np.nan
    targets = make_processor().targets(predicted, np.zeros(3))
    assert np.isnan(targets[1, 2])
    assert np.isnan(targets).sum() == 1


def test_the_state_is_in_the_prompt_when_asked_for():
    processor = make_processor(replace(CONFIG, state_in_prompt=True))
    observation = make_observation(instruction="lift cube")
    inputs = processor.prepare([observation])
    words = [TOKENIZER.vocabulary[index] for index in inputs.tokens[0][inputs.token_mask[0]]]
    assert words == ["<bos>", "lift", "cube", "<s192>", "<s64>", "<s192>"]


FRONT = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"front": FRONT, "hand": FRONT}}, "needs front, wrist; there are front, hand"),
        ({"images": {}}, "the policy needs front, wrist; there are none"),
        ({"images": {"front": FRONT, "wrist": FRONT.astype(np.float32)}}, "camera 'wrist': image has dtype float32"),
        ({"images": {"front": FRONT[..., 0], "wrist": FRONT}}, "'front': image has dtype uint8 and shape (32, 32)"),
        ({"images": {"front": FRONT[:15, :15], "wrist": FRONT}}, "camera 'front': image is 15 x 15 pixels"),
        ({"images": {"front": FRONT[:24], "wrist": FRONT}}, "crop it to the same ratio"),
        ({"images": {"front": FRONT[:0], "wrist": FRONT}}, "camera 'front'"),
        ({"state": np.zeros(2)}, "the state has shape (2,); the policy needs 3 values: joint_a, joint_b, gripper"),
        ({"state": np.array([0, np.nan, np.inf])}, "not finite: joint_b = nan, gripper = inf"),
        ({"state": ["a", "b", "c"]}, "not an array of numbers"),
        ({"state": None}, "the state"),
    ],
)  # fmt: skip
def test_bad_observations_are_refused_by_name(changes, message):
    with pytest.raises(ObservationError) as caught:
        make_processor().prepare([make_observation(**changes)])
    assert message in str(caught.value)


@pytest.mark.parametrize("instruction", ["", None, 3, "lift the red cube " * 3, "grasp something"])
def test_bad_instructions_are_refused(instruction):
    with pytest.raises(InstructionError):
        make_processor().prepare([make_observation(instruction=instruction)])


def test_no_observation_is_a_programming_error():
    with pytest.raises(ValueError, match="no observations"):
        make_processor().prepare([])


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="needs \\(4, 3\\)"):
        PolicyProcessor(CONFIG, STATS, TOKENIZER, max_tokens=8, horizon=4)
    in_prompt = replace(CONFIG, state_in_prompt=True)
    with pytest.raises(ConfigError, match="no state bins"):
        PolicyProcessor(in_prompt, STATS, WordTokenizer.from_texts(["lift"]), 8, HORIZON)
    with pytest.raises(ConfigError, match="leave no room for words"):
        PolicyProcessor(in_prompt, STATS, TOKENIZER, 4, HORIZON)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_modes": ["delta", "delta"]}, "action_modes has 2 entries for 3 action_names"),
        ({"action_modes": ["delta", "delta", "relative"]}, "policy.action_modes[2] is 'relative'"),
        ({"action_names": ["joint_b", "joint_x", "gripper"]}, "'joint_x' is delta, but policy.state_names"),
        ({"state_names": ["joint_a", "joint_a", "joint_b"]}, "state_names lists 'joint_a' twice"),
        ({"cameras": []}, "policy.cameras is empty"),
        ({"cameras": [{"key": "front", "height": 0, "width": 4}]}, "'front' is 0 x 4 px"),
        ({"cameras": [{"key": "front", "height": 4}]}, "policy.cameras[0] lacks the key 'width'"),
        ({"control_hz": 0}, "control_hz 0.0 must be positive"),
        ({"control_hz": "20"}, "policy.control_hz is '20'; it must be of type float"),
        ({"num_steps": True}, "policy.num_steps is True; it must be of type int"),
        ({"state_names": "abc"}, "policy.state_names is 'abc'; it must be a list"),
        ({"statenames": []}, "unknown key 'statenames'; did you mean 'state_names'"),
    ],
)
def test_bad_policy_configs_are_refused_by_name(change, message):
    with pytest.raises(ConfigError) as caught:
        PolicyConfig.from_json({**CONFIG.to_json(), **change})
    assert message in str(caught.value)


def test_policy_config_survives_json():
    assert PolicyConfig.from_json(CONFIG.to_json()) == CONFIG

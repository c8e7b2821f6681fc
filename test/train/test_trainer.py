"""Training learns, resumes exactly, refuses another run's state, and exports what Policy loads."""

import dataclasses

import numpy as np
import pytest
import torch

from omega_qvla_core.envs.tabletop import JOINT_NAMES
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.runtime import Observation, Policy
from omega_qvla_core.train.config import TrainConfig, tabletop_model_config
from omega_qvla_core.train.dataset import Demonstrations
from omega_qvla_core.train.export import export_policy
from omega_qvla_core.train.trainer import Trainer, learning_rate_factor

CONFIG = TrainConfig(steps=6, batch=8, warmup_steps=1, log_every=2, save_every=3)


@pytest.fixture(scope="module")
def data(demos):
    return Demonstrations(demos, "cpu")


def trainer(data, folder, config=CONFIG):
    model = tabletop_model_config(len(data.tokenizer.vocabulary), data.max_tokens, 7, 7)
    return Trainer(data, model, config, folder, validation=data)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_an_interrupted_run_ends_in_the_same_weights_as_an_uninterrupted_one(data, tmp_path):
    whole = trainer(data, tmp_path / "whole")
    assert whole.run()
    first = trainer(data, tmp_path / "parts")
    assert not first.run(stop_after_s=0.0)  # stops after one step
    assert 0 < first.step < CONFIG.steps
    second = trainer(data, tmp_path / "parts")
    assert second.step == first.step
    assert second.run()
    assert torch.equal(weights(whole), weights(second))
    assert all(torch.equal(whole.ema[name], second.ema[name]) for name in whole.ema)


def test_loss_falls_and_progress_is_reported(data, tmp_path):
    config = dataclasses.replace(CONFIG, steps=20, batch=16, log_every=5, save_every=100)
    seen = []
    trainer(data, tmp_path, config).run(seen.append)
    assert [p.step for p in seen] == [5, 10, 15, 20]
    assert seen[-1].losses["flow"] < seen[0].losses["flow"]
    assert {"flow", "readout", "grounding", "cube_error_m"} <= seen[0].losses.keys()


def test_state_of_another_run_and_a_damaged_state_are_refused(data, tmp_path):
    trainer(data, tmp_path).run()
    with pytest.raises(CheckpointError, match=r"batch 8 -> 4"):
        trainer(data, tmp_path, dataclasses.replace(CONFIG, batch=4))
    state = tmp_path / "train_state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a training state"):
        trainer(data, tmp_path)


def test_exported_policy_plans_chunks_for_the_tabletop_arm(data, tmp_path):
    run = trainer(data, tmp_path / "run")
    export_policy(data, run.averaged_model().policy, tmp_path / "policy", "small")
    policy = Policy.load(tmp_path / "policy")
    assert policy.spec.state_names == JOINT_NAMES and policy.spec.horizon == 16
    images = {camera.key: np.zeros((128, 128, 3), np.uint8) for camera in policy.spec.cameras}
    chunk = policy.infer(Observation(images, np.zeros(7), "lift the red cube"))
    assert chunk.actions.shape == (16, 7) and np.isfinite(chunk.actions).all()
    assert chunk.first_action_delay_s == pytest.approx(0.05)


def test_schedule_warms_up_and_ends_at_zero():
    config = TrainConfig(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"batch": -1}, {"ema": 1.0}, {"counterfactual": 1.5}, {"steps": 5, "warmup_steps": 9}]
)
def test_impossible_settings_are_named(settings):
    with pytest.raises(ConfigError, match="train"):
        TrainConfig(**settings)

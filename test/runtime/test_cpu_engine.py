"""The CPU engine against the model that it runs; what only GR00T N1.5 has is in ``test_cpu_engine_gr00t``."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_policy import make_keypoint_policy

from omega_qvla_core.errors import EngineError, StepContextError
from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_quantize import quantize_randomly
from omega_qvla_core.evaluate.bench_shapes import BenchShape, model_inputs, shaped, start_noise
from omega_qvla_core.quant.linear import set_backend
from omega_qvla_core.runtime import Observation, Policy, random_policy
from omega_qvla_core.runtime.cpu_buffers import count_operators
from omega_qvla_core.runtime.cpu_engine import CpuEngine, build
from omega_qvla_core.runtime.engine import EngineShape
from omega_qvla_core.runtime.observation_file import load_observations

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from foundation_folders import nvidia_folder

CALIBRATION = Path(__file__).parents[2] / "omega_qvla_core/assets/calibration/tabletop.safetensors"
# Both compute in float32; the order of sums differs.
ROUNDING = 1e-5


def keypoint_policy():
    """With gates that are open: a new expert layer is the identity."""
    policy = make_keypoint_policy()
    torch.manual_seed(1)
    for block in policy.model.expert.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            torch.nn.init.normal_(norm.dense.bias)
    return policy


def eager(policy, inputs, noise, steps):
    with torch.inference_mode():
        return policy.model.sample_actions(inputs.embed(policy.model), noise, steps)


def observation_of(policy, seed=0, instruction="lift the green cube"):
    rng = np.random.default_rng(seed)
    # In the ratio of sides of the tiny GR00T's training videos, which its checkpoint names.
    ratio = (3, 4) if policy.spec.family == "gr00t_n15" else (1, 1)
    images = {
        camera.key: rng.integers(0, 256, (camera.height * ratio[0], camera.width * ratio[1], 3), dtype=np.uint8)
        for camera in policy.spec.cameras
    }
    return Observation(images, rng.uniform(-0.5, 0.5, len(policy.spec.state_names)), instruction)


def inputs_of(policy, seed=0, instruction="lift the green cube"):
    return policy.processor.prepare([observation_of(policy, seed, instruction)])


@pytest.fixture(scope="module", params=["siglip", "keypoint", "gr00t"])
def policy(request, tmp_path_factory):
    if request.param == "siglip":
        return random_policy.random_policy(0)
    if request.param == "keypoint":
        return keypoint_policy()
    return Policy.load(nvidia_folder(tmp_path_factory.mktemp("gr00t") / "tiny"))


def test_actions_are_those_of_the_model(policy):
    engine = CpuEngine(policy.model)
    # Prompts of several lengths, there and back, on the same buffers.
    for seed, instruction in enumerate(["lift the green cube", "touch the red cube", "lift the cube"] * 2):
        inputs, noise = inputs_of(policy, seed, instruction), policy.noise(1, [seed])
        for steps in (4, 1):
            got = engine.run(inputs, noise, steps)
            torch.testing.assert_close(got, eager(policy, inputs, noise, steps), rtol=0, atol=ROUNDING)


def test_the_shipped_policy_agrees_on_its_observations():
    policy = Policy.load("tabletop")
    engine = CpuEngine(policy.model)
    for index, observation in enumerate(list(load_observations(CALIBRATION).observations)[:12:3]):
        inputs, noise = policy.processor.prepare([observation]), policy.noise(1, [index])
        torch.testing.assert_close(engine.run(inputs, noise, 4), eager(policy, inputs, noise, 4), rtol=0, atol=ROUNDING)


def test_the_shipped_4_bit_policy_agrees_but_for_codes_on_an_edge():
    """A code between two values may fall the other way; the model does the same if its noise is rounded otherwise."""
    policy = Policy.load("tabletop_w4a4")
    engine = CpuEngine(policy.model)
    assert engine.precision == "w4a4"
    errors = []
    for index, observation in enumerate(list(load_observations(CALIBRATION).observations)[:30:3]):
        inputs, noise = policy.processor.prepare([observation]), policy.noise(1, [index])
        errors.append(float((engine.run(inputs, noise, 4) - eager(policy, inputs, noise, 4)).abs().max()))
    assert np.median(errors) <= ROUNDING
    assert max(errors) < 0.5


@pytest.mark.parametrize("family", ["pi05", "gr00t_n15"])
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a4", "w4a4_grouped"])
def test_every_precision_of_a_random_model_agrees(precision, family):
    shape = BenchShape(2, 9, 10, 2)
    config = shaped(preset(family, "tiny"), shape)
    model = quantize_randomly(random_model(config, "cpu", torch.float32), precision)
    inputs, noise = model_inputs(config, shape, "cpu"), start_noise(config)
    engine = CpuEngine(model)
    assert engine.precision == precision.removesuffix("_grouped")
    with torch.inference_mode():
        expected = model.sample_actions(inputs.embed(model), noise, 2)
    error = (engine.run(inputs, noise, 2) - expected).abs()
    assert float(error.median()) < 1e-2 * float(expected.abs().max())


def test_a_guide_corrects_every_step(policy):
    engine, steps = CpuEngine(policy.model), 4
    inputs, noise = inputs_of(policy), policy.noise(1)
    seen = []

    def still(x, u, tau):
        seen.append((x.clone(), tau))
        return torch.zeros_like(u)

    assert torch.equal(engine.run(inputs, noise, steps, still), noise)
    assert [tau for _, tau in seen] == [0.0, 0.25, 0.5, 0.75]
    free = engine.run(inputs, noise, steps)
    assert torch.equal(engine.run(inputs, noise, steps, lambda x, u, tau: u), free)
    # Velocities are given towards the data: an arrow of one for all of the time moves everything by one.
    moved = engine.run(inputs, noise, steps, lambda x, u, tau: torch.ones_like(u))
    torch.testing.assert_close(moved, noise + 1, rtol=0, atol=1e-6)

    def pull(x, u, tau):
        return u + 0.5 * (0.3 - x - (1 - tau) * u)

    with torch.inference_mode():
        expected = policy.model.sample_actions(inputs.embed(policy.model), noise, steps, pull)
    torch.testing.assert_close(engine.run(inputs, noise, steps, pull), expected, rtol=0, atol=ROUNDING)


def test_results_belong_to_the_caller(policy):
    engine = CpuEngine(policy.model)
    first = engine.run(inputs_of(policy, 0), policy.noise(1, [0]), 4)
    kept = first.clone()
    engine.run(inputs_of(policy, 1), policy.noise(1, [1]), 4)
    assert torch.equal(first, kept)


def test_changed_weights_are_read_again():
    policy = keypoint_policy()
    engine, inputs, noise = CpuEngine(policy.model), inputs_of(policy), policy.noise(1)
    before = engine.run(inputs, noise, 4)
    with torch.no_grad():
        policy.model.language_model.layers[0].mlp.gate_proj.weight.mul_(1.5)
        policy.model.expert.layers[1].self_attn.q_proj.weight.mul_(0.5)
    changed = engine.run(inputs, noise, 4)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, eager(policy, inputs, noise, 4), rtol=0, atol=ROUNDING)
    policy.model.expert.layers[0].self_attn.o_proj = copy.deepcopy(policy.model.expert.layers[1].self_attn.o_proj)
    replaced = engine.run(inputs, noise, 4)
    assert not torch.equal(replaced, changed)
    torch.testing.assert_close(replaced, eager(policy, inputs, noise, 4), rtol=0, atol=ROUNDING)


def test_threads_take_turns(policy):
    engine = CpuEngine(policy.model)
    cases = [(inputs_of(policy, seed, text), policy.noise(1, [seed])) for seed, text in enumerate(["lift", "lift the"])]
    expected = [engine.run(*case, 4) for case in cases]
    wrong = []

    def worker(case, wanted):
        wrong.extend(index for index in range(10) if not torch.equal(engine.run(*case, 4), wanted))

    threads = [threading.Thread(target=worker, args=pair) for pair in zip(cases, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stages_launches_and_memory(policy):
    engine = CpuEngine(policy.model)
    inputs, noise = inputs_of(policy), policy.noise(1)
    shape = engine.bucket(inputs, 4)
    # The prompt of GR00T N1.5 holds the tokens of its images too, and its folder names projector 3.
    tokens = int(inputs.token_mask.sum())
    assert shape == EngineShape(1, 2, tokens, 4, 0 if inputs.embodiment is None else 3)
    assert engine.memory_bytes() == 0
    for call in engine.stages(shape).values():
        call()
    assert set(engine.stages(shape)) == {"vision", "prefix", "denoise", "chunk"}
    assert engine.memory_bytes() > 0
    assert 0 < engine.launches(shape) < count_operators(lambda: eager(policy, inputs, noise, 4))


def test_what_the_engine_refuses_runs_on_the_model(policy, caplog):
    engine = policy.engine
    assert engine is not None and engine.name == "cpu"
    with pytest.raises(EngineError, match="batch is 2"):
        engine.bucket(policy.processor.prepare([observation_of(policy)] * 2), 4)
    with caplog.at_level(logging.WARNING):
        pair = policy.infer_batch([observation_of(policy)] * 2)
    assert "batch is 2" in caplog.text
    alone = policy.infer(observation_of(policy))
    np.testing.assert_allclose(pair[0].actions, alone.actions, atol=ROUNDING)
    handle = policy.model.register_forward_hook(lambda *values: None)
    with pytest.raises(EngineError, match="hooks"):
        engine.bucket(inputs_of(policy), 4)
    handle.remove()
    with pytest.raises(ValueError, match="noise has shape"):
        engine.run(inputs_of(policy), policy.noise(2), 4)


def test_another_model_in_its_place_gets_an_engine_of_its_own():
    policy = keypoint_policy()
    other, seen = copy.copy(policy), policy.description.blank_observation()
    before = policy.infer(seen).actions
    other.model = copy.deepcopy(policy.model)
    with torch.no_grad():
        other.model.action_out_proj.weight.mul_(2.0)
    assert not np.array_equal(other.infer(seen).actions, before)
    np.testing.assert_array_equal(policy.infer(seen).actions, before)
    assert other.engine is not policy.engine


def test_another_backend_is_computed_with_its_own_code():
    policy = Policy.load("tabletop_w4a4")
    engine, inputs, noise = CpuEngine(policy.model), inputs_of(policy, 0, "lift the green cube"), policy.noise(1)
    integer = engine.run(inputs, noise, 4)
    set_backend(policy.model, "reference")
    assert not torch.equal(engine.run(inputs, noise, 4), integer)
    torch.testing.assert_close(engine.run(inputs, noise, 4), eager(policy, inputs, noise, 4), rtol=0, atol=0.5)


def test_tables_of_another_number_of_steps_are_refused():
    policy = Policy.load("tabletop_w4a4")
    with pytest.raises(StepContextError, match="calibrated for 4 denoise steps but runs with 5"):
        CpuEngine(policy.model).run(inputs_of(policy, 0, "lift the green cube"), policy.noise(1), 5)


def test_models_that_it_has_no_plan_for():
    with pytest.raises(EngineError, match="no plan for Linear"):
        build(torch.nn.Linear(1, 1))
    for family in ("pi05", "gr00t_n15"):
        with pytest.raises(EngineError, match="bfloat16"):
            build(random_model(preset(family, "tiny"), "cpu", torch.bfloat16))

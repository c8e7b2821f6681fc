"""The CPU engine on GR00T N1.5, where it has what Pi 0.5 has not: embodiments, an adapter, cross-attention."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.strict_loading import load_model
from omega_qvla_core.checkpoints.weight_files import find_weights
from omega_qvla_core.errors import EngineError, QuantizationError, StepContextError
from omega_qvla_core.evaluate.bench_quantize import quantize_randomly
from omega_qvla_core.models.gr00t_config import StackConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.parity.fixture import read_fixture
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant import Recipe, quantize_policy
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.recipe import WholeRecipe
from omega_qvla_core.runtime import Observation, Policy
from omega_qvla_core.runtime.cpu_engine import CpuEngine

sys.path.extend(str(Path(__file__).parents[1] / area) for area in ("checkpoints", "models"))
from foundation_folders import nvidia_folder
from small_models import gr00t_config, gr00t_inputs, noise_for, randomised

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "gr00t"
# Both compute in float32; the order of sums differs.
ROUNDING = 1e-5


def small_inputs(embodiment=0, words=5, padding=0, seed=1) -> ModelInputs:
    one = gr00t_inputs(1, padding)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.cat((one["tokens"][:, :-5], torch.randint(1, 19, (1, words), generator=generator)), dim=1)
    mask = torch.arange(tokens.shape[1])[None] >= padding
    state = torch.randn(1, 9, generator=generator)
    return ModelInputs(one["images"], one["image_masks"], tokens, mask, state, np.zeros((1, 9)), (embodiment,))


def eager(model, inputs, noise, steps=4, guide=None):
    with torch.inference_mode():
        return model.sample_actions(inputs.embed(model), noise, steps, guide)


def assert_agrees(engine, inputs, steps=4):
    noise = noise_for(engine.model, 1)
    got = engine.run(inputs, noise, steps)
    torch.testing.assert_close(got, eager(engine.model, inputs, noise, steps), rtol=0, atol=ROUNDING)
    return got


def assert_some_agree(errors):
    """How many observations have a code on an edge depends on how the CPU rounds; a wrong engine agrees on none."""
    assert sorted(errors)[len(errors) // 4] <= ROUNDING


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(0, 256, (96, 128, 3), dtype=np.uint8) for key in ("front", "wrist")}
    return Observation(images, rng.normal(size=3) * 0.3, ("lift the red cube", "lift the cube")[seed % 2])


@pytest.fixture(scope="module")
def model() -> Gr00tN15:
    return randomised(Gr00tN15(gr00t_config()))


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    return Policy.load(nvidia_folder(tmp_path_factory.mktemp("gr00t") / "tiny"))


@pytest.fixture(scope="module", params=["executable_w4a4", "fast_w4a4", "paper_w4a4"])
def quantized(policy, request) -> Policy:
    return quantize_policy(policy, Recipe.preset(request.param), [observation(seed) for seed in range(8)])[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": None, "max_positions": 0, "interleave": False},
        {"project_features": False, "feature_width": 32, "adapter": StackConfig(1, 4, 8)},
        {"future_tokens": 0, "dit": StackConfig(3, 2, 8)},
        {"dit": StackConfig(1, 2, 8)},
        # Features as wide as keys and values together.
        {"adapter": None, "feature_width": 32, "dit": StackConfig(3, 2, 8)},
    ],
)
def test_every_kind_of_head_agrees(changes):
    assert_agrees(CpuEngine(randomised(Gr00tN15(gr00t_config(**changes)))), small_inputs(2))


@pytest.mark.parametrize("folder", ["tiny", "tiny_linear"])
def test_golden_models_agree(folder):
    fixture = read_fixture(GOLDEN / folder)
    model = load_model(
        lambda: build_model(fixture.config), find_weights(GOLDEN / folder), fixture.family, torch.float32
    )
    config, generator = fixture.config, torch.Generator().manual_seed(0)
    size, tokens = config.vision.image_size, torch.arange(1, 7 + config.vision.num_patches)[None]
    tokens[:, 2 : 2 + config.vision.num_patches] = config.language.image_token_id
    inputs = ModelInputs(
        [torch.rand(1, 3, size, size, generator=generator) * 2 - 1],
        [torch.ones(1, dtype=torch.bool)],
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.randn(1, config.state_dim, generator=generator),
        np.zeros((1, config.state_dim)),
        (1,),
    )
    assert_agrees(CpuEngine(model.eval()), inputs)


def test_lengths_embodiments_and_steps_have_plans_of_their_own(model):
    engine, found = CpuEngine(model), {}
    cases = [(embodiment, words, steps) for embodiment in (1, 3) for words in (2, 5) for steps in (1, 4)]
    # There and back, on the same buffers.
    for case in cases * 2:
        embodiment, words, steps = case
        got = assert_agrees(engine, small_inputs(embodiment, words), steps)
        assert torch.equal(found.setdefault(case, got), got)
    assert all((found[1, words, 4] - found[3, words, 4]).abs().max() > 1e-3 for words in (2, 5))


def test_guided_steps_agree(model):
    def guide(x, u, tau):
        return u + (1.0 - tau) * 0.1 * x

    inputs, noise = small_inputs(1), noise_for(model, 1)
    got = CpuEngine(model).run(inputs, noise, 4, guide)
    torch.testing.assert_close(got, eager(model, inputs, noise, 4, guide), rtol=0, atol=ROUNDING)
    assert (got - eager(model, inputs, noise)).abs().max() > 1e-3


def test_plans_are_forgotten_but_read_weights_are_not(model):
    engine = CpuEngine(model)
    for words in range(1, 12):
        assert_agrees(engine, small_inputs(0, words))
    first = engine.memory_bytes()
    assert_agrees(engine, small_inputs(0, 11))
    assert engine.memory_bytes() == first
    assert_agrees(engine, small_inputs(0, 1))


def test_several_state_tokens_and_none_given_as_embodiment(model):
    engine, inputs = CpuEngine(model), small_inputs(0)
    assert_agrees(engine, replace(inputs, embodiment=None))
    assert_agrees(engine, replace(inputs, state=torch.randn(1, 3, 9, generator=torch.Generator().manual_seed(5))))
    assert_agrees(engine, inputs)


def test_padding_is_left_out_and_an_empty_prompt_refused(model):
    engine, noise = CpuEngine(model), noise_for(model, 1)
    padded = engine.run(small_inputs(0, padding=4), noise, 4)
    assert torch.equal(padded, engine.run(small_inputs(0), noise, 4))
    assert engine.bucket(small_inputs(0, padding=4), 4).text_tokens == 13
    inputs = small_inputs(0)
    with pytest.raises(EngineError, match="prompt is empty"):
        engine.bucket(replace(inputs, token_mask=torch.zeros_like(inputs.token_mask)), 4)


def test_absent_cameras_have_no_tokens(model):
    inputs = small_inputs(0)
    absent = torch.zeros(1, dtype=torch.bool)
    alone = replace(inputs, image_masks=[inputs.image_masks[0], absent], tokens=inputs.tokens[:, 4:])
    alone = replace(alone, token_mask=torch.ones_like(alone.tokens, dtype=torch.bool))
    engine = CpuEngine(model)
    assert engine.bucket(alone, 4).cameras == 1
    assert_agrees(engine, alone)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.eagle_model.language_model.model.layers.0.self_attn.k_norm.weight",
        "backbone.eagle_model.language_model.model.layers.1.mlp.gate_proj.weight",
        "backbone.eagle_linear.weight",
        "action_head.vlln.bias",
        "action_head.vl_self_attention.transformer_blocks.1.ff.net.2.weight",
        "action_head.state_encoder.layer1.W",
        "action_head.future_tokens.weight",
        "action_head.position_embedding.weight",
        "action_head.action_encoder.W1.W",
        "action_head.action_encoder.W2.b",
        "action_head.model.timestep_encoder.timestep_embedder.linear_1.weight",
        "action_head.model.transformer_blocks.0.attn1.to_v.weight",
        "action_head.model.transformer_blocks.1.norm1.linear.bias",
        "action_head.model.proj_out_2.weight",
        "action_head.action_decoder.layer1.W",
    ],
)
def test_changed_weights_are_read_again(name):
    model = randomised(Gr00tN15(gr00t_config()))
    engine, inputs = CpuEngine(model), small_inputs(1)
    before = assert_agrees(engine, inputs)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5).add_(0.1)
    assert not torch.equal(assert_agrees(engine, inputs), before)


def test_quantized_models_agree_but_for_codes_on_an_edge(quantized):
    """A code between two values may fall the other way; the model does the same if its prefix is rounded otherwise."""
    engine = CpuEngine(quantized.model)
    assert engine.precision == "w4a4"
    errors = []
    for seed in range(10):
        inputs, noise = quantized.processor.prepare([observation(seed)]), quantized.noise(1, [seed])
        errors.append(float((engine.run(inputs, noise, 4) - eager(quantized.model, inputs, noise)).abs().max()))
    assert_some_agree(errors)
    assert max(errors) < 0.5


def test_tables_of_another_number_of_steps_are_refused(quantized):
    inputs = quantized.processor.prepare([observation(0)])
    with pytest.raises(StepContextError, match="calibrated for 4 denoise steps but runs with 5"):
        CpuEngine(quantized.model).run(inputs, quantized.noise(1), 5)


def test_tables_per_step_are_refused_where_no_step_is():
    """Keys and values of the features are computed before the first step."""
    model = quantize_randomly(randomised(Gr00tN15(gr00t_config())), "w4a4")
    crossing = next(site for site in quantized_sites(model) if site.spec.name.endswith(".kv"))
    crossing.spec = replace(crossing.spec, steps=4)
    with pytest.raises(StepContextError, match=crossing.spec.name):
        CpuEngine(model).run(small_inputs(), noise_for(model, 1), 4)


def test_a_pack_of_everything_runs_for_the_embodiments_that_it_keeps(policy):
    recipe = replace(Recipe.preset("rtn_whole"), whole=WholeRecipe(embodiments="contract"))
    quantized = quantize_policy(policy, recipe, [observation(seed) for seed in range(8)])[0]
    engine, errors = CpuEngine(quantized.model), []
    for seed in range(10):
        inputs, noise = quantized.processor.prepare([observation(seed)]), quantized.noise(1, [seed])
        errors.append(float((engine.run(inputs, noise, 4) - eager(quantized.model, inputs, noise)).abs().max()))
    assert_some_agree(errors)
    # Blank inputs are of the shape's embodiment.
    for call in engine.stages(engine.bucket(inputs, 4)).values():
        call()
    with pytest.raises(QuantizationError, match="embodiment 0 is not in this pack, which keeps 3"):
        engine.run(replace(inputs, embodiment=(0,)), noise, 4)


def test_a_policy_runs_through_the_engine(policy, monkeypatch):
    assert policy.engine is not None and policy.engine.name == "cpu" and policy.engine.precision == "fp32"
    calls, run = [], policy.engine.run
    monkeypatch.setattr(policy.engine, "run", lambda *args: calls.append(args) or run(*args))
    chunk = policy.infer(observation(0), seed=2)
    assert len(calls) == 1
    step_by_step = Policy(policy.model, policy.description, engine="off")
    np.testing.assert_allclose(chunk.actions, step_by_step.infer(observation(0), seed=2).actions, rtol=0, atol=ROUNDING)

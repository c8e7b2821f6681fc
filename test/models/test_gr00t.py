"""Behaviour of the GR00T N1.5 model that no recorded tensor covers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import IMAGE_TOKEN, gr00t_config, gr00t_inputs, noise_for, randomised
from torch import nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig, Qwen3Config, StackConfig
from omega_qvla_core.models.gr00t_n15 import (
    LEROBOT_PREFIX,
    LM_HEAD,
    TOKEN_TABLE,
    UNUSED_PREFIXES,
    Gr00tN15,
    euler_timesteps,
)
from omega_qvla_core.models.step_context import DenoiseStep, current_step

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "gr00t"


@pytest.fixture
def model() -> Gr00tN15:
    return randomised(Gr00tN15(gr00t_config()))


@pytest.fixture(scope="module")
def official() -> dict:
    return json.loads((GOLDEN / "full_keys.json").read_text())


def full_size(official: dict, eagle: dict | None = None) -> Gr00tN15:
    with torch.device("meta"):
        return Gr00tN15(Gr00tConfig.from_official_json(official["released_config"], eagle))


def test_full_size_has_the_official_names_and_shapes(official):
    own = {name: list(tensor.shape) for name, tensor in full_size(official).state_dict().items()}
    unused = {name for name in official["keys"] if name.startswith(UNUSED_PREFIXES)}
    assert own == {name: shape for name, shape in official["keys"].items() if name not in unused}
    # The output head and the twelve tensors of SigLIP's pooling head less one: nothing else is left out.
    assert len(official["keys"]) == 899 and len(own) == 887 and len(unused) == 12
    assert {name.split(".")[-2] for name in unused} >= {"lm_head", "head"}


def test_the_released_sizes_are_those_of_the_eagle_configuration(official):
    released = Gr00tConfig.from_official_json(official["released_config"])
    assert Gr00tConfig.from_official_json(official["released_config"], official["eagle_config"]) == released


def test_the_quantizers_linears_are_plain_and_180_at_full_size(official):
    model = full_size(official)
    names = [
        f"backbone.eagle_model.language_model.model.layers.{layer}.{linear}"
        for layer in range(12)
        for linear in (
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        )
    ] + [
        f"action_head.model.transformer_blocks.{block}.{linear}"
        for block in range(16)
        for linear in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    assert len(names) == 180
    for name in names:
        assert type(model.get_submodule(name)) is nn.Linear, name


def test_the_output_head_is_not_tied_to_the_token_table(model):
    state, other = model.state_dict(), Gr00tN15(model.config)
    other.load_state_dict({**state, LM_HEAD: torch.zeros_like(state[TOKEN_TABLE])})
    assert torch.equal(other.state_dict()[TOKEN_TABLE], state[TOKEN_TABLE])


def test_lerobots_names_and_its_dropped_token_table_load(model):
    state = {LEROBOT_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    state[LEROBOT_PREFIX + LM_HEAD] = state.pop(LEROBOT_PREFIX + TOKEN_TABLE)
    other = Gr00tN15(model.config)
    other.load_state_dict(state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    del state[LEROBOT_PREFIX + LM_HEAD]
    with pytest.raises(RuntimeError, match="embed_tokens"):
        other.load_state_dict(state)


@torch.inference_mode()
def test_sampling_is_deterministic_and_rows_are_independent(model):
    inputs, noise = gr00t_inputs(), noise_for(model, 2)
    both = model.sample_actions(model.embed_prefix(**inputs, embodiment=(1, 3)), noise, 4)
    assert both.shape == (2, 6, 7) and both.dtype == torch.float32
    assert torch.equal(both, model.sample_actions(model.embed_prefix(**inputs, embodiment=(1, 3)), noise, 4))
    row = {key: [one[1:] for one in value] if isinstance(value, list) else value[1:] for key, value in inputs.items()}
    alone = model.sample_actions(model.embed_prefix(**row, embodiment=3), noise[1:], 4)
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=1e-5)
    other = model.sample_actions(model.embed_prefix(**row, embodiment=2), noise[1:], 4)
    assert (other - alone).abs().max() > 1e-3


@torch.inference_mode()
def test_everything_seen_told_and_felt_has_an_effect(model):
    noise = noise_for(model, 2)
    actions = model.sample_actions(model.embed_prefix(**gr00t_inputs()), noise, 4)
    for change in ("first image", "second image", "word", "state", "noise"):
        inputs, start = gr00t_inputs(), noise
        if change.endswith("image"):
            inputs["images"][change == "second image"].neg_()
        elif change == "word":
            inputs["tokens"][:, -1] = inputs["tokens"][:, -1] % 18 + 1
        elif change == "state":
            inputs["state"] = inputs["state"] + 1
        else:
            start = noise + 0.1
        changed = model.sample_actions(model.embed_prefix(**inputs), start, 4)
        assert (changed - actions).abs().amax(dim=(1, 2)).min() > 1e-5, change


@torch.inference_mode()
def test_an_absent_camera_has_no_image_tokens(model):
    inputs, noise = gr00t_inputs(), noise_for(model, 2)
    # Row 0 has one camera and left padding in the place of the other's tokens, row 1 has both.
    inputs["tokens"][0, :4], inputs["token_mask"] = 0, inputs["tokens"] >= 0
    inputs["token_mask"][0, :4] = False
    inputs["image_masks"] = [torch.tensor([False, True]), torch.ones(2, dtype=torch.bool)]
    actions = model.sample_actions(model.embed_prefix(**inputs), noise, 4)
    inputs["images"][0][0] = 5.0
    assert torch.equal(actions, model.sample_actions(model.embed_prefix(**inputs), noise, 4))


@torch.inference_mode()
def test_the_denoise_step_is_set_where_it_counts(model):
    seen: dict[str, list[DenoiseStep | None]] = {}
    blocks = model.expert.transformer_blocks
    watched = {
        "language": model.language_model.layers[0].self_attn.q_proj,
        "cross keys": blocks[0].attn1.to_k,
        "cross queries": blocks[0].attn1.to_q,
        "self keys": blocks[1].attn1.to_k,
        "ff": blocks[3].ff.net[2],
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: seen.setdefault(name, []).append(current_step()))
    model.sample_actions(model.embed_prefix(**gr00t_inputs()), noise_for(model, 2), 3)
    steps = [DenoiseStep(index, 3) for index in range(3)]
    # Keys and values of the features do not depend on the step: they run once, outside the loop.
    assert seen == {
        "language": [None],
        "cross keys": [None],
        **dict.fromkeys(["cross queries", "self keys", "ff"], steps),
    }
    assert current_step() is None


@torch.inference_mode()
def test_a_head_without_adapter_positions_or_interleaving(model):
    config = gr00t_config(adapter=None, max_positions=0, interleave=False)
    plain = randomised(Gr00tN15(config))
    assert not any(name.startswith(("action_head.vl", "action_head.position")) for name in plain.state_dict())
    cache = plain.encode_prefix(plain.embed_prefix(**gr00t_inputs()))
    assert all(context is not None for context in cache.contexts)
    assert plain.sample_actions(cache, noise_for(plain, 2), 2).isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_stays_near_float32_and_gives_float32(head_dtype):
    model = Gr00tN15(gr00t_config())  # the initial weights: random ones of unit gain amplify rounding
    inputs, noise = gr00t_inputs(), noise_for(model, 2)
    exact = model.eval().sample_actions(model.embed_prefix(**inputs, embodiment=(0, 2)), noise, 4)
    model.bfloat16()
    model.action_head.to(head_dtype)  # fine-tuned files have a bfloat16 backbone and a float32 head
    actions = model.sample_actions(model.embed_prefix(**inputs, embodiment=(0, 2)), noise, 4)
    assert actions.dtype == torch.float32
    assert 0 < (actions - exact).abs().max() < 0.03


def test_gradients_reach_every_part(model):
    model.train()
    cache = model.encode_prefix(model.embed_prefix(**gr00t_inputs())).repeat(2)
    velocity = model.velocity(noise_for(model, 4), torch.tensor([0, 300, 600, 999]), cache)
    velocity.square().mean().backward()
    for part in (model.vision, model.language_model, model.expert, model.action_head.state_encoder):
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in part.parameters())


def test_inputs_that_do_not_fit_are_refused(model):
    inputs = gr00t_inputs()
    with pytest.raises(ValueError, match="prompts have 17 image tokens, the 4 images make 16"):
        changed = inputs["tokens"].clone()
        changed[0, -1] = IMAGE_TOKEN
        model.embed_prefix(**{**inputs, "tokens": changed})
    with pytest.raises(ValueError, match=r"must be \[N, 3, 28, 28\]"):
        model.embed_prefix(**{**inputs, "images": [torch.zeros(2, 3, 42, 42)] * 2})
    with pytest.raises(ValueError, match=r"state has shape \[2, 8\]"):
        model.embed_prefix(**{**inputs, "state": torch.zeros(2, 8)})
    for wrong in (4, -1, (0,), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"2 of 0\.\.3"):
            model.embed_prefix(**inputs, embodiment=wrong)
    prefix = model.embed_prefix(**inputs)
    with pytest.raises(ValueError, match="noise has shape"):
        model.sample_actions(prefix, noise_for(model, 1), 4)
    with pytest.raises(ValueError, match="num_steps is 0"):
        model.sample_actions(prefix, noise_for(model, 2), 0)


def test_timesteps_are_truncated():
    assert euler_timesteps(4, 1000) == [0, 250, 500, 750]
    assert euler_timesteps(7, 1000)[:3] == [0, 142, 285]


def test_config_survives_json():
    for config in (gr00t_config(), gr00t_config(adapter=None)):
        assert Gr00tConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sise": 3}, "unknown key 'hidden_sise'; did you mean 'hidden_size'"),
        ({"action_dim": 0}, "model.action_dim is 0; it must be positive"),
        ({"project_features": False}, "feature_width is 24, model.language.width 32"),
        ({"adapter": {"depth": 2, "num_heads": 3, "head_dim": 9}}, "model.adapter has width 27"),
        ({"dit": {"depth": 2, "num_heads": 3, "head_dim": 3}}, "model.dit has width 9; it must be even"),
        ({"action_horizon": 11}, "model.max_positions allows 10"),
    ],
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ConfigError) as caught:
        Gr00tConfig.from_json({**gr00t_config().to_json(), **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("action_head_cfg", "hidden_size", None), "hidden_size is None; it must be a whole number"),
        (("action_head_cfg", "diffusion_model_cfg", 3), "diffusion_model_cfg must be a JSON object"),
        (("backbone_cfg", "select_layer", 29), "select_layer is 29; the language model has 28"),
        (("action_head_cfg", "backbone_embedding_dim", 2049), "feature_width is 2049"),
    ],
)
def test_official_config_errors_name_the_field(change, message, official):
    data = json.loads(json.dumps(official["released_config"]))
    section, key, value = change
    data[section][key] = value
    with pytest.raises(ConfigError) as caught:
        Gr00tConfig.from_official_json(data)
    assert message in str(caught.value)
    del data[section]
    with pytest.raises(ConfigError, match=f"lacks the key '{section}'"):
        Gr00tConfig.from_official_json(data)


def test_another_computation_is_refused(official):
    for section, key, value in (
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "hidden_act", "gelu"),
        (None, "use_pixel_shuffle", True),
        (None, "select_layer", -2),
    ):
        eagle = json.loads(json.dumps(official["eagle_config"]))
        (eagle if section is None else eagle[section])[key] = value
        with pytest.raises(ConfigError, match=f"{key} is {value!r}; this release computes"):
            Gr00tConfig.from_official_json(official["released_config"], eagle)


def test_sub_configs_are_checked():
    with pytest.raises(ConfigError, match="num_heads 3 is not a multiple of num_kv_heads 2"):
        Qwen3Config(8, 1, 8, 3, 2, 4, 10, 9)
    with pytest.raises(ConfigError, match="image_token_id is 10; vocab_size is 10"):
        Qwen3Config(8, 1, 8, 2, 2, 4, 10, 10)
    with pytest.raises(ConfigError, match="depth is 0"):
        StackConfig(0, 1, 8)

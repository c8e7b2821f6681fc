"""Behaviour of the Pi 0.5 model that no recorded tensor covers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omega_qvla_core.checkpoints.strict_loading import tensor_dtype
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.models.step_context import DenoiseStep, current_step

TIED = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"

SIGLIP = SiglipConfig(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=14, image_size=28)
KEYPOINT = KeypointConfig(image_size=32, stem_channels=(4, 8, 8), num_queries=2, key_dim=4, value_dim=4)


def make_config(vision: SiglipConfig | KeypointConfig = SIGLIP) -> Pi05Config:
    return Pi05Config(
        lm_width=32,
        lm_depth=2,
        lm_mlp_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        expert_width=16,
        expert_mlp_dim=32,
        vocab_size=20,
        action_dim=7,
        action_horizon=6,
        max_token_len=8,
        vision=vision,
    )


def make_model(config: Pi05Config) -> Pi05:
    """A model with random weights, the adaptive norms' too (they start at zero)."""
    torch.manual_seed(0)
    model = Pi05(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(config: Pi05Config, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    lengths = torch.tensor([3, config.max_token_len])[:batch, None]
    return {
        "images": [torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)],
        "image_masks": [torch.ones(batch, dtype=torch.bool), torch.arange(batch) != 0],
        "tokens": torch.randint(1, config.vocab_size, (batch, config.max_token_len), generator=generator),
        "token_mask": torch.arange(config.max_token_len) < lengths,
        "state": torch.randn(batch, 7, generator=generator),
    }


def make_noise(config: Pi05Config, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["siglip", "keypoint"])
def config(request) -> Pi05Config:
    return make_config(SIGLIP if request.param == "siglip" else KEYPOINT)


@torch.inference_mode()
def test_masked_cameras_and_padding_have_no_effect(config):
    model, inputs, noise = make_model(config), make_inputs(config), make_noise(config)
    actions = model.sample_actions(model.embed_prefix(**inputs), noise, 3)
    inputs["images"][1][0] = 5.0
    inputs["tokens"][0, 3:] = 9
    assert torch.equal(actions, model.sample_actions(model.embed_prefix(**inputs), noise, 3))


@torch.inference_mode()
def test_a_visible_camera_and_a_word_have_an_effect(config):
    model, noise = make_model(config), make_noise(config)
    actions = model.sample_actions(model.embed_prefix(**make_inputs(config)), noise, 3)
    for change in ("images", "tokens"):
        inputs = make_inputs(config)
        if change == "images":
            inputs["images"][0] = -inputs["images"][0]
        else:
            inputs["tokens"] = inputs["tokens"].flip(1)
        changed = model.sample_actions(model.embed_prefix(**inputs), noise, 3)
        assert (changed - actions).abs().amax(dim=(1, 2)).min() > 1e-4, change


@torch.inference_mode()
def test_only_the_keypoint_encoder_reads_the_state():
    for vision, reads in ((SIGLIP, False), (KEYPOINT, True)):
        config = make_config(vision)
        model, inputs, noise = make_model(config), make_inputs(config), make_noise(config)
        actions = model.sample_actions(model.embed_prefix(**inputs), noise, 2)
        inputs["state"] = inputs["state"] + 1
        changed = model.sample_actions(model.embed_prefix(**inputs), noise, 2)
        assert torch.equal(actions, changed) is not reads


@torch.inference_mode()
def test_sampling_is_deterministic_and_rows_are_independent(config):
    model, noise = make_model(config), make_noise(config)
    inputs = make_inputs(config)
    both = model.sample_actions(model.embed_prefix(**inputs), noise, 4)
    assert torch.equal(both, model.sample_actions(model.embed_prefix(**inputs), noise, 4))
    row = {key: [item[1:] for item in value] if isinstance(value, list) else value[1:] for key, value in inputs.items()}
    alone = model.sample_actions(model.embed_prefix(**row), noise[1:], 4)
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_denoise_step_is_set_in_velocities_only(config, monkeypatch):
    model = make_model(config)
    seen: list[DenoiseStep | None] = []
    in_prefix: list[DenoiseStep | None] = []
    model.expert.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(current_step()))
    model.language_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: in_prefix.append(current_step()))
    model.sample_actions(model.embed_prefix(**make_inputs(config)), make_noise(config), 3)
    assert seen == [DenoiseStep(index, 3) for index in range(3)]
    assert in_prefix == [None]
    assert current_step() is None


@torch.inference_mode()
def test_a_cache_gives_the_same_actions_as_its_prefix(config):
    model, noise = make_model(config), make_noise(config)
    prefix = model.embed_prefix(**make_inputs(config))
    actions = model.sample_actions(prefix, noise, 3)
    assert torch.equal(actions, model.sample_actions(model.encode_prefix(prefix), noise, 3))
    short = model.encode_prefix(prefix, last_hidden=False)
    assert short.last_hidden is None
    assert torch.equal(actions, model.sample_actions(short, noise, 3))


def test_training_velocity_reaches_both_towers_and_takes_several_noises_per_observation(config):
    model, noise = make_model(config), make_noise(config).repeat_interleave(3, dim=0)
    time = torch.linspace(0.1, 1.0, len(noise))
    prefix = model.embed_prefix(**make_inputs(config))
    velocity = model.training_velocity(prefix, noise, time)
    cache = model.encode_prefix(prefix)
    torch.testing.assert_close(velocity, model.velocity(noise, time, cache.repeat(3)))
    velocity.square().mean().backward()
    for tower in (model.language_model, model.expert, model.vision):
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in tower.parameters())


def test_bfloat16_autocast_keeps_velocities_float32(config):
    model = make_model(config)
    with torch.autocast("cpu", torch.bfloat16):
        prefix = model.embed_prefix(**make_inputs(config))
        velocity = model.training_velocity(prefix, make_noise(config), torch.rand(2))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_stays_near_float32_and_gives_float32(config, mixed):
    torch.manual_seed(0)
    model = Pi05(config).eval()
    for block in model.expert.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            torch.nn.init.normal_(norm.dense.bias, std=0.5)
    inputs, noise = make_inputs(config), make_noise(config)
    exact = model.sample_actions(model.embed_prefix(**inputs), noise, 4)
    for name, parameter in model.named_parameters():
        # Loaded checkpoints keep norms, embeddings of the vision tower and the small projections in float32.
        dtype = tensor_dtype(name, "pi05", torch.bfloat16) if mixed else torch.bfloat16
        parameter.data = parameter.data.to(dtype)
    actions = model.sample_actions(model.embed_prefix(**inputs), noise, 4)
    assert actions.dtype == torch.float32
    assert 0 < (actions - exact).abs().max() < 0.05


@torch.inference_mode()
def test_a_new_expert_block_is_the_identity():
    config = make_config()
    torch.manual_seed(0)
    model = Pi05(config)
    prefix, noise = model.embed_prefix(**make_inputs(config)), make_noise(config)
    hidden = model.expert_hidden(noise, torch.ones(2), model.encode_prefix(prefix))
    x = model.action_in_proj(noise)
    torch.testing.assert_close(hidden, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def test_the_token_table_loads_under_either_name_and_the_embedding_counts():
    config = make_config()
    model, other = make_model(config), Pi05(config)
    state = model.state_dict()
    table = state.pop(TIED)
    other.load_state_dict({**state, EMBEDDING: table})
    assert torch.equal(other.state_dict()[TIED], table)
    other.load_state_dict({**state, EMBEDDING: table, TIED: torch.zeros_like(table)})
    assert torch.equal(other.state_dict()[TIED], table)
    with pytest.raises(RuntimeError, match="lm_head"):
        other.load_state_dict(state)


def test_wrong_noise_and_steps_are_refused():
    config = make_config()
    model = make_model(config)
    prefix = model.embed_prefix(**make_inputs(config))
    with pytest.raises(ValueError, match="noise has shape"):
        model.sample_actions(prefix, make_noise(config)[:1], 3)
    with pytest.raises(ValueError, match="num_steps is 0"):
        model.sample_actions(prefix, make_noise(config), 0)


def test_an_image_of_another_size_is_refused():
    config = make_config()
    inputs = make_inputs(config)
    inputs["images"][1] = torch.zeros(2, 3, 14, 14)
    with pytest.raises(ValueError, match="image 1 has shape"):
        make_model(config).embed_prefix(**inputs)


def test_config_survives_json(config):
    assert Pi05Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_with": 3}, "unknown key 'lm_with'; did you mean 'lm_width'"),
        ({"lm_width": None}, "model.lm_width is None; it must be of type int"),
        ({"lm_width": 2.5}, "model.lm_width is 2.5; it must be of type int"),
        ({"lm_depth": 0}, "lm_depth is 0; it must be positive"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of model.num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"vision": {"kind": "resnet"}}, "vision.kind is 'resnet'; it must be one of siglip, keypoint"),
        ({"vision": {"kind": "siglip"}}, "model.vision lacks the key 'width'"),
        ({"vision": {"kind": "keypoint", "num_camera": 2}}, "did you mean 'num_cameras'"),
    ],
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ConfigError) as caught:
        Pi05Config.from_json({**make_config().to_json(), **change})
    assert message in str(caught.value)


def test_a_missing_key_is_named():
    for field in dataclasses.fields(Pi05Config):
        if field.default is dataclasses.MISSING:
            data = {key: value for key, value in make_config().to_json().items() if key != field.name}
            with pytest.raises(ConfigError, match=f"lacks the key '{field.name}'"):
                Pi05Config.from_json(data)
    with pytest.raises(ConfigError, match="vision_width"):
        Pi05Config.from_reference_json({})

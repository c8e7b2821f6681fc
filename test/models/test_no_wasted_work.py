"""What is left out or computed once gives the same result as with it, in both families."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from small_models import gr00t_inputs, noise_for, pi05_inputs, small_inputs, small_model
from torch import nn

from omega_qvla_core.models.gr00t_n15 import euler_timesteps
from omega_qvla_core.models.pi05_prefix import euler_times
from omega_qvla_core.models.step_context import current_step

FAMILIES = ("pi05", "gr00t_n15")
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def count_calls(module: nn.Module) -> list[int]:
    """Rows of the first dimension of every call."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    return calls


def time_modules(model: nn.Module, family: str) -> list[nn.Linear]:
    """Linears that read nothing but the time."""
    if family == "pi05":
        return [model.time_mlp_in, model.time_mlp_out, model.expert.layers[0].input_layernorm.dense]
    dit = model.expert
    return [dit.timestep_encoder.timestep_embedder.linear_1, dit.proj_out_1, dit.transformer_blocks[1].norm1.linear]


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_absent_cameras_and_padding_are_dropped(batch):
    model, inputs = small_model("pi05"), pi05_inputs(batch)
    noise = noise_for(model, batch)
    whole = model.embed_prefix(**inputs, drop_masked=False)
    short = model.embed_prefix(**inputs)
    # 3 cameras of 4 tokens and 8 words; camera 2 is absent, camera 1 in row 0 only; 3 and 5 words are valid.
    assert whole.embeddings.shape[1] == 20
    assert short.embeddings.shape[1] == (4 + 3 if batch == 1 else 4 + 4 + 5)
    assert short.complete is (batch == 1)
    torch.testing.assert_close(model.sample_actions(short, noise, 4), model.sample_actions(whole, noise, 4), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "images"), [(1, 1), (2, 3)])
def test_the_vision_tower_runs_over_present_cameras_only(batch, images):
    model = small_model("pi05")
    calls = count_calls(model.vision.vision_model)
    model.embed_prefix(**pi05_inputs(batch))
    assert calls == [images]
    model.embed_prefix(**pi05_inputs(batch), drop_masked=False)
    assert calls == [images, 3 * batch]


@torch.inference_mode()
def test_without_any_camera_the_prompt_is_enough():
    model, inputs = small_model("pi05"), pi05_inputs(1)
    inputs["image_masks"] = [torch.zeros(1, dtype=torch.bool)] * 3
    whole = model.sample_actions(model.embed_prefix(**inputs, drop_masked=False), noise_for(model, 1), 3)
    short = model.sample_actions(model.embed_prefix(**inputs), noise_for(model, 1), 3)
    torch.testing.assert_close(short, whole, **CLOSE)


@torch.inference_mode()
def test_not_a_number_in_an_absent_camera_does_no_harm():
    model, inputs = small_model("pi05"), pi05_inputs(2)
    actions = model.sample_actions(model.embed_prefix(**inputs), noise_for(model, 2), 3)
    inputs["images"][1][0] = float("nan")
    inputs["images"][2][:] = float("nan")
    assert torch.equal(actions, model.sample_actions(model.embed_prefix(**inputs), noise_for(model, 2), 3))


@torch.inference_mode()
def test_padding_that_all_rows_have_is_dropped_from_gr00t_as_if_it_never_was():
    model, noise = small_model("gr00t_n15"), noise_for(small_model("gr00t_n15"), 2)
    plain = model.sample_actions(model.embed_prefix(**gr00t_inputs()), noise, 4)
    padded = model.embed_prefix(**gr00t_inputs(padding=3))
    assert padded.complete
    assert torch.equal(model.sample_actions(padded, noise, 4), plain)
    # The action head has no mask: left in place, padding would change the actions.
    kept = model.embed_prefix(**gr00t_inputs(padding=3), drop_masked=False)
    assert (model.sample_actions(kept, noise, 4) - plain).abs().max() > 1e-4


@torch.inference_mode()
def test_the_dead_tail_of_the_last_prefix_layer_is_skipped():
    model, noise = small_model("pi05"), noise_for(small_model("pi05"), 2)
    prefix = model.embed_prefix(**pi05_inputs())
    last = model.language_model.layers[-1]
    whole = model.sample_actions(model.encode_prefix(prefix, last_hidden=True), noise, 4)
    dead = [count_calls(one) for one in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp.down_proj)]
    assert torch.equal(model.sample_actions(prefix, noise, 4), whole)
    assert dead == [[], [], []]
    # Calibration asks for the whole tower, and then every linear runs.
    model.encode_prefix(prefix)
    assert dead == [[2], [2], [2]]


@torch.inference_mode()
def test_gr00ts_adapter_and_cross_attention_keys_run_once():
    model, noise = small_model("gr00t_n15"), noise_for(small_model("gr00t_n15"), 2)
    prefix = model.embed_prefix(**gr00t_inputs())
    blocks, adapter = model.expert.transformer_blocks, model.action_head.vl_self_attention
    cross, own, adapted = count_calls(blocks[2].attn1.to_v), count_calls(blocks[1].attn1.to_v), count_calls(adapter)
    actions = model.sample_actions(prefix, noise, 5)
    assert (len(cross), len(own), len(adapted)) == (1, 5, 1)
    # Computed anew for every step, as the reference does.
    x = noise
    for timestep in euler_timesteps(5, 1000):
        cache = model.encode_prefix(prefix)
        x = x + model.velocity(x, torch.full((2,), timestep), cache) / 5
    assert (len(cross), len(adapted)) == (6, 6)
    torch.testing.assert_close(actions, x, **CLOSE)


@torch.inference_mode()
def test_pi05_steps_from_tables_equal_single_velocities():
    model, noise = small_model("pi05"), noise_for(small_model("pi05"), 2)
    cache = model.encode_prefix(model.embed_prefix(**pi05_inputs()))
    x = noise
    for time in euler_times(5):
        x = x - model.velocity(x, torch.full((2,), time), cache) / 5
    torch.testing.assert_close(model.sample_actions(cache, noise, 5), x, **CLOSE)


def sample(model: nn.Module, family: str, num_steps: int = 4) -> torch.Tensor:
    with torch.no_grad():
        prefix = model.embed_prefix(**small_inputs(family))
        return model.sample_actions(prefix, noise_for(model, 2), num_steps)


def without_tables(model: nn.Module, family: str, num_steps: int = 4) -> torch.Tensor:
    fresh = copy.deepcopy(model)
    fresh.forget_step_tables()
    return sample(fresh, family, num_steps)


def test_step_tables_are_kept_per_number_of_steps(family):
    model = small_model(family)
    with torch.no_grad():
        kept = model.step_conditions(4)
        assert model.step_conditions(4) is kept
        assert len(model.step_conditions(3)) == 3
        assert model.step_conditions(4) is kept
    with torch.inference_mode():
        assert model.step_conditions(4) is kept


def test_a_change_of_any_source_of_the_tables_is_seen(family):
    model = small_model(family)
    count = len(time_modules(model, family))
    for index in range(count):
        before = sample(model, family)
        with torch.no_grad():
            time_modules(model, family)[index].weight.mul_(1.5)
        after = sample(model, family)
        assert not torch.equal(before, after)
        assert torch.equal(after, without_tables(model, family))


def test_loading_weights_moving_and_copying_renew_the_tables(family):
    model, other = small_model(family), small_model(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    before = sample(model, family)
    model.load_state_dict(other.state_dict())
    assert torch.equal(sample(model, family), sample(other, family))
    assert not torch.equal(sample(model, family), before)
    copied = copy.deepcopy(model)
    assert torch.equal(sample(copied, family), sample(model, family))
    with torch.no_grad():
        time_modules(copied, family)[0].weight.zero_()
    assert not torch.equal(sample(copied, family), sample(model, family))
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(sample(model, family), sample(other, family))


def test_a_replaced_module_renews_the_tables(family):
    model = small_model(family)
    before = sample(model, family)
    owner = model.expert.layers[0].input_layernorm if family == "pi05" else model.expert.transformer_blocks[0].norm1
    name = "dense" if family == "pi05" else "linear"
    old = getattr(owner, name)
    replaced = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    setattr(owner, name, replaced)
    assert not torch.equal(sample(model, family), before)
    assert torch.equal(sample(model, family), without_tables(model, family))


def test_replaced_parameter_data_renews_the_tables(family):
    model = small_model(family)
    sample(model, family)
    for _ in range(3):  # an address that was freed may be given out again
        linear = time_modules(model, family)[0]
        linear.weight.data = torch.randn_like(linear.weight)
        assert torch.equal(sample(model, family), without_tables(model, family))


def test_an_optimizer_that_hides_its_writes_is_seen(family):
    """A fused optimizer does not count its writes in the version of a tensor."""
    model = small_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = sample(model, family)
    cache = model.encode_prefix(model.embed_prefix(**small_inputs(family)))
    time = torch.zeros(2) + 0.5 if family == "pi05" else torch.tensor([500, 500])
    model.velocity(noise_for(model, 2), time, cache).square().mean().backward()
    optimizer.step()
    assert not torch.equal(sample(model, family), before)
    assert torch.equal(sample(model, family), without_tables(model, family))


def test_watched_and_trained_modules_run_at_every_step(family):
    model = small_model(family)
    sample(model, family)
    steps = []
    watched = time_modules(model, family)[1]
    handle = watched.register_forward_hook(lambda *_: steps.append(current_step()))
    for _ in range(2):
        sample(model, family)
    assert [step.index for step in steps] == [0, 1, 2, 3] * 2
    handle.remove()
    prefix = model.embed_prefix(**small_inputs(family))
    actions = model.sample_actions(prefix, noise_for(model, 2), 4)
    actions.square().mean().backward()
    assert watched.weight.grad is not None and watched.weight.grad.abs().max() > 0


def test_tables_made_in_inference_mode_serve_outside_it(family):
    model = small_model(family).requires_grad_(False)
    with torch.inference_mode():
        inside = model.sample_actions(model.embed_prefix(**small_inputs(family)), noise_for(model, 2), 4)
    noise = noise_for(model, 2).requires_grad_(True)
    actions = model.sample_actions(model.embed_prefix(**small_inputs(family)), noise, 4)
    assert torch.equal(actions, inside)
    actions.sum().backward()
    assert noise.grad is not None and noise.grad.isfinite().all()


@torch.inference_mode()
def test_autocast_has_tables_of_its_own(family):
    model = small_model(family)
    plain = sample(model, family)
    with torch.autocast("cpu", torch.bfloat16):
        assert sample(model, family).isfinite().all()
    assert torch.equal(sample(model, family), plain)


def test_the_prefix_says_whether_it_is_complete(family):
    model, inputs = small_model(family), small_inputs(family)
    prefix = model.embed_prefix(**inputs)
    assert prefix.complete is bool(prefix.pad_mask.all())
    noise = noise_for(model, 2)
    known = model.sample_actions(prefix, noise, 3)
    torch.testing.assert_close(
        known, model.sample_actions(dataclasses.replace(prefix, complete=False), noise, 3), **CLOSE
    )


IN_SCOPE = re.compile(
    r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$"
    r"|^action_head\.model\.transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))$"
)


@torch.inference_mode()
def test_calibration_sees_every_linear_that_is_quantized(family):
    model = small_model(family)
    calls = {
        name: count_calls(module)
        for name, module in model.named_modules()
        if IN_SCOPE.search(name) and "vision" not in name
    }
    assert len(calls) == (7 * 2 + 7 * 2 if family == "pi05" else 7 * 2 + 6 * 4)
    # As the quantizer drives it: the whole prefix first, then the denoise loop on its cache.
    cache = model.encode_prefix(model.embed_prefix(**small_inputs(family)))
    model.sample_actions(cache, noise_for(model, 2), 3)
    per_chunk = {"prefix": 1, "step": 3}
    for name, seen in calls.items():
        in_loop = "gemma_expert" in name or (name.startswith("action_head") and not _reads_features(model, name))
        assert len(seen) == per_chunk["step" if in_loop else "prefix"], name


def _reads_features(model: nn.Module, name: str) -> bool:
    block = model.expert.transformer_blocks[int(name.split(".")[3])]
    return block.attends_to_features and name.endswith(("to_k", "to_v"))

"""Every recorded tensor of a GR00T N1.5 case, from our model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.models.gr00t_n15 import Gr00tCache, Gr00tN15, Gr00tPrefix, euler_timesteps
from omega_qvla_core.parity.fixture import INPUTS_FILE, META_FILE, check_tokens, need
from omega_qvla_core.parity.produced import Produced
from omega_qvla_core.parity.result import Tolerance

VARIANT = "flash/"
"""Padded cases were recorded with several attention kernels; this one is what the official release runs."""
OTHER_VARIANTS = ("sdpa_cuda/", "sdpa_cpu/")
TRAIN = "train"

# What a robot would see is judged value by value, what lies before it by the size of its tensor.
_ACTIONS = ("actions", "final_actions", "pred_velocity", "loss")
_TOLERANCE, _OTHER = Tolerance(1e-4, 1e-5), Tolerance(1e-4, 1e-5, by_tensor=True)
_STEPS = re.compile(r"^steps(\d+)/")


def tolerance(name: str) -> Tolerance:
    """Tolerance of a tensor."""
    return _TOLERANCE if name.rpartition("/")[2] in _ACTIONS else _OTHER


def step_counts(names: Mapping[str, Tensor]) -> list[int]:
    """Numbers of steps that a case's expected tensors are for."""
    return sorted({int(match.group(1)) for name in names if (match := _STEPS.match(name))})


def final_name(steps: int) -> str:
    """Name of the final actions."""
    return f"steps{steps}/final_actions"


def produce(model: Gr00tN15, inputs: Mapping[str, Tensor], case: str, counts: list[int]) -> Produced:
    """Compute all tensors of a case.

    Raises:
        CheckpointError: An input is missing or does not fit the model.
    """
    noise = case_noise(model, inputs, case)
    head, tower = model.action_head, model.language_model
    watched = {
        "vision_last_hidden": model.vision.vision_model,
        "image_embeds": model.backbone.eagle_model.mlp1,
        "backbone_features": model.backbone.eagle_linear,
        "vlln": head.vlln,
        "vl_embs": head.vl_self_attention,
        "state_features": head.state_encoder,
        **{f"llm_hidden_{index + 1}": layer for index, layer in enumerate(tower.layers[:-1])},
        # The last one is recorded after the final norm.
        f"llm_hidden_{len(tower.layers)}": tower.norm,
    }
    with _record(watched) as seen:
        prefix = case_prefix(model, inputs, case)
        cache = model.encode_prefix(prefix)
    tensors = {name: values[0] for name, values in seen.items()}
    tensors["llm_hidden_0"] = prefix.embeddings
    for steps in counts:
        tensors |= {f"steps{steps}/{name}": value for name, value in _steps(model, cache, noise, steps).items()}
    return Produced(tensors)


def produce_loss(model: Gr00tN15, inputs: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Produced:
    """The training loss of the case ``train``, whose observation and noise are another case's.

    Raises:
        CheckpointError: The files do not say which case, or an input is missing or does not fit.
    """
    settings = meta.get(TRAIN)
    source = settings.get("inputs_from_case") if isinstance(settings, Mapping) else None
    if source not in inputs:
        raise CheckpointError(f"{META_FILE}: train.inputs_from_case is {source!r}; name a case of {INPUTS_FILE}")
    noise, train = case_noise(model, inputs[source], source), inputs[TRAIN]
    action = need(train, TRAIN, "action", tuple(noise.shape), True)
    mask = need(train, TRAIN, "action_mask", tuple(noise.shape), True)
    time = need(train, TRAIN, "t", (noise.shape[0],), True)
    cache = model.encode_prefix(case_prefix(model, inputs[source], source))
    t = time[:, None, None]
    x_t, wanted = (1 - t) * noise + t * action, action - noise
    found = model.velocity(x_t, (time * model.config.timestep_buckets).long(), cache)
    return Produced({"loss": (((found - wanted) ** 2 * mask).sum() / mask.sum())[None]})


def case_noise(model: Gr00tN15, inputs: Mapping[str, Tensor], case: str) -> Tensor:
    """The start noise of a case."""
    return need(inputs, case, "noise", (None, model.config.action_horizon, model.config.action_dim), True)


def case_prefix(model: Gr00tN15, inputs: Mapping[str, Tensor], case: str) -> Gr00tPrefix:
    """The embedded observation of a case."""
    config = model.config
    batch, size = case_noise(model, inputs, case).shape[0], config.vision.image_size
    tokens = need(inputs, case, "input_ids", (batch, None), False)
    mask = need(inputs, case, "attention_mask", tuple(tokens.shape), False).bool()
    check_tokens(tokens, mask, config.language.vocab_size, case)
    pixels = need(inputs, case, "pixel_values", (None, 3, size, size), True)
    state = need(inputs, case, "state", (batch, None, config.state_dim), True)
    embodiment = need(inputs, case, "embodiment_id", (batch,), False).tolist()
    # Padding stays in place: the action head attends to it.
    return model.embed_pixels(pixels, tokens, mask, state, embodiment, drop_masked=False)


def _steps(model: Gr00tN15, cache: Gr00tCache, noise: Tensor, steps: int) -> dict[str, Tensor]:
    head, batch = model.action_head, noise.shape[0]
    watched: dict[str, nn.Module] = {
        "action_features": head.action_encoder,
        "temb": head.model.timestep_encoder,
        "model_output": head.model,
        **{f"block_{index}": block for index, block in enumerate(head.model.transformer_blocks)},
    }
    with _record(watched) as seen, _record_inputs(head.model) as entered:
        done = list(model.denoise(cache, noise, steps))
    return {
        "timesteps": torch.tensor(euler_timesteps(steps, model.config.timestep_buckets)),
        "action_features": torch.stack(seen["action_features"]),
        "temb": torch.stack([value.expand(batch, -1) for value in seen["temb"]]),
        "model_output": torch.stack(seen["model_output"]),
        "sa_embs_step0": entered[0],
        "dit_blocks_step0": torch.stack([seen[f"block_{i}"][0] for i in range(len(head.model.transformer_blocks))]),
        "pred_velocity": torch.stack([step.velocity for step in done]),
        "actions": torch.stack([step.actions for step in done]),
        # Unwatched, so that it comes from the kept tables of the steps, as in use.
        "final_actions": model.sample_actions(cache, noise, steps),
    }


@contextmanager
def _record(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of modules (the first, of several) in the order of their calls."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            seen[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """First argument of every call."""
    seen: list[Tensor] = []

    def hook(owner: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()

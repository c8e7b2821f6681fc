"""Every recorded tensor of a Pi 0.5 case, from our model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_prefix import PrefixCache, euler_times, suffix_position_ids
from omega_qvla_core.parity.fixture import check_tokens, need
from omega_qvla_core.parity.produced import Produced
from omega_qvla_core.parity.result import Tolerance

# Actions and velocities as the notes of the fixtures say; what lies before them is judged by size too.
_TOLERANCES = {"actions": Tolerance(1e-4), "x_t": Tolerance(1e-4), "v_t": Tolerance(2e-4)}
_OTHER = Tolerance(1e-4, 1e-5, by_tensor=True)
_STEPS = re.compile(r"^n(\d+)\.")


def tolerance(name: str) -> Tolerance:
    """Tolerance of a tensor."""
    return _TOLERANCES.get(name.rpartition(".")[2], _OTHER)


def step_counts(names: Mapping[str, Tensor]) -> list[int]:
    """Numbers of steps that a case's expected tensors are for."""
    return sorted({int(match.group(1)) for name in names if (match := _STEPS.match(name))})


def final_name(steps: int) -> str:
    """Name of the final actions."""
    return f"n{steps}.actions"


def produce(model: Pi05, inputs: Mapping[str, Tensor], case: str, counts: list[int]) -> Produced:
    """Compute all tensors of a case.

    Values are computed with every token in place, as the reference has them; the final actions once more as they are
    computed in use, with absent cameras and padding left out.

    Raises:
        CheckpointError: An input is missing or does not fit the model.
    """
    arguments, noise = case_arguments(model, inputs, case)
    prefix = model.embed_prefix(**arguments, drop_masked=False)
    cache = model.encode_prefix(prefix)
    valid = prefix.pad_mask
    tensors = {
        "prefix_embs": prefix.embeddings,
        "prefix_pad_mask": valid,
        # All False in the reference's convention: one block in which everything sees everything.
        "prefix_att_mask": torch.zeros_like(valid),
        "prefix_position_ids": prefix.position_ids,
        "prefix_last_hidden": cache.last_hidden,
        "k_cache": torch.stack(cache.keys),
        "v_cache": torch.stack(cache.values),
        "suffix_position_ids": suffix_position_ids(valid, noise.shape[1]),
        "suffix_embs_step0": model.action_in_proj(noise),
        "suffix_out_step0": model.expert_hidden(noise, torch.ones(len(noise)), cache),
    }
    in_use = {}
    for steps in counts:
        tensors |= {f"n{steps}.{name}": value for name, value in _steps(model, cache, noise, steps).items()}
        in_use[final_name(steps)] = model.sample_actions(model.embed_prefix(**arguments), noise, steps)
    # What stands at masked tokens depends on how a query without visible keys is handled; no action depends on it.
    rows, heads = valid[..., None], valid[None, :, None, :, None]
    masks = {"prefix_embs": rows, "prefix_last_hidden": rows, "k_cache": heads, "v_cache": heads}
    return Produced(tensors, masks, in_use)


def case_arguments(model: Pi05, inputs: Mapping[str, Tensor], case: str) -> tuple[dict, Tensor]:
    """Arguments of ``embed_prefix`` and the start noise of a case."""
    config = model.config
    noise = need(inputs, case, "noise", (None, config.action_horizon, config.action_dim), True)
    batch, size = noise.shape[0], config.vision.image_size
    cameras = sorted(int(name[6:]) for name in inputs if re.fullmatch(r"image_\d+", name)) or [0]
    tokens = need(inputs, case, "tokens", (batch, None), False)
    mask = need(inputs, case, "token_mask", tuple(tokens.shape), False).bool()
    check_tokens(tokens, mask, config.vocab_size, case)
    arguments = {
        "images": [need(inputs, case, f"image_{j}", (batch, 3, size, size), True) for j in cameras],
        "image_masks": [need(inputs, case, f"image_mask_{j}", (batch,), False).bool() for j in cameras],
        "tokens": tokens,
        "token_mask": mask,
        "state": inputs.get("state"),
    }
    return arguments, noise


def _steps(model: Pi05, cache: PrefixCache, noise: Tensor, steps: int) -> dict[str, Tensor]:
    done = list(model.denoise(cache, noise, steps))
    times = torch.tensor(euler_times(steps))
    return {
        "time": times,
        "time_emb": model.time_embedding(times),
        "adarms_cond": model.time_condition(times),
        "v_t": torch.stack([step.velocity for step in done]),
        "x_t": torch.stack([step.actions for step in done]),
        "actions": done[-1].actions,
    }

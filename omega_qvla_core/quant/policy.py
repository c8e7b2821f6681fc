"""Quantize a policy: calibrate on observations, quantize every linear in scope, measure the actions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.action_error import compare_actions
from omega_qvla_core.quant.build import SiteResult
from omega_qvla_core.quant.calibrate import RESERVOIR_TOKENS, Calibration, calibrate
from omega_qvla_core.quant.quantizable import PolicyT, QuantizablePolicy
from omega_qvla_core.quant.quantize import Progress, check_overrides, quantize_linears
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.record import QuantizationRecord, attach_record
from omega_qvla_core.quant.report import QuantReport, report, unquantized_tensors
from omega_qvla_core.quant.scope import SIDES, InputSite, find_sites
from omega_qvla_core.quant.whole import apply_whole, contract_embodiment

# The published calibration uses ten observations (METHOD A.9); fewer leave scales to chance.
MIN_OBSERVATIONS = 8

# Observations that run through a model together. GR00T N1.5 attends to padding: prompts of different lengths would
# change each other's actions, so that they run one by one, as they do on a robot.
BATCH = {"pi05": 8, "gr00t_n15": 1}

_LARGEST_HALF = 65504.0


def quantize_policy(
    policy: PolicyT,
    recipe: Recipe,
    observations: Sequence[Observation],
    *,
    progress: Progress | None = None,
    seed: int = 0,
    evaluation: Sequence[Observation] | None = None,
) -> tuple[PolicyT, QuantReport]:
    """Quantize every linear in scope.

    Args:
        policy: The unquantized policy; it is left untouched.
        recipe: How, such as ``Recipe.preset("executable_w4a4")``.
        observations: At least ``MIN_OBSERVATIONS``, better 128, recorded in the middle of rollouts.
        progress: Called with (done, total, what is next).
        seed: Noise of observation i is drawn from ``seed + i``.
        evaluation: Observations to measure the action error on; those of the calibration if None.

    Returns:
        The quantized policy and its report.

    Raises:
        QuantizationError: Too few observations, NaN or Inf in a tensor of the model, or a layer that cannot be done as
            the recipe asks.
        ConfigError: An override of the recipe matches no linear.
    """
    if len(observations) < MIN_OBSERVATIONS:
        raise QuantizationError(
            f"{len(observations)} calibration observations; at least {MIN_OBSERVATIONS} are needed, 128 are better"
        )
    sites = find_sites(policy.model, whole=recipe.whole is not None)
    check_overrides(recipe, sites)
    _check_finite(policy.model)
    model = copy.deepcopy(policy.model).float().requires_grad_(False)
    if recipe.whole is not None:
        apply_whole(model, recipe.whole, policy.spec.num_steps, contract_embodiment(policy.description))
    round_unquantized(model, recipe, sites)
    # The copy is calibrated with its rounded parts in place: that is where the quantized linears will work.
    rounded = policy.with_model(model)
    calibration = calibrate_policy(rounded, sites, observations, seed=seed, progress=progress)
    results = quantize_linears(model, sites, recipe, calibration, progress=progress)
    attach_record(model, _record(policy, recipe, observations, calibration, seed, results))
    quantized = policy.with_model(model, quantization=recipe.name)
    checked = list(observations if evaluation is None else evaluation)
    seeds = [seed + index for index in range(len(checked))]
    ours, theirs = (model_actions(one, checked, seeds) for one in (quantized, policy))
    actions = compare_actions(ours, theirs, policy.spec.action_names)
    return quantized, report(quantized, actions, {one.site.spec.name: one.profile for one in results})


def calibrate_policy(
    policy: QuantizablePolicy,
    sites: Sequence[InputSite],
    observations: Sequence[Observation],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    reservoir_tokens: int = RESERVOIR_TOKENS,
) -> Calibration:
    """Run every observation once through prefix and denoise loop and keep statistics of the linears' inputs.

    Also the last language layer is run to its end: its outputs reach no action, but its linears are quantized too.
    """
    with torch.no_grad(), calibrate(policy.model, sites, reservoir_tokens=reservoir_tokens, seed=seed) as calibration:
        size = BATCH[policy.spec.family]
        for start in range(0, len(observations), size):
            if progress is not None:
                progress(start, len(observations), "calibration")
            batch = observations[start : start + size]
            noise = policy.noise(len(batch), [seed + start + index for index in range(len(batch))])
            _run(policy, batch, noise, calibration)
    return calibration


def model_actions(policy: QuantizablePolicy, observations: Sequence[Observation], seeds: Sequence[int]) -> Tensor:
    """Normalised actions ``[N, horizon, action width]`` of the model, noise of each observation from its seed."""
    parts, size = [], BATCH[policy.spec.family]
    with torch.no_grad():
        for start in range(0, len(observations), size):
            batch = observations[start : start + size]
            parts.append(_run(policy, batch, policy.noise(len(batch), seeds[start : start + size])))
    return torch.cat(parts)


def round_unquantized(model: nn.Module, recipe: Recipe, sites: Sequence[InputSite]) -> None:
    """Round every tensor that is not quantized to the type that a pack stores it in, in place.

    So the quantized model in memory and the one loaded from its pack are the same, bit for bit.

    Raises:
        QuantizationError: A tensor that the recipe leaves at 16 bits has values beyond float16.
    """
    sides = {reader: site.side for site in sites for reader in site.readers}
    other = getattr(torch, recipe.unquantized_dtype)
    with torch.no_grad():
        for name, tensor in unquantized_tensors(model).items():
            owner = name.rpartition(".")[0]
            if not tensor.is_floating_point() or (owner in sides and recipe.resolve(owner, sides[owner]).quantized):
                continue
            dtype = torch.float16 if sides.get(owner) in SIDES else other
            if dtype == torch.float16 and float(tensor.abs().max()) > _LARGEST_HALF:
                raise QuantizationError(f"{name} has values beyond float16; quantize it or check the checkpoint")
            tensor.copy_(tensor.to(dtype))


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise QuantizationError(f"{name} holds NaN or Inf; check the checkpoint")


def _run(
    policy: QuantizablePolicy, batch: Sequence[Observation], noise: Tensor, calibration: Calibration | None = None
) -> Tensor:
    model = policy.model
    inputs = policy.processor.prepare(batch, policy.device)
    prefix = inputs.embed(model)
    if calibration is None:
        cache = model.encode_prefix(prefix)
    else:
        with calibration.token_mask(prefix.pad_mask):
            cache = model.encode_prefix(prefix)
    return model.sample_actions(cache, noise.to(policy.device), policy.spec.num_steps)


def _record(
    policy: QuantizablePolicy,
    recipe: Recipe,
    observations: Sequence[Observation],
    calibration: Calibration,
    seed: int,
    results: Sequence[SiteResult],
) -> QuantizationRecord:
    return QuantizationRecord(
        recipe=recipe,
        num_steps=policy.spec.num_steps,
        source={"name": policy.spec.name, "sha256": tensors_hash(policy.model.state_dict())},
        calibration=calibration_manifest(observations, seed, calibration.reservoir_tokens),
        sites={
            one.site.spec.name: {"error": one.error, "per_step": one.per_step, "notes": one.notes}
            | ({} if one.decision is None else {"decision": one.decision})
            for one in results
        },
        libraries={"torch": torch.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__},
    )


def calibration_manifest(observations: Sequence[Observation], seed: int, reservoir_tokens: int) -> dict[str, Any]:
    """What a pack says about its calibration."""
    return {
        "observations": len(observations),
        "sha256": [observation_hash(observation) for observation in observations],
        "noise_seeds": [seed, seed + len(observations) - 1],
        "reservoir_tokens": reservoir_tokens,
    }


def observation_hash(observation: Observation) -> str:
    """SHA-256 over images (by key), state and instruction; first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for key in sorted(observation.images):
        image = np.ascontiguousarray(observation.images[key])
        digest.update(f"{key}{image.shape}".encode() + image.tobytes())
    digest.update(np.asarray(observation.state, dtype=np.float64).tobytes() + observation.instruction.encode())
    return digest.hexdigest()[:16]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and contents of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

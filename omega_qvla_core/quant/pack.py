"""Packs: a quantized policy in a folder, from which it comes back bit for bit without the original weights.

``pack.safetensors`` holds ``quantized.SITE.TENSOR`` (codes two per byte, scales, rotations, tables),
``part.NAME.TENSOR`` (scope ``whole``: token table, step tables, embodiment weights) and ``float.NAME`` (all else, in
bfloat16); its metadata holds the recipe, the description of every site, the calibration manifest and a hash over all
tensors. ``config.json``, ``norm_stats.json`` and ``tokenizer.json`` lie beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omega_qvla_core.checkpoints.description import CONFIG_FILE, PolicyDescription, read_description, write_description
from omega_qvla_core.checkpoints.families import ModelConfig, build_model
from omega_qvla_core.checkpoints.folder import PACK_FILE, resolve_folder
from omega_qvla_core.errors import ConfigError, PackError
from omega_qvla_core.models.empty import on_meta_device
from omega_qvla_core.quant.linear import quantized_sites, replace_linears
from omega_qvla_core.quant.parts import StoredPart, build_part, replace_module, stored_parts
from omega_qvla_core.quant.policy import tensors_hash
from omega_qvla_core.quant.quantizable import QuantizablePolicy
from omega_qvla_core.quant.recipe import INTEGER_MULTIPLIER, Recipe
from omega_qvla_core.quant.record import QuantizationRecord, attach_record, record_of
from omega_qvla_core.quant.report import unquantized_tensors
from omega_qvla_core.quant.scope import linear_side
from omega_qvla_core.quant.site import QuantizedSite, SiteSpec
from omega_qvla_core.quant.whole import whole_targets
from omega_qvla_core.strict_json import dataclass_from_json, dataclass_to_json
from omega_qvla_core.whole_file import write_whole

PACK_FORMAT = "omega-qvla-pack-1"
_METADATA = ("format", "model_sha256", "content_sha256", "record", "sites")


def save_pack(policy: QuantizablePolicy, folder: str | Path) -> Path:
    """Write a quantized policy.

    Args:
        policy: From ``quantize_policy`` or ``load_pack``.
        folder: Made if it does not exist.

    Returns:
        The path of ``pack.safetensors``.

    Raises:
        QuantizationError: The policy is not quantized.
        PackError: A tensor was changed after quantization, so that the pack could not reproduce it.
    """
    folder = Path(folder)
    record = record_of(policy.model)
    tensors: dict[str, Tensor] = {}
    sites = []
    for site in quantized_sites(policy.model):
        sites.append(dataclass_to_json(site.spec))
        for name, tensor in site.tensors().items():
            tensors[f"quantized.{site.spec.name}.{name}"] = tensor.detach().cpu().contiguous()
    parts = dict(stored_parts(policy.model))
    for part_name, part in parts.items():
        for name, tensor in part.tensors().items():
            tensors[f"part.{part_name}.{name}"] = tensor.detach().cpu().contiguous()
    for name, tensor in unquantized_tensors(policy.model).items():
        tensors[f"float.{name}"] = _stored(name, tensor, record.recipe)
    metadata = {
        "format": PACK_FORMAT,
        "model_sha256": model_hash(policy.description),
        "content_sha256": tensors_hash(tensors),
        "record": json.dumps(record.to_json()),
        "sites": json.dumps(sites),
    }
    if parts:
        metadata["parts"] = json.dumps({name: part.spec for name, part in parts.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_description(policy.description, folder)
    write_whole(folder / PACK_FILE, lambda partial: save_file(tensors, partial, metadata=metadata))
    return folder / PACK_FILE


def read_pack(folder: str | Path) -> tuple[PolicyDescription, nn.Module, str]:
    """Read a pack folder.

    Args:
        folder: What ``save_pack`` wrote, or the name of a shipped pack.

    Returns:
        Description, quantized model on the CPU, and name of the recipe.

    Raises:
        PackError: The file is missing or damaged, was made for another model or number of denoise steps.
        ConfigError: A configuration file or the recipe has an unknown key or value.
    """
    folder = resolve_folder(folder)
    description = read_description(folder)
    path = folder / PACK_FILE
    metadata, tensors = _read(path)
    record = _record(path, metadata)
    _check_identity(path, metadata, record, description)
    if metadata["content_sha256"] != tensors_hash(tensors):
        raise PackError(f"{path} is damaged: its tensors do not match their hash; fetch it again")
    model = model_without_weights(description.model).requires_grad_(False)
    for name, part in _parts(path, metadata, tensors, model):
        replace_module(model, name, part)
    for spec in _specs(path, metadata):
        replace_linears(model, _site(path, spec, tensors))
    _load_floats(path, model, tensors)
    _check_scope(path, model, record.recipe)
    attach_record(model, record)
    return description, model, record.recipe.name


def read_record(folder: Path) -> QuantizationRecord:
    """What a pack folder says about its quantization; no tensor is read.

    Raises:
        PackError: The file is missing or damaged.
        ConfigError: The record is of another version.
    """
    path = folder / PACK_FILE
    return _record(path, _read(path, with_tensors=False)[0])


def model_hash(description: PolicyDescription) -> str:
    """SHA-256 of the model's sizes; packs fit models of the same sizes only."""
    return hashlib.sha256(json.dumps(description.model.to_json(), sort_keys=True).encode()).hexdigest()


def description_hash(description: PolicyDescription) -> str:
    """SHA-256 of all that ``write_description`` writes: model, policy or robot setup, statistics, tokenizer."""
    digest = hashlib.sha256()
    with TemporaryDirectory() as folder:
        write_description(description, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _stored(name: str, tensor: Tensor, recipe: Recipe) -> Tensor:
    """The tensor in the type that it is stored in; it must survive that."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor.contiguous()
    dtype = torch.float16 if linear_side(name.rpartition(".")[0]) else getattr(torch, recipe.unquantized_dtype)
    stored = tensor.to(dtype)
    if not torch.equal(stored.to(tensor.dtype), tensor):
        raise PackError(f"{name} was changed after quantization and does not fit {dtype}; quantize the policy again")
    return stored.contiguous()


def _read(path: Path, with_tensors: bool = True) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise PackError(f"{path} is missing; a pack folder holds its tensors there")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (file.keys() if with_tensors else ())}
    except (SafetensorError, OSError) as error:
        raise PackError(f"{path} is damaged ({error}); fetch it again") from error
    missing = [key for key in _METADATA if key not in metadata]
    if missing or metadata["format"] != PACK_FORMAT:
        found = metadata.get("format", "no format")
        raise PackError(
            f"{path} is not a pack that this release reads: {found}, expected {PACK_FORMAT}; quantize again"
        )
    return metadata, tensors


def _record(path: Path, metadata: Mapping[str, str]) -> QuantizationRecord:
    try:
        return QuantizationRecord.from_json(json.loads(metadata["record"]))
    except json.JSONDecodeError as error:
        raise PackError(f"{path} is damaged: its record is not JSON ({error}); fetch it again") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_identity(
    path: Path, metadata: Mapping[str, str], record: QuantizationRecord, description: PolicyDescription
) -> None:
    if metadata["model_sha256"] != model_hash(description):
        raise PackError(
            f"{path} was made for another model than {CONFIG_FILE} beside it describes (source "
            f"{record.source.get('name')!r}); use the folder as it was written"
        )
    if record.num_steps != description.policy.num_steps:
        raise PackError(
            f"{path} was calibrated for {record.num_steps} denoise steps, but {CONFIG_FILE} asks for "
            f"{description.policy.num_steps}; use {record.num_steps} or quantize again"
        )


def _specs(path: Path, metadata: Mapping[str, str]) -> list[SiteSpec]:
    try:
        data = json.loads(metadata["sites"])
        return [dataclass_from_json(SiteSpec, one, f"sites[{index}]") for index, one in enumerate(data)]
    except (json.JSONDecodeError, TypeError) as error:
        raise PackError(f"{path} is damaged: its list of sites is unreadable ({error}); fetch it again") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _site(path: Path, spec: SiteSpec, tensors: Mapping[str, Tensor]) -> QuantizedSite:
    prefix = f"quantized.{spec.name}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    needed = ["codes", "scales", "activation"]
    if spec.recipe.scale_format == INTEGER_MULTIPLIER:
        needed.append("multipliers")
    missing = [name for name in needed if name not in own]
    if missing:
        raise PackError(f"{path} lacks {prefix}{missing[0]}; fetch it again")
    if own["codes"].shape[0] != spec.out_features or own["scales"].shape[0] != spec.out_features:
        raise PackError(f"{path}: {spec.name} has {own['codes'].shape[0]} rows, its description {spec.out_features}")
    return QuantizedSite(spec, own)


def _parts(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], model: nn.Module
) -> Iterator[tuple[str, StoredPart]]:
    """What scope ``whole`` stores besides linears."""
    try:
        specs = json.loads(metadata.get("parts", "{}"))
        known = whole_targets(model) if specs else ()
        for name, spec in specs.items():
            if name not in known:
                raise PackError(f"{path} describes {name}, which is no part of scope 'whole' of this model")
            prefix = f"part.{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            yield name, build_part(f"{path}: {name}", spec, own)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise PackError(f"{path} is damaged: its list of parts is unreadable ({error}); fetch it again") from error


def model_without_weights(config: ModelConfig) -> nn.Module:
    """A model on the meta device, so that the weights that a pack replaces never take memory.

    Where a module computes a buffer of its own at its start (the keypoint encoder), the model is built for real.
    """
    with on_meta_device():
        model = build_model(config)
    stored = model.state_dict().keys()
    own = [name for name, _ in model.named_buffers() if name not in stored]
    return build_model(config) if own else model


def _load_floats(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy every unquantized tensor; names and shapes must match exactly."""
    stored = {name.removeprefix("float."): tensor for name, tensor in tensors.items() if name.startswith("float.")}
    wanted = unquantized_tensors(model)
    different = sorted(stored.keys() ^ wanted.keys())
    if different:
        raise PackError(f"{path} and {CONFIG_FILE} differ in {len(different)} tensors, such as {different[0]}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != stored[name].shape:
                raise PackError(
                    f"{path}: {name} has shape {tuple(stored[name].shape)}, the model needs {tuple(tensor.shape)}"
                )
            if tensor.is_meta:
                _assign(model, name, stored[name].to(tensor.dtype, copy=True))
            else:
                tensor.copy_(stored[name])


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path) if path else model
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _check_scope(path: Path, model: nn.Module, recipe: Recipe) -> None:
    """No linear may be left in float that the recipe quantizes."""
    for name, module in model.named_modules():
        side = linear_side(name, whole=recipe.whole is not None)
        if side and isinstance(module, nn.Linear) and recipe.resolve(name, side).quantized:
            raise PackError(f"{path} holds no quantized {name}, though its recipe {recipe.name!r} asks for it")

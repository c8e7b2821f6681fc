"""What a quantized model takes, by arithmetic on sizes alone (METHOD A.11): no weight is needed, any machine will do.

Three numbers belong together: the linears in scope, the whole model, and the file on disk. The base of the whole
model is float16 of every tensor that inference reads; output heads that nothing reads and SigLIP's pooling head are on
neither side (the models here do not have them at all).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from omega_qvla_core.checkpoints.families import ModelConfig, build_model
from omega_qvla_core.kernels import packed_columns
from omega_qvla_core.models.gr00t_embodiment import EmbodimentLinear
from omega_qvla_core.quant.multiplier import MULTIPLIER_BITS
from omega_qvla_core.quant.quantize import split_site
from omega_qvla_core.quant.recipe import INTEGER_MULTIPLIER, Recipe, SideRecipe, WholeRecipe
from omega_qvla_core.quant.rotation import STORED_ROTATIONS
from omega_qvla_core.quant.scales import group_count
from omega_qvla_core.quant.scope import ACTION_HEAD, InputSite, find_sites
from omega_qvla_core.quant.whole import kept_embodiments, table_names, whole_targets

_HALF, _FLOAT = 2, 4
_OUTPUT_BLOCK = 64
_INT16_CHANNELS = 32767

# The published accounting (METHOD A.11).
_PAPER_GROUP, _PAPER_BLOCK = 128, 64


@dataclass(frozen=True)
class Accounting:
    """Bytes before and after.

    Attributes:
        fp16: As float16.
        stored: As a pack stores it, every table counted.
    """

    fp16: int
    stored: int

    @property
    def saved(self) -> float:
        """Share that is saved, 0 to 1."""
        return 1.0 - self.stored / self.fp16


def meta_model(config: ModelConfig) -> nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return build_model(config)


def paper_accounting(model: nn.Module, num_steps: int) -> Accounting:
    """The published count: per linear 4-bit codes, a float16 scale per row and 128 columns, a 64 x 64 float16 rotation
    per 64 columns, an int32 permutation, and for the action head a float16 scale per channel and step."""
    fp16 = stored = 0
    for site in find_sites(model):
        for reader in site.readers:
            rows, columns = model.get_submodule(reader).weight.shape
            fp16 += rows * columns * _HALF
            stored += rows * packed_columns(columns, 4) + rows * group_count(columns, _PAPER_GROUP) * _HALF
            stored += _block_bytes(columns, _PAPER_BLOCK) + columns * 4
            stored += columns * num_steps * _HALF if site.side == ACTION_HEAD else 0
    return Accounting(fp16, stored)


def scope_accounting(model: nn.Module, recipe: Recipe, num_steps: int) -> Accounting:
    """The linears in the recipe's scope, every stored tensor counted; weights alone on the float16 side.

    Args:
        model: Unquantized; may be on the meta device.
        recipe: With or without ``whole``.
        num_steps: Denoise steps.
    """
    fp16 = stored = 0
    for site in find_sites(model, whole=recipe.whole is not None):
        fp16 += sum(model.get_submodule(reader).weight.numel() for reader in site.readers) * _HALF
        stored += sum(_split_bytes(model, site, recipe, num_steps))
    return Accounting(fp16, stored)


def whole_accounting(model: nn.Module, recipe: Recipe, num_steps: int, contract: int | None = None) -> Accounting:
    """Every tensor that inference reads.

    Args:
        model: Unquantized; may be on the meta device.
        recipe: With or without ``whole``; what it does not quantize counts as 16 bits.
        num_steps: Denoise steps.
        contract: Embodiment of the robot setup, for ``embodiments="contract"``.
    """
    whole = recipe.whole
    sites = find_sites(model, whole=whole is not None)
    replaced = [reader for site in sites for reader in site.readers]
    stored = sum(sum(_split_bytes(model, site, recipe, num_steps)) for site in sites)
    if whole is not None:
        kept = kept_embodiments(model, whole, contract)
        for name in whole_targets(model):
            replaced.append(name)
            stored += part_bytes(model, name, whole, num_steps, len(kept))
    starts = tuple(f"{name}." for name in replaced)
    tensors = model.state_dict()
    left = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(starts))
    return Accounting(sum(tensor.numel() for tensor in tensors.values()) * _HALF, stored + left * _HALF)


def site_bytes(rows: Sequence[int], columns: int, recipe: SideRecipe, table_rows: int, biased: bool) -> dict[str, int]:
    """Bytes of one quantized site by part.

    Args:
        rows: Outputs of each reader.
        columns: Inputs.
        recipe: Of all readers.
        table_rows: Denoise steps of its tables, 1 without.
        biased: Whether a reader has a bias.
    """
    outputs = sum(rows)
    parts = {
        "codes": outputs * packed_columns(columns, recipe.weight_bits),
        "weight_scales": outputs * _row_scale_bytes(columns, recipe),
        "activation_tables": (table_rows if recipe.per_step else 1) * _table_width(columns, recipe) * _FLOAT,
        "low_rank": recipe.low_rank * (outputs + columns) * _HALF,
    }
    if recipe.smoothing is not None:
        parts["smoothing"] = columns * _HALF
    if recipe.permutation != "none":
        parts["permutation"] = columns * (2 if columns <= _INT16_CHANNELS else 4)
    if recipe.rotation in STORED_ROTATIONS:
        parts["input_rotation"] = _block_bytes(columns, recipe.block)
    if recipe.output_rotation:
        parts["output_rotation"] = _block_bytes(outputs, _OUTPUT_BLOCK)
    if recipe.centring:
        parts["centring"] = (table_rows if recipe.per_step else 1) * (columns + outputs) * _HALF
    if biased:
        parts["bias"] = outputs * _FLOAT
    return {name: size for name, size in parts.items() if size}


def part_bytes(model: nn.Module, name: str, recipe: WholeRecipe, num_steps: int, kept: int) -> int:
    """Bytes of what takes the place of one of ``whole_targets``."""
    module = model.get_submodule(name)
    if name in table_names(model):
        return num_steps * module.out_features * _HALF
    if isinstance(module, nn.Embedding):
        return _coded(module.num_embeddings, module.embedding_dim, recipe.embedding_bits, recipe.embedding_group)
    if isinstance(module, EmbodimentLinear):
        _, columns, rows = module.W.shape
        return kept * (_coded(rows, columns, recipe.embodiment_bits, recipe.embodiment_group) + rows * _HALF)
    return 0


def _coded(rows: int, columns: int, bits: int, group: int) -> int:
    return rows * (packed_columns(columns, bits) + group_count(columns, group) * _HALF)


@dataclass(frozen=True)
class LinearSize:
    """Rows, columns, and whether there is a bias."""

    rows: int
    columns: int
    bias: bool


def linears_bytes(site: InputSite, sizes: Mapping[str, LinearSize], recipe: Recipe, num_steps: int) -> Iterator[int]:
    """Bytes of what is quantized together of a site, and of its linears that stay at 16 bits.

    Args:
        site: An input and its readers.
        sizes: By reader.
        recipe: Its overrides apply.
        num_steps: Denoise steps.
    """
    # Keys and values of the features are computed once per observation, outside the denoise loop.
    in_loop = site.side == ACTION_HEAD and not site.name.endswith(".kv")
    for _, readers, chosen in split_site(site, recipe):
        linears = [sizes[reader] for reader in readers]
        if not chosen.quantized:
            yield sum(one.rows * one.columns + one.rows * one.bias for one in linears) * _HALF
            continue
        steps = num_steps if in_loop and (chosen.activation != "none" or chosen.centring) else 1
        rows, biased = [one.rows for one in linears], any(one.bias for one in linears)
        yield sum(site_bytes(rows, linears[0].columns, chosen, steps, biased).values())


def _split_bytes(model: nn.Module, site: InputSite, recipe: Recipe, num_steps: int) -> Iterator[int]:
    linears = {reader: model.get_submodule(reader) for reader in site.readers}
    sizes = {name: LinearSize(*one.weight.shape, one.bias is not None) for name, one in linears.items()}
    return linears_bytes(site, sizes, recipe, num_steps)


def _row_scale_bytes(columns: int, recipe: SideRecipe) -> int:
    """Bytes of the weight scales of one row."""
    groups = group_count(columns, recipe.group)
    if recipe.scale_format == INTEGER_MULTIPLIER:
        return _FLOAT + packed_columns(groups, MULTIPLIER_BITS)
    return groups * _HALF


def _table_width(columns: int, recipe: SideRecipe) -> int:
    """Entries of one row of the activation table: a scale per channel, a clip ratio per group, or one."""
    if recipe.activation == "static_channel":
        return columns
    return -(-columns // min(recipe.activation_group, columns)) if recipe.activation == "token_group" else 1


def _block_bytes(size: int, block: int) -> int:
    """float16 blocks on a diagonal, the last one short."""
    full, rest = divmod(size, min(block, size))
    return (full * min(block, size) ** 2 + rest**2) * _HALF

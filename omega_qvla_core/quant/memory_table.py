"""The memory figures of the two foundation models at full size, and of packs on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from omega_qvla_core.checkpoints.description import read_description
from omega_qvla_core.checkpoints.families import ModelConfig
from omega_qvla_core.checkpoints.folder import PACK_FILE, resolve_folder
from omega_qvla_core.checkpoints.pi05_sizes import DEFAULT_EXPERT, DEFAULT_LANGUAGE, MAX_TOKENS, pi05_config
from omega_qvla_core.errors import PackError
from omega_qvla_core.models.gr00t_config import Gr00tConfig, Qwen3Config, StackConfig
from omega_qvla_core.models.gr00t_embodiment import EmbodimentLinear
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.quant.memory import (
    Accounting,
    meta_model,
    paper_accounting,
    scope_accounting,
    whole_accounting,
)
from omega_qvla_core.quant.pack import read_record
from omega_qvla_core.quant.presets import PRESETS
from omega_qvla_core.quant.recipe import Recipe, WholeRecipe, eight_bit_side
from omega_qvla_core.quant.record import QuantizationRecord
from omega_qvla_core.quant.whole import contract_embodiment

PI05_STEPS = 10
GR00T_STEPS = 8
"""Steps of the published tables; GR00T N1.5's own default is 4, which takes less."""
_GR00T_EMBODIMENT = 31
"""Any one: all embodiments are of one size."""

_SIGLIP = SiglipConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304, patch_size=14, image_size=224)


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table.

    Attributes:
        model: Name.
        scope: What is counted.
        recipe: How it is quantized.
        bytes: Before and after, by arithmetic.
        file_bytes: Size of a pack on disk, None where none was made.
    """

    model: str
    scope: str
    recipe: str
    bytes: Accounting
    file_bytes: int | None = None


def full_size_pi05() -> Pi05Config:
    """Pi 0.5 as released (a chunk's length changes no size)."""
    return pi05_config(DEFAULT_LANGUAGE, DEFAULT_EXPERT, 32, 50, MAX_TOKENS, 224, "full size")


def full_size_gr00t() -> Gr00tConfig:
    """GR00T N1.5 3B as released."""
    return Gr00tConfig(
        language=Qwen3Config(
            width=2048,
            depth=12,
            mlp_dim=6144,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151680,
            image_token_id=151669,
        ),
        vision=_SIGLIP,
        feature_width=2048,
        adapter=StackConfig(depth=4, num_heads=32, head_dim=64),
        dit=StackConfig(depth=16, num_heads=32, head_dim=48),
        hidden_size=1024,
        future_tokens=32,
        state_dim=64,
        action_dim=32,
        action_horizon=16,
    )


def full_size_rows() -> list[MemoryRow]:
    """The figures of both models, published and ours."""
    rows = []
    for name, config, steps in (
        ("Pi 0.5", full_size_pi05(), PI05_STEPS),
        ("GR00T N1.5", full_size_gr00t(), GR00T_STEPS),
    ):
        model = meta_model(config)
        ours = PRESETS["executable_w4a4"]
        rows.append(MemoryRow(name, "paper", "published accounting", paper_accounting(model, steps)))
        for rotation in ("hadamard", "svd_hadamard"):
            recipe = ours.replace_sides(rotation=rotation)
            rows.append(MemoryRow(name, "paper", f"{ours.name}, {rotation}", scope_accounting(model, recipe, steps)))
        for label, whole in whole_variants(isinstance(config, Gr00tConfig)).items():
            found = whole_accounting(model, replace(ours, whole=whole), steps, _GR00T_EMBODIMENT)
            rows.append(MemoryRow(name, "whole", label, found))
            if whole.embodiments == "contract":
                rows.append(MemoryRow(name, "whole", f"{label}, on both sides", _without_others(model, found)))
    return rows


def _full_sizes() -> tuple[tuple[str, ModelConfig, int], ...]:
    return ("Pi 0.5", full_size_pi05(), PI05_STEPS), ("GR00T N1.5", full_size_gr00t(), GR00T_STEPS)


def whole_variants(embodiments: bool) -> dict[str, WholeRecipe]:
    """Recipes of scope ``whole`` by what they say; the first one is the default."""
    four = eight_bit_side(4, 64)
    if embodiments:
        return {
            "all 32 embodiments": WholeRecipe(),
            "contract's embodiment": WholeRecipe(embodiments="contract"),
            "all 32 embodiments, 4-bit vision": WholeRecipe(vision=four),
            "contract's embodiment, 4-bit vision": WholeRecipe(vision=four, embodiments="contract"),
        }
    return {
        "4-bit embeddings, 8-bit vision": WholeRecipe(),
        "both 4-bit": WholeRecipe(vision=four),
        "both 8-bit": WholeRecipe(embedding_bits=8, embedding_group=0),
    }


def pack_rows(folders: Sequence[str | Path]) -> list[MemoryRow]:
    """Packs on disk beside the arithmetic of their recipe.

    Raises:
        CheckpointError: There is no such folder.
        PackError: It holds no whole pack, or its recipe was chosen layer by layer.
    """
    rows = []
    for folder in map(resolve_folder, folders):
        description, record = read_description(folder), read_record(folder)
        if record.recipe.auto is not None:
            raise PackError(f"{folder}: its layers were chosen one by one; its report lists their bytes")
        model, recipe = meta_model(description.model), record.recipe
        contract = contract_embodiment(description) if recipe.whole is not None else None
        found = whole_accounting(model, recipe, record.num_steps, contract)
        size = (folder / PACK_FILE).stat().st_size
        scope = "whole" if recipe.whole is not None else "paper"
        rows.append(MemoryRow(description.name, f"model, scope {scope}", recipe.name, found, size))
        rows.append(MemoryRow(description.name, f"linears, scope {scope}", recipe.name, _scope(model, recipe, record)))
    return rows


def _scope(model: nn.Module, recipe: Recipe, record: QuantizationRecord) -> Accounting:
    return scope_accounting(model, recipe, record.num_steps)


def _without_others(model: nn.Module, found: Accounting) -> Accounting:
    """The embodiments that are not kept taken off the base, too."""
    tables = [module for module in model.modules() if isinstance(module, EmbodimentLinear)]
    others = sum((t.W.numel() + t.b.numel()) // t.W.shape[0] * (t.W.shape[0] - 1) for t in tables)
    return Accounting(found.fp16 - 2 * others, found.stored)

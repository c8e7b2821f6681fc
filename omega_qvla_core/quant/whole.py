"""Scope ``whole``: everything of a model that a robot needs, not the published linears alone.

On top of the linears of ``quant.scope`` it covers

- the linears of vision tower, projectors and adapter (8 bits: with 4-bit weights in the adapter the action error of
  the small GR00T doubles),
- the token table (4 bits, weight only),
- state and action encoders and the action decoder of GR00T N1.5 (4 bits, weight only), for all embodiments or for the
  one that the robot setup names,
- modulation layers and the time MLP before them: their outputs per denoise step become tables, their weights go.

What stays in bfloat16: norms, biases of norms, the patch convolution, positions, state, action and time projections,
and of the small keypoint encoder (the tabletop policy's) everything, for its outputs are image coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla_core.checkpoints.loading import Description
from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.gr00t_embodiment import EmbodimentLinear
from omega_qvla_core.models.gr00t_n15 import TOKEN_TABLE, Gr00tN15
from omega_qvla_core.models.pi05 import TIED_KEYS, Pi05
from omega_qvla_core.quant.parts import (
    QuantizedEmbedding,
    QuantizedEmbodimentLinear,
    StepTable,
    StoredPart,
    Unread,
    replace_module,
)
from omega_qvla_core.quant.recipe import WholeRecipe

_PI05_TOKEN_TABLE = next(iter(TIED_KEYS.values())).removesuffix(".weight")
_GR00T_TOKEN_TABLE = TOKEN_TABLE.removesuffix(".weight")


def whole_targets(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that ``apply_whole`` replaces, in model order."""
    wanted = {*table_names(model), *unread_names(model), token_table_name(model)}
    return tuple(
        name for name, module in model.named_modules() if name in wanted or isinstance(module, EmbodimentLinear)
    )


def token_table_name(model: nn.Module) -> str:
    """Name of the embedding of the prompt's tokens."""
    return _PI05_TOKEN_TABLE if isinstance(model, Pi05) else _GR00T_TOKEN_TABLE


def table_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modulation layers, in the order in which ``modulation_rows`` gives their outputs."""
    if isinstance(model, Pi05):
        start = "paligemma_with_expert.gemma_expert.model"
        norms = ("input_layernorm", "post_attention_layernorm")
        layers = [f"{start}.layers.{i}.{norm}.dense" for i in range(len(model.expert.layers)) for norm in norms]
        return (*layers, f"{start}.norm.dense")
    blocks = len(_gr00t(model).expert.transformer_blocks)
    start = "action_head.model"
    return (*(f"{start}.transformer_blocks.{i}.norm1.linear" for i in range(blocks)), f"{start}.proj_out_1")


def unread_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that feed modulation layers only."""
    return ("time_mlp_in", "time_mlp_out") if isinstance(model, Pi05) else ("action_head.model.timestep_encoder",)


def modulation_rows(model: nn.Module, num_steps: int) -> dict[str, Tensor]:
    """Outputs ``[T, O]`` of every modulation layer at the steps of the Euler loop, float32.

    Only the modulation layers, what feeds them, and ``step_device_names`` need weights; the rest may be on ``meta``.
    """
    names = table_names(model)
    with torch.no_grad():
        conditions = model.step_conditions(num_steps)
    if isinstance(model, Pi05):
        rows = [[*(one for pair in step.layers for one in pair), step.final] for step in conditions]
    else:
        rows = [list(step.modulations) for step in conditions]
    return {name: torch.cat([step[index].flatten(1) for step in rows]).float() for index, name in enumerate(names)}


def step_device_names(model: nn.Module) -> tuple[str, ...]:
    """Modules whose device tells the model where to compute its conditions."""
    return ("action_in_proj",) if isinstance(model, Pi05) else ("action_head.future_tokens",)


def kept_embodiments(model: nn.Module, recipe: WholeRecipe, contract: int | None) -> tuple[int, ...]:
    """Indices of the embodiments that a pack keeps.

    Raises:
        QuantizationError: The contract's are asked for, and the robot setup names none.
    """
    if not isinstance(model, Gr00tN15):
        return ()
    if recipe.embodiments == "all":
        return tuple(range(model.config.num_embodiments))
    if contract is None:
        raise QuantizationError("the robot setup names no embodiment; set embodiment_id, or keep 'all' embodiments")
    return (contract,)


def build_whole_part(
    name: str, module: nn.Module, rows: dict[str, Tensor], recipe: WholeRecipe, kept: tuple[int, ...]
) -> StoredPart:
    """What takes the place of one of ``whole_targets``.

    Args:
        name: Of the module.
        module: With weights, except where only its size is read (modulation layers and what feeds them).
        rows: From ``modulation_rows``.
        recipe: How.
        kept: From ``kept_embodiments``.
    """
    if name in rows:
        return StepTable.of(rows[name], _elements(module))
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.of(module.weight, recipe.embedding_bits, recipe.embedding_group)
    if isinstance(module, EmbodimentLinear):
        return QuantizedEmbodimentLinear.of(module, recipe.embodiment_bits, recipe.embodiment_group, kept)
    return Unread.of(_elements(module))


def apply_whole(model: nn.Module, recipe: WholeRecipe, num_steps: int, contract: int | None) -> None:
    """Replace everything that is no linear of a site, in place.

    Raises:
        QuantizationError: See ``kept_embodiments``.
    """
    kept = kept_embodiments(model, recipe, contract)
    rows = modulation_rows(model, num_steps)
    for name in whole_targets(model):
        replace_module(model, name, build_whole_part(name, model.get_submodule(name), rows, recipe, kept))
    model.forget_step_tables()


def contract_embodiment(description: Description) -> int | None:
    """Index of the embodiment that a policy's robot setup names, None if it names none."""
    found = getattr(description.processor(), "embodiment_id", None)
    return None if found is None else int(found)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gr00t(model: nn.Module) -> Gr00tN15:
    if not isinstance(model, Gr00tN15):
        raise QuantizationError(f"scope 'whole' knows Pi 0.5 and GR00T N1.5, not {type(model).__name__}")
    return model

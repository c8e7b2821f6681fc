"""Recipes by name."""

from __future__ import annotations

from dataclasses import replace

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.recipe import FLOAT_BITS, INTEGER_MULTIPLIER, Recipe, SideRecipe, WholeRecipe
from omega_qvla_core.quant.registry import unknown_name

_EXECUTABLE = SideRecipe()

# METHOD A.1 to A.7: nothing is shared, activations of the action head from per-step tables, language side per token.
_PAPER = SideRecipe(
    shared_input=False,
    smoothing=None,
    permutation="interleave",
    permutation_score="weight",
    rotation="svd_hadamard",
    output_rotation=True,
    group=128,
    scale_grid="paper",
)
_PAPER_LANGUAGE = replace(_PAPER, solver="blockwise_gptq", activation="token", clip="absmax", per_step=False)
_PAPER_ACTION_HEAD = replace(_PAPER, solver="rtn", activation="static_channel", clip="percentile")

# The plainest scheme: one scale per row, one per activation tensor.
_STATIC_ABSMAX = SideRecipe(
    smoothing=None,
    rotation="none",
    solver="rtn",
    group=0,
    scale_grid="absmax",
    activation="static_tensor",
    clip="absmax",
    per_step=False,
)
_STATIC_CLIP = replace(_STATIC_ABSMAX, scale_grid="fine", clip="mse")
# Needs no calibration, so that a model of any size goes through layer by layer.
_RTN = replace(_EXECUTABLE, smoothing=None, solver="rtn", scale_grid="paper", clip="absmax", per_step=False)
# For large language towers, whose time is products: one integer sum per row, whatever the hardware calls it. The
# action head is small, and its error is what the arm sees: it keeps a scale per group.
_FAST_LANGUAGE = replace(_EXECUTABLE, activation="token", group=0)
_FAST_MULTIPLIER = replace(_EXECUTABLE, activation="token", scale_format=INTEGER_MULTIPLIER)
_FLOAT = replace(_EXECUTABLE, weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS, activation="none", clip="absmax")


def _both(name: str, side: SideRecipe) -> Recipe:
    return Recipe(name, side, side)


PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _both("executable_w4a4", _EXECUTABLE),
        replace(_both("auto_w4a4", _EXECUTABLE), auto=AutoChoice()),
        Recipe("fast_w4a4", _FAST_LANGUAGE, _EXECUTABLE),
        Recipe("fast_multiplier_w4a4", _FAST_MULTIPLIER, _EXECUTABLE),
        Recipe("paper_w4a4", _PAPER_LANGUAGE, _PAPER_ACTION_HEAD),
        _both("w4a8", replace(_EXECUTABLE, activation_bits=8)),
        _both("w8a8", replace(_EXECUTABLE, weight_bits=8, activation_bits=8)),
        _both("w4a16", replace(_EXECUTABLE, activation_bits=FLOAT_BITS, activation="none", clip="absmax")),
        _both("fp16", _FLOAT),
        _both("rtn", _RTN),
        Recipe("rtn_whole", _RTN, _RTN, whole=WholeRecipe()),
        Recipe("executable_whole", _EXECUTABLE, _EXECUTABLE, whole=WholeRecipe()),
        _both("rtn_static_absmax", _STATIC_ABSMAX),
        _both("rtn_static_absmax_hadamard", replace(_STATIC_ABSMAX, rotation="hadamard")),
        _both("static_clip", _STATIC_CLIP),
        _both("static_clip_hadamard", replace(_STATIC_CLIP, rotation="hadamard")),
    )
}
"""The default is ``executable_w4a4``; ``rtn_static_absmax`` and the rows after it are for ablations."""

_ABLATED_ROTATIONS = ("none", "hadamard", "svd", "svd_hadamard")

# One thing is changed at a time: scales of the tensor's maximum, then searched, then one per token.
_LADDER = {
    "static_absmax": _STATIC_ABSMAX,
    "static_clip": _STATIC_CLIP,
    "token": replace(_STATIC_CLIP, activation="token"),
}

GRID: tuple[str, ...] = tuple(
    f"grid_{rotation}_{solver}_{steps}"
    for rotation in _ABLATED_ROTATIONS
    for solver in ("rtn", "gptq")
    for steps in ("perstep", "onestep")
)
"""Names of ``executable_w4a4`` with another rotation, solver and per-step clips on or off."""

ABLATIONS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(
            _both(f"{name}_{r}", replace(side, rotation=r))
            for name, side in _LADDER.items()
            for r in _ABLATED_ROTATIONS
        ),
        *(
            _both(
                f"grid_{rotation}_{solver}_{steps}",
                replace(_EXECUTABLE, rotation=rotation, solver=solver, per_step=steps == "perstep"),
            )
            for rotation in _ABLATED_ROTATIONS
            for solver in ("rtn", "gptq")
            for steps in ("perstep", "onestep")
        ),
    )
}
"""More recipes by name, for tables: ``static_absmax_ROTATION``, ``static_clip_ROTATION``, ``token_ROTATION`` (rounded
weights, one scale per row, no smoothing) and those of ``GRID``."""

_ACTIVATION_CHOICES = {
    "static": {"activation": "static_channel", "clip": "percentile"},
    "token": {"activation": "token"},
    "token_group": {"activation": "token_group"},
}


def with_activations(recipe: Recipe, choice: str) -> Recipe:
    """The recipe with another activation scheme where the recipe leaves a choice.

    A recipe whose action head uses static tables (the published method) leaves the choice on the language side only.

    Args:
        recipe: Any recipe.
        choice: ``static`` (per channel, simulated), ``token`` or ``token_group``.

    Raises:
        ConfigError: Another choice.
    """
    if choice not in _ACTIVATION_CHOICES:
        raise ConfigError(unknown_name("activation choice", choice, _ACTIVATION_CHOICES))
    name = f"{recipe.name}+{choice}"
    language = replace(recipe.language, **_changes(recipe.language, choice))
    if recipe.action_head.activation.startswith("static"):
        return replace(recipe, name=name, language=language)
    return replace(
        recipe,
        name=name,
        language=language,
        action_head=replace(recipe.action_head, **_changes(recipe.action_head, choice)),
    )


def _changes(side: SideRecipe, choice: str) -> dict[str, str]:
    changes = dict(_ACTIVATION_CHOICES[choice])
    if choice != "static" and side.clip == "percentile":
        changes["clip"] = "absmax"
    return changes

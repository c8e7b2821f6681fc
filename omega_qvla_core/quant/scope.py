"""Which linears are quantized, and which of them read the same input.

Scope ``paper`` follows METHOD A.9. Pi 0.5: the seven linears of every layer of the language tower and of the action
expert (252 at full size). GR00T N1.5: the seven of every language layer and the six of every block of the diffusion
transformer (180). Projections of state, action and time, modulation layers, vision tower and embeddings stay in float:
4-bit activations there are known to destroy the policy. Scope ``whole`` adds the linears of the vision tower and of
projectors and adapter, as sides of their own (see ``quant.whole`` for what else it covers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from omega_qvla_core.errors import QuantizationError

LANGUAGE = "language"
ACTION_HEAD = "action_head"
VISION = "vision"
ADAPTER = "adapter"
SIDES = (LANGUAGE, ACTION_HEAD)
"""Sides of scope ``paper``."""
WHOLE_SIDES = (*SIDES, VISION, ADAPTER)

_LINEARS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_BLOCK_LINEARS = r"transformer_blocks\.\d+\.(?:attn1\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2))"
_SIGLIP_LINEARS = r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"


def _names(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*\.)(?:{'|'.join(patterns)})$")


_SCOPE = {
    LANGUAGE: _names(
        rf"paligemma_with_expert\.paligemma\.model\.language_model\.layers\.\d+\.{_LINEARS}",
        rf"backbone\.eagle_model\.language_model\.model\.layers\.\d+\.{_LINEARS}",
    ),
    ACTION_HEAD: _names(
        rf"paligemma_with_expert\.gemma_expert\.model\.layers\.\d+\.{_LINEARS}",
        rf"action_head\.model\.{_BLOCK_LINEARS}",
    ),
    VISION: _names(
        rf"vision_tower\.vision_model\.{_SIGLIP_LINEARS}",
        rf"backbone\.eagle_model\.vision_model\.vision_model\.{_SIGLIP_LINEARS}",
    ),
    ADAPTER: _names(
        r"multi_modal_projector\.linear",
        r"backbone\.eagle_model\.mlp1\.0",
        r"backbone\.eagle_linear",
        rf"action_head\.vl_self_attention\.{_BLOCK_LINEARS}",
    ),
}

# Last part of a reader's name -> name of its site: q, k and v read one input, gate and up another.
_SITE_OF = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
}

# In a block that attends to features, keys and values read those, the queries its own tokens. They do not depend on
# the denoise step and run once per observation, outside the loop: their tables have one row.
_CROSS_SITE_OF = {"to_q": "q", "to_k": "kv", "to_v": "kv"}


@dataclass(frozen=True)
class InputSite:
    """One activation tensor and the linears that read it.

    Attributes:
        name: Unique, such as ``...layers.0.self_attn.qkv``.
        side: One of ``WHOLE_SIDES``.
        readers: Module names of the linears, in the order in which their outputs are stacked.
    """

    name: str
    side: str
    readers: tuple[str, ...]


def linear_side(name: str, whole: bool = False) -> str | None:
    """The side that a linear of that name belongs to, None if it is out of scope (``paper``, or ``whole``)."""
    return next((side for side in (WHOLE_SIDES if whole else SIDES) if _SCOPE[side].match(name)), None)


def find_sites(model: nn.Module, whole: bool = False) -> tuple[InputSite, ...]:
    """The input sites of a model, in model order.

    Args:
        model: A Pi 0.5 or GR00T N1.5; it may lie on the meta device.
        whole: Scope ``whole`` instead of ``paper``.

    Raises:
        QuantizationError: Nothing is in scope, or a module in scope is not an ``nn.Linear``.
    """
    grouped: dict[str, tuple[str, list[str]]] = {}
    for name, module in model.named_modules():
        side = linear_side(name, whole)
        if side is None or isinstance(module, nn.Identity):
            continue
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise QuantizationError(
                f"{name} is in scope but is a {kind}, not a linear; is the model quantized already?"
            )
        grouped.setdefault(_site_name(model, name), (side, []))[1].append(name)
    if not grouped:
        raise QuantizationError(
            "no linear of the model is in scope; expected modules like "
            "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
        )
    return tuple(InputSite(name, side, tuple(readers)) for name, (side, readers) in grouped.items())


def _site_name(model: nn.Module, linear: str) -> str:
    parent, _, last = linear.rpartition(".")
    if last in _CROSS_SITE_OF:
        block = model.get_submodule(parent.rpartition(".")[0])
        if getattr(block, "attends_to_features", False):
            return f"{parent}.{_CROSS_SITE_OF[last]}"
    return f"{parent}.{_SITE_OF[last]}" if last in _SITE_OF else linear


def sites_of_linears(names: Iterable[str], side: str) -> tuple[InputSite, ...]:
    """One site per linear, for models without known sharing."""
    return tuple(InputSite(name, side, (name,)) for name in names)


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear of that name.

    Raises:
        QuantizationError: There is none, or it is another kind of module.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"{name} is not a module of the model; check the names of the sites") from error
    if not isinstance(module, nn.Linear):
        raise QuantizationError(f"{name} is a {type(module).__name__}, not an nn.Linear; it cannot be quantized")
    return module

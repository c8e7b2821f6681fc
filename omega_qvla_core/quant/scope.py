"""Which linears are quantized, and which of them read the same input.

Include and exclude rules of METHOD A.9 for Pi 0.5: the seven linears of every layer of the language tower and of the
action expert. ``state_proj``, ``action_in_proj``, ``action_out_proj``, the time MLP, the modulation layers, the vision
tower and the embeddings stay in float: 4-bit activations there are known to destroy the policy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from omega_qvla_core.errors import QuantizationError

LANGUAGE = "language"
ACTION_HEAD = "action_head"
SIDES = (LANGUAGE, ACTION_HEAD)

_LINEARS = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_SCOPE = {
    LANGUAGE: re.compile(
        rf"(?:^|.*\.)paligemma_with_expert\.paligemma\.model\.language_model\.layers\.\d+\.{_LINEARS}$"
    ),
    ACTION_HEAD: re.compile(rf"(?:^|.*\.)paligemma_with_expert\.gemma_expert\.model\.layers\.\d+\.{_LINEARS}$"),
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
}


@dataclass(frozen=True)
class InputSite:
    """One activation tensor and the linears that read it.

    Attributes:
        name: Unique, such as ``...layers.0.self_attn.qkv``.
        side: ``language`` or ``action_head``.
        readers: Module names of the linears, in the order in which their outputs are stacked.
    """

    name: str
    side: str
    readers: tuple[str, ...]


def linear_side(name: str) -> str | None:
    """The side that a linear of that name belongs to, None if it is out of scope."""
    return next((side for side, pattern in _SCOPE.items() if pattern.match(name)), None)


def find_sites(model: nn.Module) -> tuple[InputSite, ...]:
    """The input sites of a Pi 0.5 model, in model order.

    Raises:
        QuantizationError: Nothing is in scope, or a module in scope is not an ``nn.Linear``.
    """
    grouped: dict[str, tuple[str, list[str]]] = {}
    for name, module in model.named_modules():
        side = linear_side(name)
        if side is None:
            continue
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise QuantizationError(
                f"{name} is in scope but is a {kind}, not a linear; is the model quantized already?"
            )
        parent, last = name.rsplit(".", 1)
        grouped.setdefault(f"{parent}.{_SITE_OF[last]}", (side, []))[1].append(name)
    if not grouped:
        raise QuantizationError(
            "no linear of the model is in scope; expected modules like "
            "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
        )
    return tuple(InputSite(name, side, tuple(readers)) for name, (side, readers) in grouped.items())


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

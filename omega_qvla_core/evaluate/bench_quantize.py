"""Quantized models for timing: random codes, which need neither calibration nor a solver.

Products take the same time whatever the codes are. The accuracy of recipes is measured elsewhere, on trained policies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.kernels import code_range, pack_codes
from omega_qvla_core.quant.linear import replace_linears
from omega_qvla_core.quant.recipe import SideRecipe, eight_bit_side
from omega_qvla_core.quant.scales import group_count
from omega_qvla_core.quant.scope import LANGUAGE, find_sites
from omega_qvla_core.quant.site import QuantizedSite, Reader, SiteSpec

# The language tower executes one integer sum per row, the action head one per group of 64, as recipe fast_w4a4 has it.
_GROUPED = SideRecipe(smoothing=None, solver="rtn", clip="absmax", per_step=False)
_ONE_SUM = replace(_GROUPED, activation="token", group=0)

RECIPES: dict[str, tuple[SideRecipe, SideRecipe]] = {
    "w8a8": (eight_bit_side(), eight_bit_side()),
    "w4a8": (replace(_ONE_SUM, activation_bits=8), replace(_GROUPED, activation_bits=8)),
    "w4a4": (_ONE_SUM, _GROUPED),
    "w4a4_grouped": (_GROUPED, _GROUPED),
}
"""Precision -> recipes of language tower and action head. ``w4a4_grouped`` has a scale per 64 columns in both."""

# Codes are drawn with this share of the largest code as standard deviation: about what round-to-nearest gives.
_CODE_SPREAD = 1 / 3


def quantize_randomly(model: nn.Module, precision: str, seed: int = 0) -> nn.Module:
    """Replace every linear in scope by a quantized site with random codes, in place.

    Args:
        model: Pi 0.5 or GR00T N1.5.
        precision: A name in ``RECIPES``.
        seed: Of the codes.

    Raises:
        ConfigError: There is no such precision.
    """
    if precision not in RECIPES:
        raise ConfigError(f"precision {precision!r} does not exist; there are {', '.join(RECIPES)}")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    language, action_head = RECIPES[precision]
    for found in find_sites(model):
        linears = [model.get_submodule(name) for name in found.readers]
        recipe = language if found.side == LANGUAGE else action_head
        readers = tuple(Reader(name, one.out_features) for name, one in zip(found.readers, linears))
        spec = SiteSpec(found.name, found.side, readers, linears[0].in_features, 0, recipe)
        replace_linears(model, QuantizedSite(spec, _tensors(spec, linears, generator)))
    return model


def _tensors(spec: SiteSpec, linears: list[nn.Linear], generator: torch.Generator) -> dict[str, Tensor]:
    recipe = spec.recipe
    low, high = code_range(recipe.weight_bits)
    device = generator.device
    codes = torch.randn(spec.out_features, spec.in_features, generator=generator, device=device)
    codes = codes.mul_(high * _CODE_SPREAD).round_().clamp_(low, high).to(torch.int8)
    # A linear with random weights of this spread keeps the size of its input.
    scale = spec.in_features**-0.5 / (high * _CODE_SPREAD)
    groups = group_count(spec.in_features, recipe.group)
    clips = group_count(spec.in_features, recipe.activation_group) if recipe.activation == "token_group" else 1
    tensors = {
        "codes": pack_codes(codes, recipe.weight_bits),
        "scales": torch.full((spec.out_features, groups), scale, dtype=torch.float16, device=device),
        "activation": torch.ones(1, clips, device=device),
    }
    if any(one.bias is not None for one in linears):
        zeros = [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias for one in linears]
        tensors["bias"] = torch.cat([bias.detach().float() for bias in zeros])
    return tensors

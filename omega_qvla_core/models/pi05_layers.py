"""Pi 0.5 one layer at a time, for models that are never in memory as a whole. The same computation as in ``Pi05``."""

from __future__ import annotations

from torch import Tensor

from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_prefix import Prefix, PrefixCache


def language_layer(model: Pi05, index: int, x: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of the language tower.

    Args:
        model: Only this layer needs weights.
        index: Of the layer.
        x: ``[B, P, lm_width]``, its input.
        prefix: Mask and positions of the tokens; its embeddings are not read.

    Returns:
        Output ``[B, P, lm_width]``, keys and values as in ``PrefixCache``.
    """
    mask = None if prefix.complete else prefix.pad_mask
    return model.language_model.layers[index](x, model._rotary(prefix.position_ids), mask)


def expert_input(model: Pi05, x_t: Tensor, dtype: object) -> Tensor:
    """What the first layer of the action expert reads: ``[B, H, expert_width]`` of a noisy chunk ``[B, H, A]``."""
    return model.action_in_proj(x_t.to(model.action_in_proj.weight.dtype)).to(dtype)


def expert_layer(
    model: Pi05,
    index: int,
    x: Tensor,
    modulation: tuple[Tensor, Tensor],
    keys_values: tuple[Tensor, Tensor],
    prefix: Prefix,
) -> Tensor:
    """One layer of the action expert at one denoise step.

    Args:
        model: Only this layer needs weights.
        index: Of the layer.
        x: ``[B, H, expert_width]``, its input.
        modulation: Of its two norms at the step, from ``StepCondition.layers``.
        keys_values: Of the language layer with the same index.
        prefix: Mask of the prefix.
    """
    cache = PrefixCache((), (), prefix.pad_mask, None, prefix.complete)
    suffix = model._suffix(cache, x.shape[1])
    return model.expert.layers[index](x, suffix.rotary, suffix.mask, modulation, keys_values)[0]

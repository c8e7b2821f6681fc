"""The stages of Pi 0.5: keys and values of every language layer go to disk, an expert layer reads those of its own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omega_qvla_core.models.pi05_layers import expert_input, expert_layer, language_layer
from omega_qvla_core.models.pi05_prefix import Prefix, PrefixCache, StepCondition
from omega_qvla_core.models.prefix_masks import host_all
from omega_qvla_core.quant.calibrate import Calibration
from omega_qvla_core.quant.layerwise_stages import EMBEDDED, FamilyStages, Stage, Tensors, chain_file

_PALIGEMMA = "paligemma_with_expert.paligemma"
_EXPERT = "paligemma_with_expert.gemma_expert.model"

# Keys, values and prefix of a batch, as an expert layer reads them.
_Context = tuple[tuple[Tensor, Tensor], Prefix]


class Pi05Stages(FamilyStages):
    """See the module's docstring."""

    vision = f"{_PALIGEMMA}.model.vision_tower"
    head = (_EXPERT, "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")
    blocks = f"{_EXPERT}.layers"

    def stages(self) -> Iterator[Stage]:
        depth = len(self.work.model.language_model.layers)
        layers = [(f"{_PALIGEMMA}.model.language_model.layers.{index}",) for index in range(depth)]
        yield from self.embedding()
        yield from self.chain("language", layers, EMBEDDED, self._language_layer, kept="kv")
        yield self.denoising(tuple(_past(index) for index in range(depth)))
        yield from self.head_blocks(lambda index: (_past(index),))

    def beside_vision(self) -> tuple[str, ...]:
        projector = f"{_PALIGEMMA}.model.multi_modal_projector"
        has_one = self.work.model.get_submodule(f"{_PALIGEMMA}.model").multi_modal_projector is not None
        return (f"{_PALIGEMMA}.lm_head", projector) if has_one else (f"{_PALIGEMMA}.lm_head",)

    def prefix_tensors(self, prefix: Prefix) -> Tensors:
        return {"mask": prefix.pad_mask}

    def cache(self, number: int) -> PrefixCache:
        prefix, depth = self._prefix(number), len(self.work.model.language_model.layers)
        keys, values = (tuple(self.read(kind, number, _past(index)) for index in range(depth)) for kind in "kv")
        return PrefixCache(keys, values, prefix.pad_mask, None, prefix.complete)

    def first_input(self, x_t: Tensor, condition: StepCondition, cache: PrefixCache) -> Tensor:
        return expert_input(self.work.model, x_t, cache.keys[0].dtype)

    def modulations(self, condition: StepCondition, index: int) -> tuple[Tensor, ...]:
        return condition.layers[index]

    def context(self, index: int, number: int, calibration: Calibration) -> _Context:
        keys_values = (self.read("k", number, _past(index)), self.read("v", number, _past(index)))
        return keys_values, self._prefix(number)

    def block(self, index: int, x: Tensor, modulation: tuple[Tensor, ...], context: _Context) -> Tensor:
        first, second = modulation
        return expert_layer(self.work.model, index, x, (first, second), *context)

    def _language_layer(self, index: int, number: int, x: Tensor) -> tuple[Tensor, Tensors]:
        x, key, value = language_layer(self.work.model, index, x, self._prefix(number))
        return x, {"k": key, "v": value}

    def _prefix(self, number: int) -> Prefix:
        mask = self.read("mask", number)
        # Positions and masks are all that a layer reads of it.
        return Prefix(mask.new_empty(0), mask, complete=host_all(mask))


def _past(index: int) -> str:
    return chain_file("language", index, "kv")

"""The stages of GR00T N1.5: language tower, features after the adapter, diffusion transformer.

The features stay on disk until the last block that attends to them. Its keys and values of them do not depend on the
denoise step: they are computed, and calibrated, once per observation before the block runs over the steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omega_qvla_core.models.gr00t_dit import KeysValues
from omega_qvla_core.models.gr00t_n15 import TOKEN_TABLE, Gr00tCache, Gr00tPrefix, TimeCondition
from omega_qvla_core.models.prefix_masks import host_all
from omega_qvla_core.quant.calibrate import Calibration
from omega_qvla_core.quant.layerwise_stages import EMBEDDED, FamilyStages, Stage, Tensors, chain_file

_EAGLE = "backbone.eagle_model"
_LANGUAGE = f"{_EAGLE}.language_model.model"
_HEAD = "action_head"
_ADAPTER = f"{_HEAD}.vl_self_attention"


class Gr00tStages(FamilyStages):
    """See the module's docstring."""

    vision = f"{_EAGLE}.vision_model"
    blocks = f"{_HEAD}.model.transformer_blocks"

    @property
    def head(self) -> tuple[str, ...]:
        """Everything of the action head but what makes the features."""
        features = ("vlln", "vl_self_attention")
        parts = self.work.model.action_head.named_children()
        return tuple(f"{_HEAD}.{name}" for name, _ in parts if name not in features)

    def stages(self) -> Iterator[Stage]:
        depth = len(self.work.model.language_model.layers)
        language = [(f"{_LANGUAGE}.layers.{index}",) for index in range(depth)]
        adapter = [(f"{_ADAPTER}.transformer_blocks.{index}",) for index in range(len(self._adapter()))]
        before = (f"{_LANGUAGE}.norm", "backbone.eagle_linear", f"{_HEAD}.vlln")
        yield from self.embedding()
        yield from self.chain("language", language, EMBEDDED, self._language_layer)
        yield from self.chain("features", [before, *adapter], chain_file("language", depth - 1), self._feature_layer)
        yield self.denoising((self._features,))
        yield from self.head_blocks(lambda index: (self._features,))

    def beside_vision(self) -> tuple[str, ...]:
        return f"{_EAGLE}.mlp1", TOKEN_TABLE.removesuffix(".weight")

    def prefix_tensors(self, prefix: Gr00tPrefix) -> Tensors:
        return {"mask": prefix.pad_mask, "state": prefix.state, "embodiment": torch.tensor(prefix.embodiment)}

    def cache(self, number: int) -> Gr00tCache:
        return self.work.model.cache(self._prefix(number), self.read("x", number, self._features))

    def first_input(self, x_t: Tensor, condition: TimeCondition, cache: Gr00tCache) -> Tensor:
        return self.work.model.action_head.tokens(x_t, condition, cache).float()

    def modulations(self, condition: TimeCondition, index: int) -> tuple[Tensor, ...]:
        return (condition.modulations[index],)

    def context(self, index: int, number: int, calibration: Calibration) -> KeysValues | None:
        block = self.work.model.expert.transformer_blocks[index]
        if not block.attends_to_features:
            return None
        with calibration.token_mask(self.read("mask", number)):
            return block.attn1.keys_values(self.read("x", number, self._features))

    def block(self, index: int, x: Tensor, modulation: tuple[Tensor, ...], context: KeysValues | None) -> Tensor:
        return self.work.model.expert.transformer_blocks[index](x, *modulation, context)

    @property
    def _features(self) -> str:
        """File of the features as the diffusion transformer reads them."""
        return chain_file("features", len(self._adapter()))

    def _adapter(self) -> list[torch.nn.Module]:
        """Blocks of the adapter; none in a head without one."""
        return list(getattr(self.work.model.action_head.vl_self_attention, "transformer_blocks", ()))

    def _language_layer(self, index: int, number: int, x: Tensor) -> tuple[Tensor, Tensors]:
        prefix, tower = self._prefix(number), self.work.model.language_model
        return tower.attention(prefix.pad_mask, prefix.complete).through(tower.layers[index], x), {}

    def _feature_layer(self, index: int, number: int, x: Tensor) -> tuple[Tensor, Tensors]:
        model = self.work.model
        if index:
            return self._adapter()[index - 1](x), {}
        return model.action_head.vlln(model.backbone.eagle_linear(model.language_model.norm(x)[0])), {}

    def _prefix(self, number: int) -> Gr00tPrefix:
        mask, embodiment = self.read("mask", number), tuple(self.read("embodiment", number).tolist())
        return Gr00tPrefix(mask.new_empty(0), mask, self.read("state", number), embodiment, host_all(mask))

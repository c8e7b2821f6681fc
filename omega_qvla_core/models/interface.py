"""What the rest of the package calls on a model, whichever family it is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from omega_qvla_core.models.flow import EulerStep, VelocityGuide

PrefixT = TypeVar("PrefixT")
CacheT = TypeVar("CacheT")


class FlowMatchingVLA(Protocol[PrefixT, CacheT]):
    """A vision-language-action model with a flow-matching action head: ``Pi05`` and ``Gr00tN15``.

    ::

        prefix = model.embed_prefix(images, image_masks, tokens, token_mask, state)
        actions = model.sample_actions(prefix, noise, num_steps)

    Prefixes and caches are the family's own; both have ``pad_mask``, bool ``[B, P]``. Calls are deterministic. Linears
    that the quantizer replaces lie in ``language_model.layers`` and in ``expert``. They are only called, the former
    outside a denoise step, and so are keys and values of cross-attention, which run once per observation.

    Attributes:
        config: Has ``action_horizon`` and ``action_dim``, the model's own widths, and ``to_json``.
        vision: The vision encoder.
        language_model: The language tower.
        expert: The denoising network.
    """

    config: Any

    @property
    def vision(self) -> nn.Module: ...

    @property
    def language_model(self) -> nn.Module: ...

    @property
    def expert(self) -> nn.Module: ...

    def embed_prefix(
        self,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None = None,
        *,
        drop_masked: bool = True,
    ) -> PrefixT:
        """Embed an observation; GR00T N1.5 also takes ``embodiment``. ``drop_masked`` leaves out what no row has."""
        ...

    def encode_prefix(self, prefix: PrefixT, last_hidden: bool = True) -> CacheT:
        """All that runs once per observation. With ``last_hidden`` every linear in scope runs, as calibration needs."""
        ...

    def velocity(self, x_t: Tensor, time: Tensor, cache: CacheT) -> Tensor:
        """One evaluation of the action head, with gradients; ``time`` is the family's own flow time ``[B]``."""
        ...

    def sample_actions(
        self, prefix: PrefixT | CacheT, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Tensor:
        """From noise to actions, both float32 ``[B, action_horizon, action_dim]``."""
        ...

    def denoise(
        self, cache: CacheT, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None
    ) -> Iterator[EulerStep]:
        """The steps of ``sample_actions``, one by one."""
        ...

    def forget_step_tables(self) -> None:
        """Forget what was kept per denoise step; needed only after a write through ``parameter.data``."""
        ...

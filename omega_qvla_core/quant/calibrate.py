"""Calibration: watch the inputs of the linears while the float model runs, once per observation.

::

    with calibrate(model, sites) as calibration:
        with calibration.token_mask(prefix.pad_mask):
            cache = model.encode_prefix(prefix)
        model.sample_actions(cache, noise, num_steps)
    calibration["...layers.0.self_attn.qkv"].gram()

The denoise step is read from ``models.step_context``, so that every step gets statistics of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.step_context import current_step
from omega_qvla_core.quant.scope import InputSite, find_sites, get_linear
from omega_qvla_core.quant.statistics import SiteStatistics

# Tokens kept per site and step. q99.9 needs about a thousand; at width 384 and 8 steps this is 12 MiB per site.
RESERVOIR_TOKENS = 1024


class Calibration:
    """Statistics by site name.

    Args:
        sites: Where to look.
        reservoir_tokens: Size of the token sample per site and step.
        seed: Of the sampling: a site draws from ``seed`` plus its number.
        numbers: Of the sites by name; None: in the order in which they are first seen.
    """

    def __init__(
        self,
        sites: Sequence[InputSite],
        reservoir_tokens: int = RESERVOIR_TOKENS,
        seed: int = 0,
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.reservoir_tokens = reservoir_tokens
        self.seed = seed
        self._numbers = numbers
        self._statistics: dict[str, SiteStatistics] = {}
        self._mask: Tensor | None = None
        self._last_input: dict[str, tuple[str, Tensor]] = {}

    def __getitem__(self, name: str) -> SiteStatistics:
        """Statistics of a site.

        Raises:
            QuantizationError: The site was never seen.
        """
        if name not in self._statistics:
            raise QuantizationError(
                f"{name} was never seen in calibration; run every observation through prefix and denoise loop"
            )
        return self._statistics[name]

    def __contains__(self, name: str) -> bool:
        return name in self._statistics

    @contextmanager
    def token_mask(self, mask: Tensor) -> Iterator[None]:
        """Count only the tokens where ``mask`` (bool ``[B, P]``) is True, for inputs of that shape.

        Padding and absent cameras run through the language tower but nothing ever reads them; their values would
        only blur the statistics.
        """
        previous, self._mask = self._mask, mask
        try:
            yield
        finally:
            self._mask = previous

    def add(self, site: str, x: Tensor) -> None:
        """Take in one input ``[..., I]`` of a site at the current denoise step."""
        if site not in self._statistics:
            number = len(self._statistics) if self._numbers is None else self._numbers[site]
            self._statistics[site] = SiteStatistics(site, x.shape[-1], self.reservoir_tokens, self.seed + number)
        mask = self._mask
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask]
        self._statistics[site].add(x.reshape(-1, x.shape[-1]), current_step())

    def observe(self, site: InputSite, reader: str, x: Tensor) -> None:
        """Take in what ``reader`` was called with. The readers of a site share one input, which counts once.

        Raises:
            QuantizationError: Two readers of the site got different inputs.
        """
        first = self._last_input.get(site.name)
        if first is None or first[0] == reader:
            self._last_input[site.name] = (reader, x)
            self.add(site.name, x)
        elif first[1] is not x and not torch.equal(first[1], x):
            raise QuantizationError(
                f"{first[0]} and {reader} are quantized as readers of one input but got different ones; list them as "
                "separate sites"
            )

    def forget_inputs(self) -> None:
        """Let go of the last activations; only statistics stay."""
        self._last_input.clear()


@contextmanager
def calibrate(
    model: nn.Module,
    sites: Sequence[InputSite] | None = None,
    *,
    reservoir_tokens: int = RESERVOIR_TOKENS,
    seed: int = 0,
    numbers: Mapping[str, int] | None = None,
) -> Iterator[Calibration]:
    """Watch the model's linears while the body runs it.

    Args:
        model: The float model; it is not changed.
        sites: Where to look; by default everything in scope.
        reservoir_tokens: Size of the token sample per site and denoise step.
        seed: As in ``Calibration``.
        numbers: As in ``Calibration``.

    Yields:
        The calibration that fills up.
    """
    sites = find_sites(model) if sites is None else tuple(sites)
    calibration = Calibration(sites, reservoir_tokens, seed, numbers)
    hooks = []
    try:
        for site in sites:
            for reader in site.readers:
                hook = _watcher(calibration, site, reader)
                hooks.append(get_linear(model, reader).register_forward_pre_hook(hook))
        yield calibration
    finally:
        for hook in hooks:
            hook.remove()
        calibration.forget_inputs()


def _watcher(calibration: Calibration, site: InputSite, reader: str) -> Any:
    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        calibration.observe(site, reader, arguments[0])

    return watch

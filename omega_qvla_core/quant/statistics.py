"""What calibration keeps of the activations at one input site: sums, never the activations themselves.

They are taken, kept and handed out on the device of the activations.
One row per denoise step (a site outside the denoise loop has one row). Besides exact sums there is a bounded sample of
tokens per row, for quantiles and for the search of clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.step_context import DenoiseStep

# Fewest tokens per row from which scales are taken. With fewer the largest value seen says nothing about the next.
MIN_TOKENS = 16

# Rows of a Gram matrix that are added to at a time.
_GRAM_ROWS = 2048


class SiteStatistics:
    """Streamed statistics of one input.

    Attributes:
        name: Name of the site, for messages.
        columns: Width I of the input.
        steps: Denoise steps (rows) for a site inside the denoise loop, 0 for one outside (one row).
    """

    def __init__(self, name: str, columns: int, reservoir_tokens: int, seed: int) -> None:
        self.name = name
        self.columns = columns
        self.steps: int | None = None
        self._reservoir_tokens = reservoir_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[_Row] = []

    @property
    def rows(self) -> int:
        """Number of rows T (1 outside the denoise loop)."""
        return len(self._rows)

    @property
    def counts(self) -> list[int]:
        """Tokens seen per row."""
        return [row.count for row in self._rows]

    def add(self, tokens: Tensor, step: DenoiseStep | None) -> None:
        """Take in tokens ``[n, I]``.

        Raises:
            QuantizationError: NaN or Inf, another number of steps than before, or a site seen both inside and outside
                the denoise loop.
        """
        if not torch.isfinite(tokens).all():
            raise QuantizationError(f"{self.name}: calibration saw NaN or Inf in its input; check the observations")
        total = 0 if step is None else step.total
        if self.steps is None:
            self.steps = total
            self._rows = [_Row(self.columns, tokens.device) for _ in range(max(total, 1))]
        if total != self.steps:
            raise QuantizationError(
                f"{self.name}: calibration saw it with {self.steps} denoise steps and then with {total} (0 is outside "
                "the denoise loop); calibrate with one number of steps"
            )
        index = 0 if step is None else step.index
        self._rows[index].add(tokens.detach().float(), self._reservoir_tokens, self._generator)

    def check(self, min_tokens: int = MIN_TOKENS) -> None:
        """Raise if the site cannot be calibrated.

        Raises:
            QuantizationError: Never seen, a denoise step never seen, or too few tokens.
        """
        if self.steps is None:
            raise QuantizationError(
                f"{self.name} was never seen in calibration; run every observation through prefix and denoise loop"
            )
        for index, row in enumerate(self._rows):
            if row.count < min_tokens:
                where = f" at denoise step {index} of {self.steps}" if self.steps else ""
                raise QuantizationError(
                    f"{self.name}: {row.count} tokens seen{where}, at least {min_tokens} are needed; "
                    "calibrate on more observations"
                )

    def gram(self, step: int | None = None) -> Tensor:
        """``sum x^T x`` float64 ``[I, I]`` of one row, or of all. Not to be written to: it may be the sum itself."""
        rows = self._rows if step is None else self._rows[step : step + 1]
        if len(rows) == 1:
            return rows[0].gram
        return sum((row.gram for row in rows[1:]), rows[0].gram)

    def mean(self) -> Tensor:
        """Mean token per row, float64 ``[T, I]``."""
        return torch.stack([row.total / max(row.count, 1) for row in self._rows])

    def absmax(self) -> Tensor:
        """Largest magnitude per row and channel, float32 ``[T, I]``."""
        return torch.stack([row.absmax for row in self._rows])

    def tokens(self) -> list[Tensor]:
        """The sampled tokens per row, float32 ``[<= reservoir_tokens, I]`` each."""
        return [row.sample for row in self._rows]


class _Row:
    """Statistics of one denoise step."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.absmax = torch.zeros(columns, device=device)
        self.sample = torch.empty(0, columns, device=device)

    def add(self, tokens: Tensor, capacity: int, generator: torch.Generator) -> None:
        # Some rows at a time: at 16384 channels the whole product would be 1 GB beside the 2 GB of the sum.
        for start in range(0, tokens.shape[1], _GRAM_ROWS):
            rows = slice(start, start + _GRAM_ROWS)
            self.gram[rows] += (tokens[:, rows].T @ tokens).double()
        self.total += tokens.double().sum(dim=0)
        if tokens.shape[0]:
            self.absmax = torch.maximum(self.absmax, tokens.abs().amax(dim=0))
        self._sample(tokens, capacity, generator)
        self.count += tokens.shape[0]

    def _sample(self, tokens: Tensor, capacity: int, generator: torch.Generator) -> None:
        """Reservoir sampling: every token seen so far is equally likely to be in the sample."""
        free = max(capacity - self.sample.shape[0], 0)
        self.sample = torch.cat((self.sample, tokens[:free]))
        seen = self.count + min(free, tokens.shape[0])
        rest = tokens[free:]
        if rest.shape[0] == 0:
            return
        positions = torch.arange(seen + 1, seen + 1 + rest.shape[0], dtype=torch.float64)
        slots = (torch.rand(rest.shape[0], generator=generator, dtype=torch.float64) * positions).long()
        for index in torch.nonzero(slots < capacity).flatten().tolist():
            self.sample[slots[index]] = rest[index]

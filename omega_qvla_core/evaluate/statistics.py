"""The statistics of success rates: Wilson intervals and the paired McNemar test."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927).

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.

    Returns:
        Lower and upper bound in [0, 1].

    Raises:
        ValueError: ``successes`` is not within 0..``trials``, or there is no trial.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: needs 0 <= successes <= trials and trials >= 1")
    rate = successes / trials
    shrink = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 / shrink * math.sqrt(rate * (1 - rate) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact McNemar test of two paired sequences of successes.

    Under the null hypothesis each discordant pair falls on either side with probability 1/2 (binomial test).

    Args:
        first: Success of every trial under the first condition.
        second: Success of the same trials under the second condition.

    Returns:
        p-value in [0, 1]; 1.0 where no pair is discordant.

    Raises:
        ValueError: The sequences differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"paired test of {len(first)} and {len(second)} trials: both need the same seeds")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1)) / 2**discordant
    return min(1.0, 2 * tail)

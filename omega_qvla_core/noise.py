"""Noise seeds of consecutive inferences."""

from __future__ import annotations

import numpy as np


def inference_seed(seed: int, inference: int) -> int:
    """Seed of the start noise of one inference of a run.

    Another one for every inference: with one noise for all, a policy that finds a state in which that noise leads
    nowhere would stay there for good.

    Args:
        seed: Seed of the run, such as an episode's.
        inference: Count of inferences since its start.
    """
    return int(np.random.SeedSequence([seed, inference]).generate_state(1, np.uint32)[0])

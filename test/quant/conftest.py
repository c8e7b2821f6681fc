"""Policies shared by the tests of the quantizer."""

from __future__ import annotations

import numpy as np
import pytest

from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant import Recipe, quantize_policy
from omega_qvla_core.runtime.random_policy import random_policy

TEXTS = ("touch the red cube", "lift the green cube", "pick up the blue cube and place it on the plate")


def observations(count: int, seed: int = 0) -> list[Observation]:
    """Random images and states with instructions of different lengths, so that there is padding."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            {key: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for key in ("front", "wrist")},
            rng.normal(size=7) * 0.1,
            TEXTS[index % 3],
        )
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def policy():
    return random_policy(0)


@pytest.fixture(scope="session")
def calibration_observations():
    return observations(8)


@pytest.fixture(scope="session")
def sixteen_observations():
    """Enough for two halves."""
    return observations(16)


@pytest.fixture(scope="session")
def executable(policy, calibration_observations):
    """(quantized policy, report) of the default recipe."""
    return quantize_policy(policy, Recipe.preset("executable_w4a4"), calibration_observations)

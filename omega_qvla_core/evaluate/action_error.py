"""How far a quantized policy's chunks are from the unquantized policy's, from the same observation and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omega_qvla_core.runtime import Observation, Policy

BATCH = 16


def normalised_chunks(policy: Policy, observations: Sequence[Observation]) -> np.ndarray:
    """Chunks of all observations in units of the policy's action scale, ``[N, horizon, actions]``.

    Normalised, because radians and metres cannot be added; noise seed i for observation i.
    """
    rows = []
    for start in range(0, len(observations), BATCH):
        part = list(observations[start : start + BATCH])
        chunks = policy.infer_batch(part, seeds=range(start, start + len(part)))
        measured = np.stack([o.state for o in part])
        rows.append(policy.processor.normalize_actions(np.stack([c.actions for c in chunks]), measured))
    return np.concatenate(rows)


def action_error(policy: Policy, reference: Policy, observations: Sequence[Observation]) -> float:
    """Relative error ``|a - b| / |b|`` (Frobenius norm) over all chunks, normalised units, equal noise."""
    wanted = normalised_chunks(reference, observations)
    return float(np.linalg.norm(normalised_chunks(policy, observations) - wanted) / np.linalg.norm(wanted))

"""``policy_node`` with a policy that is slow, hangs, raises or emits NaN now and then; for the soak only."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla_core.policy_types import ActionChunk
from omega_qvla_ros.nodes import loading, policy_node

SEED = 0
SLOW_SHARE, SLOW_S = 0.02, (0.2, 1.5)
"""Share of inferences that take so much longer; a chunk of the tabletop policy lasts 0.8 s."""
HANG_SHARE, HANG_S = 0.001, 3.0
"""Longer than ``inference_timeout_s``."""
RAISE_SHARE = 0.002
NAN_SHARE = 0.002


class UnreliablePolicy:
    """A policy behind a seeded dice.

    Args:
        policy: The real one; everything but ``infer`` is its own.
        seed: Of the dice.
    """

    def __init__(self, policy: Any, seed: int = SEED) -> None:
        self._policy = policy
        self._dice = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def infer(self, *args: Any, **kwargs: Any) -> ActionChunk:
        """The policy's chunk, late, spoiled or not at all where the dice say so."""
        number = float(self._dice.random())
        for share, act in (
            (SLOW_SHARE, lambda: time.sleep(float(self._dice.uniform(*SLOW_S)))),
            (HANG_SHARE, lambda: time.sleep(HANG_S)),
            (RAISE_SHARE, self._fail),
        ):
            if number < share:
                act()
                break
            number -= share
        chunk = self._policy.infer(*args, **kwargs)
        if self._dice.random() >= NAN_SHARE:
            return chunk
        actions = np.array(chunk.actions)
        actions[len(actions) // 2, 0] = np.nan
        return replace(chunk, actions=actions)

    @staticmethod
    def _fail() -> None:
        raise RuntimeError("a failure made for the soak")


def load(folder: Path, options: loading.PolicyOptions) -> UnreliablePolicy:
    """The node's own loader, and the dice around it."""
    return UnreliablePolicy(loading.load_policy(folder, options))


def main(args: list[str] | None = None) -> None:
    """As ``policy_node.main``."""
    policy_node.main(args, policy_loader=load)


if __name__ == "__main__":
    main()

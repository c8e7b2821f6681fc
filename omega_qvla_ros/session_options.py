"""What a session is given: a policy, and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from omega_qvla_core.policy_types import ActionChunk, CommittedPrefix, Observation, PolicySpec
from omega_qvla_ros.guard import LimitScales


class PolicyLike(Protocol):
    """What a session needs of ``omega_qvla_core.runtime.Policy``."""

    spec: PolicySpec

    def infer(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        seed: int = 0,
        committed: CommittedPrefix | None = None,
    ) -> ActionChunk:
        """Plan one chunk; ``committed`` is given with real-time chunking only."""


@dataclass(frozen=True)
class SessionOptions:
    """Numbers of a session; see the parameter table of the policy node for their origins.

    With ``dry_run`` nothing is sent, so the arm does not follow: every chunk begins where the arm is measured.
    """

    execution_horizon_steps: int
    blend_time_s: float
    noise_seed: int = 0
    inference_timeout_s: float = 2.0
    retry_delay_s: float = 0.5
    max_consecutive_errors: int = 3
    startup_warn_s: float = 5.0
    start_timeout_s: float = 30.0
    image_timeout_s: float | None = None
    joint_states_timeout_s: float | None = None
    stamp_source: Literal["header", "receive"] = "header"
    dry_run: bool = False
    limit_scales: LimitScales = field(default_factory=LimitScales)

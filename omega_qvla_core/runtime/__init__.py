"""Running a policy: ``Policy.load(...)``, ``policy.infer(observation)``."""

from omega_qvla_core.policy_types import ActionChunk, CameraSpec, CommittedPrefix, Observation, PolicySpec
from omega_qvla_core.runtime.policy import Policy

__all__ = ["ActionChunk", "CameraSpec", "CommittedPrefix", "Observation", "Policy", "PolicySpec"]

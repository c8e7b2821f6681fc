"""Running a policy: ``Policy.load(...)``, ``policy.infer(observation)``."""

from omega_qvla_core.policy_types import ActionChunk, CameraSpec, Observation, PolicySpec
from omega_qvla_core.runtime.policy import Policy

__all__ = ["ActionChunk", "CameraSpec", "Observation", "Policy", "PolicySpec"]

"""The types of ``omega_qvla_core.policy_types``, under the name that users of the runtime look for."""

from omega_qvla_core.policy_types import ActionChunk, CameraSpec, Observation, PolicySpec

__all__ = ["ActionChunk", "CameraSpec", "Observation", "PolicySpec"]

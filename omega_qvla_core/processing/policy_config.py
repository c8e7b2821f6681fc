"""What a checkpoint's ``config.json`` says about the robot: cameras, joints, units of the actions, rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.strict_json import dataclass_from_json, dataclass_to_json

ActionMode = Literal["absolute", "delta"]


@dataclass(frozen=True)
class PolicyConfig:
    """The ``policy`` object of ``config.json``.

    Attributes:
        cameras: Cameras in network order, with the size that the network sees.
        state_names: Proprioception entries in network order (joints in rad, gripper in m).
        action_names: Action entries in network order, same units.
        action_modes: One per action: ``absolute`` (the model gives the target) or ``delta`` (the model gives the
            target minus the measured value of the same name at the observation).
        control_hz: Rate of the chunk's steps.
        first_action_delay_s: Time from the observation to the moment at which the first action must be reached.
        num_steps: Denoise steps that the checkpoint was validated with.
        state_in_prompt: Whether the prompt holds the discretised state (Pi 0.5's own way). Off for vision encoders
            that read the state themselves.
    """

    cameras: tuple[CameraSpec, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_modes: tuple[ActionMode, ...]
    control_hz: float
    first_action_delay_s: float
    num_steps: int
    state_in_prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("cameras", "state_names", "action_names"):
            entries = getattr(self, name)
            keys = [entry.key for entry in entries] if name == "cameras" else list(entries)
            if not keys:
                raise ConfigError(f"policy.{name} is empty; list at least one")
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise ConfigError(f"policy.{name} lists {twice[0]!r} twice; each name must be unique")
        for camera in self.cameras:
            if camera.height < 1 or camera.width < 1:
                raise ConfigError(
                    f"policy.cameras: {camera.key!r} is {camera.height} x {camera.width} px; must be positive"
                )
        if self.control_hz <= 0 or self.first_action_delay_s < 0 or self.num_steps < 1:
            raise ConfigError(
                f"policy.control_hz {self.control_hz} must be positive, first_action_delay_s "
                f"{self.first_action_delay_s} not negative, num_steps {self.num_steps} at least 1"
            )
        self._check_modes()

    def _check_modes(self) -> None:
        if len(self.action_modes) != len(self.action_names):
            raise ConfigError(
                f"policy.action_modes has {len(self.action_modes)} entries for {len(self.action_names)} action_names; "
                "give one mode per action"
            )
        for name, mode in zip(self.action_names, self.action_modes, strict=True):
            if mode not in ("absolute", "delta"):
                raise ConfigError(f"policy.action_modes of {name!r} is {mode!r}; it must be absolute or delta")
            if mode == "delta" and name not in self.state_names:
                raise ConfigError(
                    f"policy.action_modes: {name!r} is delta, but policy.state_names ({', '.join(self.state_names)}) "
                    "does not measure it"
                )

    @classmethod
    def from_json(cls, data: object, where: str = "policy") -> PolicyConfig:
        """Read the object; ConfigError names an unknown, missing or wrong key."""
        return dataclass_from_json(cls, data, where)

    def to_json(self) -> dict[str, Any]:
        """The object that ``from_json`` reads back to an equal configuration."""
        return dataclass_to_json(self)

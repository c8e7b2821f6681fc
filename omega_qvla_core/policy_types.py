"""What goes into a policy and what comes out: observations, action chunks and the policy's own description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from omega_qvla_core.errors import ConfigError


@dataclass(frozen=True)
class CameraSpec:
    """One camera that the policy was trained with.

    Attributes:
        key: Name of the stream in ``Observation.images`` (``front``, ``wrist``).
        height: Height in pixels that the network sees; any larger image is resized by ``processing``.
        width: Width in pixels that the network sees.
    """

    key: str
    height: int
    width: int


@dataclass(frozen=True)
class PolicySpec:
    """What a policy needs and gives. Read from the checkpoint's ``config.json``, never guessed.

    Attributes:
        name: Name of the checkpoint.
        family: Model family, ``pi05``.
        cameras: Cameras in network order.
        state_names: Names of the proprioception entries, in network order (joints in rad, gripper in m).
        action_names: Names of the action entries, in network order, same units.
        horizon: Number of steps in one action chunk.
        control_hz: Rate of the chunk's steps.
        first_action_delay_s: Time from the observation to the moment at which ``actions[0]`` must be reached.
            One period for policies whose step k is the target of control period k.
        num_steps: Denoise (flow-matching Euler) steps that the checkpoint was validated with.
        max_tokens: Longest prompt in tokens.
        quantization: Name of the recipe in the pack, ``none`` for an unquantized checkpoint.
        action_modes: What each action is when it leaves the policy: ``absolute`` target, ``relative`` or ``velocity``.
            Empty where nobody says.
    """

    name: str
    family: str
    cameras: tuple[CameraSpec, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    horizon: int
    control_hz: float
    first_action_delay_s: float
    num_steps: int
    max_tokens: int
    quantization: str = "none"
    action_modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RobotRequirements:
    """The robot's side, as far as a checkpoint has to fit it.

    Attributes:
        name: Of the robot.
        cameras: Camera keys that it publishes.
        state_names: Proprioception entries that it measures, in any order.
        action_names: Action entries that it takes, in any order.
        control_hz: Rate of the chunk's steps.
        execution_horizon_steps: Steps of a chunk that it executes before the next one.
        position_targets: Whether it takes absolute position targets (a joint trajectory does).
        delta_names: Action entries that are differences to the position measured at the observation, which the robot's
            side adds.
    """

    name: str
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    control_hz: float
    execution_horizon_steps: int = 1
    position_targets: bool = True
    delta_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """One observation of one robot.

    Attributes:
        images: Camera key -> uint8 ``[H, W, 3]`` RGB, any size of at least the camera's.
        state: float64 ``[len(state_names)]``, proprioception in the checkpoint's order, rad and m.
        instruction: What the arm is told, in words.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str


@dataclass(frozen=True)
class ActionChunk:
    """A plan of absolute position targets.

    Attributes:
        actions: float64 ``[horizon, len(action_names)]``, absolute targets in rad and m. ``actions[k]`` is to be
            reached at ``observation time + first_action_delay_s + k * period_s``.
        period_s: Time between two steps.
        first_action_delay_s: See ``PolicySpec.first_action_delay_s``.
    """

    actions: np.ndarray
    period_s: float
    first_action_delay_s: float


MAX_GUIDANCE_WEIGHT = 5.0
"""``beta``, the paper's choice for 5 denoise steps: it bounds ``g``, which is infinite at ``tau = 0``."""


@dataclass(frozen=True, eq=False)
class CommittedPrefix:
    """What the arm will do in the time of the next chunk unless that chunk says otherwise.

    Attributes:
        actions: float ``[K, actions]``, K at most the horizon: absolute targets in the checkpoint's order and physical
            units; row k belongs to step k of the chunk that is asked for.
        delay_steps: Steps that will have been executed when the chunk is there, at most K: these are to be reproduced.
        max_weight: See ``MAX_GUIDANCE_WEIGHT``.
    """

    actions: np.ndarray
    delay_steps: int
    max_weight: float = MAX_GUIDANCE_WEIGHT

    def check(self, horizon: int, width: int) -> None:
        """Refuse what does not fit a policy.

        Raises:
            ConfigError: Naming shape or value and what is expected.
        """
        shape = np.shape(self.actions)
        if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= horizon:
            raise ConfigError(
                f"the committed prefix has shape {list(shape)}; this policy needs 1 to {horizon} steps of {width} "
                "actions"
            )
        if not 0 <= self.delay_steps <= shape[0]:
            raise ConfigError(f"delay_steps is {self.delay_steps}; the committed prefix has {shape[0]} steps")
        if not (math.isfinite(self.max_weight) and self.max_weight > 0.0):
            raise ConfigError(f"max_weight is {self.max_weight}; it must be finite and greater than 0")

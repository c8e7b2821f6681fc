"""What public checkpoints do not say about the robot that they were trained on, stated once and checked.

openpi and NVIDIA keep camera names, order, rates and the meaning of actions in their code, not in the checkpoint. A
``RobotSetup`` holds exactly that: by the name of a known robot (``ROBOT_SETUPS``), or in ``omega_qvla.json`` beside the
weights. Nothing of it is ever guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.robots import ALOHA_WIDTH
from omega_qvla_core.strict_json import dataclass_from_json, dataclass_to_json

Framework = Literal["openpi", "lerobot", "gr00t"]
ActionMeaning = Literal["absolute", "delta", "relative", "velocity"]

POSITION_MEANINGS = ("absolute", "delta")
"""Meanings whose result is an absolute position target, which is what a robot contract commands."""


def emitted_modes(modes: Sequence[str]) -> tuple[str, ...]:
    """What the actions are once the processing is done: a ``delta`` has had its position added by then."""
    return tuple("absolute" if mode in POSITION_MEANINGS else mode for mode in modes)


OPENPI_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class CameraBinding:
    """One camera: ``key`` in ``Observation.images``, and ``source``, the checkpoint's own name for it.

    Sources are openpi's slots (``base_0_rgb``, ``left_wrist_0_rgb``, ``right_wrist_0_rgb``), LeRobot's features
    (``observation.images.image``) or GR00T's video keys (``image`` of ``video.image``).
    """

    key: str
    source: str


@dataclass(frozen=True)
class VectorPart:
    """One modality key of GR00T (``x`` of ``state.x``) with its normalization."""

    key: str
    normalization: Literal["min_max", "q99", "mean_std", "binary", "sin_cos"] = "min_max"


@dataclass(frozen=True)
class RobotSetup:
    """Cameras, vectors, units and rates of a public checkpoint.

    Attributes:
        framework: Whose processing applies.
        cameras: In network order.
        control_hz: Rate of the chunk's steps.
        state_names: Proprioception entries in network order. Empty for GR00T: named after the modality keys.
        action_names: Action entries in network order. Empty for GR00T: named after the modality keys.
        action_modes: One per action: ``absolute`` target; ``delta``, to which the measured entry of the same index is
            added; ``relative``, a step that the robot's own controller adds up; ``velocity``. Empty: for LeRobot as
            its files say.
        first_action_delay_s: Time from the observation to the moment of the first action. None: one period.
        num_steps: Denoise steps. None: the checkpoint's own number.
        horizon: Steps of a chunk, for checkpoints that do not say. None: the checkpoint's own number.
        asset_id: Folder of the statistics below ``assets`` (openpi). None: the only one there is.
        rotate_images: Turn every image by 180 degrees first (LIBERO).
        state_in_prompt: Whether the prompt holds the discretised state (Pi 0.5; ``discrete_state_input`` of openpi).
        openpi_normalization: ``quantile`` (Pi 0.5) or ``zscore``.
        aloha_space: Convert joints and grippers between ALOHA and the base model (openpi's ``adapt_to_pi``).
        gripper: Last conversion of the entries named in ``gripper_names``.
        gripper_names: Action entries that are grippers.
        clip_actions: Bound of every action (DROID's client: 1). None: not clipped.
        state_parts: GR00T's state keys in order.
        action_parts: GR00T's action keys in order.
        crop_scale: GR00T's centre crop; 1 for none.
        bracketed_prompt: Write the instruction as NVIDIA's policy does for a single observation, with brackets.
        embodiment_tag: Of GR00T; names the statistics and the projector.
        embodiment_id: Projector index, for a tag that is not one of NVIDIA's. None: by the tag.

    Raises:
        ConfigError: If a name is there twice, or the parts do not fit together.
    """

    framework: Framework
    cameras: tuple[CameraBinding, ...]
    control_hz: float
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    action_modes: tuple[ActionMeaning, ...] = ()
    first_action_delay_s: float | None = None
    num_steps: int | None = None
    horizon: int | None = None
    asset_id: str | None = None
    rotate_images: bool = False
    state_in_prompt: bool = True
    openpi_normalization: Literal["quantile", "zscore"] = "quantile"
    aloha_space: bool = False
    gripper: Literal["as_is", "libero_sign", "binary"] = "as_is"
    gripper_names: tuple[str, ...] = ()
    clip_actions: float | None = None
    state_parts: tuple[VectorPart, ...] = ()
    action_parts: tuple[VectorPart, ...] = ()
    crop_scale: float = 0.95
    bracketed_prompt: bool = True
    embodiment_tag: str | None = None
    embodiment_id: int | None = None

    def __post_init__(self) -> None:
        lists = {
            "cameras": [camera.key for camera in self.cameras],
            "cameras.source": [camera.source for camera in self.cameras],
            "state_names": list(self.state_names),
            "action_names": list(self.action_names),
            "state_parts": [part.key for part in self.state_parts],
            "action_parts": [part.key for part in self.action_parts],
        }
        for field, names in lists.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"robot.{field} lists {twice[0]!r} twice; each name must be unique")
        if not self.cameras:
            raise ConfigError("robot.cameras is empty; list at least one camera with its key and source")
        self._check_numbers()
        if self.framework == "gr00t":
            self._check_gr00t()
        elif not self.state_names or not self.action_names:
            raise ConfigError("robot.state_names and robot.action_names must list the entries of both vectors in order")
        self._check_modes()

    def _check_numbers(self) -> None:
        if self.control_hz <= 0:
            raise ConfigError(f"robot.control_hz is {self.control_hz}; it must be positive")
        if self.first_action_delay_s is not None and self.first_action_delay_s < 0:
            raise ConfigError(f"robot.first_action_delay_s is {self.first_action_delay_s}; it must not be negative")
        for field in ("num_steps", "horizon"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"robot.{field} is {value}; it must be at least 1")
        if not 0 < self.crop_scale <= 1:
            raise ConfigError(f"robot.crop_scale is {self.crop_scale}; it must be above 0 and at most 1")
        if self.aloha_space and not len(self.state_names) == len(self.action_names) == ALOHA_WIDTH:
            raise ConfigError(f"robot.aloha_space needs {ALOHA_WIDTH} state_names and action_names")

    def _check_gr00t(self) -> None:
        if not self.state_parts or not self.action_parts:
            raise ConfigError("robot.state_parts and robot.action_parts must list GR00T's modality keys in order")
        if any(part.normalization == "sin_cos" for part in self.action_parts):
            raise ConfigError("robot.action_parts: sin_cos has no inverse; actions cannot use it")
        if self.embodiment_tag is None:
            raise ConfigError("robot.embodiment_tag is missing; it names the statistics and the projector")

    def _check_modes(self) -> None:
        if self.action_modes and self.action_names and len(self.action_modes) != len(self.action_names):
            raise ConfigError(
                f"robot.action_modes has {len(self.action_modes)} entries for {len(self.action_names)} action_names"
            )
        unknown = [name for name in self.gripper_names if self.action_names and name not in self.action_names]
        if unknown:
            raise ConfigError(f"robot.gripper_names: {unknown[0]!r} is not one of the action_names")
        if not self.action_names:
            return
        for index, mode in enumerate(self.action_modes):
            name = self.action_names[index]
            same = index < len(self.state_names) and self.state_names[index] == name
            if mode not in POSITION_MEANINGS and name in self.state_names:
                # Joints are matched by name: a velocity must never be taken for the position of the same joint.
                raise ConfigError(
                    f"robot.action_names: {name!r} is {mode}, but bears the name of a measured entry; call it "
                    f"{name + '_' + mode!r}"
                )
            if mode == "delta" and not same:
                raise ConfigError(
                    f"robot.action_modes: {self.action_names[index]!r} is delta, but entry {index} of "
                    "robot.state_names is another one; deltas are added to the state entry of the same index"
                )

    @property
    def delay_s(self) -> float:
        """Time from the observation to the first action."""
        return 1.0 / self.control_hz if self.first_action_delay_s is None else self.first_action_delay_s

    @classmethod
    def from_json(cls, data: object, where: str = "robot") -> RobotSetup:
        """A setup from its JSON object, or from the name of a known one; ConfigError names what is wrong."""
        if isinstance(data, str):
            return robot_setup(data)
        return dataclass_from_json(cls, data, where)

    def to_json(self) -> dict[str, Any]:
        """The object that ``from_json`` reads back to an equal setup."""
        return dataclass_to_json(self)


def robot_setup(name: str) -> RobotSetup:
    """A known setup by name.

    Raises:
        ConfigError: There is none; the message lists them.
    """
    if name not in ROBOT_SETUPS:
        raise ConfigError(f"robot {name!r} is not known; known: {', '.join(ROBOT_SETUPS)}; or give a JSON object")
    return ROBOT_SETUPS[name]


_LIBERO_STATE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper_left", "gripper_right")
_LIBERO_ACTIONS = ("step_x", "step_y", "step_z", "step_roll", "step_pitch", "step_yaw", "gripper")
_LIBERO_MODES: tuple[ActionMeaning, ...] = (*("relative",) * 6, "absolute")
_LIBERO_KEYS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_DROID_JOINTS = tuple(f"panda_joint{index}" for index in range(1, 8))
_ALOHA_JOINTS = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
)
_GR1_PARTS = ("left_arm", "right_arm", "left_hand", "right_hand", "waist")


def _gr00t_libero(motion: Literal["min_max", "mean_std"]) -> RobotSetup:
    """NVIDIA's two LIBERO data configurations; ``libero_goal`` was trained with mean_std actions."""
    return RobotSetup(
        framework="gr00t",
        cameras=(CameraBinding("image", "image"), CameraBinding("wrist_image", "wrist_image")),
        control_hz=20.0,
        action_modes=_LIBERO_MODES,
        num_steps=8,  # NVIDIA's LIBERO evaluation; the checkpoint's own number is 4
        rotate_images=True,
        gripper="libero_sign",
        gripper_names=("gripper",),
        state_parts=tuple(VectorPart(key) for key in _LIBERO_KEYS),
        action_parts=(*(VectorPart(key, motion) for key in _LIBERO_KEYS[:-1]), VectorPart("gripper")),
        embodiment_tag="new_embodiment",
    )


ROBOT_SETUPS: dict[str, RobotSetup] = {
    "openpi_libero": RobotSetup(
        framework="openpi",
        cameras=(CameraBinding("image", "base_0_rgb"), CameraBinding("wrist_image", "left_wrist_0_rgb")),
        control_hz=20.0,
        state_names=_LIBERO_STATE,
        action_names=_LIBERO_ACTIONS,
        action_modes=_LIBERO_MODES,
        horizon=10,
        rotate_images=True,
        state_in_prompt=False,
    ),
    "openpi_droid": RobotSetup(
        framework="openpi",
        cameras=(
            CameraBinding("exterior_image_1_left", "base_0_rgb"),
            CameraBinding("wrist_image_left", "left_wrist_0_rgb"),
        ),
        control_hz=15.0,
        state_names=(*_DROID_JOINTS, "gripper"),
        action_names=(*(f"{joint}_velocity" for joint in _DROID_JOINTS), "gripper"),
        action_modes=(*("velocity",) * 7, "absolute"),
        horizon=15,
        gripper="binary",
        gripper_names=("gripper",),
        clip_actions=1.0,
    ),
    "openpi_aloha": RobotSetup(
        framework="openpi",
        cameras=tuple(
            CameraBinding(key, slot)
            for key, slot in zip(("cam_high", "cam_left_wrist", "cam_right_wrist"), OPENPI_SLOTS)
        ),
        control_hz=50.0,
        state_names=_ALOHA_JOINTS,
        action_names=_ALOHA_JOINTS,
        action_modes=(*("delta",) * 6, "absolute") * 2,
        horizon=50,
        aloha_space=True,
    ),
    "lerobot_libero": RobotSetup(
        framework="lerobot",
        cameras=(
            CameraBinding("image", "observation.images.image"),
            CameraBinding("image2", "observation.images.image2"),
        ),
        control_hz=20.0,
        state_names=_LIBERO_STATE,
        action_names=_LIBERO_ACTIONS,
        action_modes=_LIBERO_MODES,
        rotate_images=True,
    ),
    "gr00t_libero": _gr00t_libero("min_max"),
    "gr00t_libero_mean_std": _gr00t_libero("mean_std"),
    "gr00t_gr1_arms_waist": RobotSetup(
        framework="gr00t",
        cameras=(CameraBinding("ego_view", "ego_view"),),
        control_hz=20.0,
        state_parts=tuple(VectorPart(key, "sin_cos") for key in _GR1_PARTS),
        action_parts=tuple(VectorPart(key) for key in _GR1_PARTS),
        action_modes=("absolute",) * 29,  # joint positions: arms 7 + 7, hands 6 + 6, waist 3
        embodiment_tag="gr1",
    ),
}
"""Robots of public checkpoints, as the frameworks' own code configures them."""

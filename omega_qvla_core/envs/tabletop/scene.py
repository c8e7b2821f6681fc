"""The simulated scene: the compiled model, its addresses, and random start states."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import mujoco
import numpy as np

from omega_qvla_core.envs.tabletop.tasks import COLOURS

JOINT_NAMES = ("joint_1", "joint_2", "joint_3", "joint_4", "joint_5", "joint_6", "gripper")
"""Joints of every ``[7]`` array: six angles in rad, then the opening of one finger in m."""

CAMERAS = ("front", "wrist")
"""Cameras that a policy sees."""

HUMAN_CAMERA = "overview"
"""Camera for videos; no policy sees it."""

CONTROL_HZ = 20.0
"""Rate of the actions. An action is the target to be reached at the end of its period."""

CONTROL_PERIOD_S = 1.0 / CONTROL_HZ
"""Length of one control period."""

COMMAND_PERIOD_S = 0.01
"""How often the position command is renewed within a control period, as a 100 Hz joint controller would."""

TIMESTEP_S = 0.005
"""Physics time step; ``scene.xml`` holds the same number and a test compares them."""

POSITION_LIMITS = np.array(
    [[-2.0, 2.0], [-1.4, 1.6], [-1.4, 1.7], [-1.6, 1.6], [-2.0, 2.0], [-2.8, 2.8], [0.0, 0.04]], dtype=np.float64
)
"""``[7, 2]`` lower and upper limit of each joint, rad and m, as in ``scene.xml``."""
POSITION_LIMITS.setflags(write=False)

VELOCITY_LIMITS = np.array([2.0, 2.0, 2.0, 2.5, 2.5, 3.0, 0.15], dtype=np.float64)
"""``[7]`` largest speed of each joint's command, rad/s and m/s. Typical of a small arm; 0.4 m/s at the tool needs about
1.5 rad/s, and 0.15 m/s opens the gripper in 0.27 s."""
VELOCITY_LIMITS.setflags(write=False)

HOME = np.array([0.0, 0.036, 0.2332, 0.0, -0.2693, 0.0, 0.036], dtype=np.float64)
"""``[7]`` start pose: tool at x 0.30 m, y 0, z 0.22 m, pointing down, gripper open."""
HOME.setflags(write=False)

CUBE_HALF_M = 0.02
"""Half the edge of a cube: the height of its centre when it lies on the table."""

# Where things start. The prototype's numbers with a slightly narrower fan, so that the front camera can look closer.
_RADIUS_M = (0.27, 0.48)
_AZIMUTH_RAD = 0.65
_CUBE_DISTANCE_M = 0.08
_PLATE_DISTANCE_M = 0.105
_JOINT_NOISE_RAD = 0.03


def load_model() -> mujoco.MjModel:
    """Compiles ``scene.xml``."""
    text = resources.files("omega_qvla_core.envs.tabletop").joinpath("scene.xml").read_text(encoding="utf-8")
    return mujoco.MjModel.from_xml_string(text)


@dataclass(frozen=True)
class Addresses:
    """Where the things of the scene lie in MuJoCo's arrays.

    Attributes:
        joint_qpos: int ``[7]``, positions of ``JOINT_NAMES`` in ``qpos``.
        joint_dof: int ``[7]``, their velocities in ``qvel``.
        mirror_qpos: Position of the second finger in ``qpos``.
        actuator: int ``[7]``, actuators of ``JOINT_NAMES``.
        cube_qpos: int ``[3]``, first of the seven ``qpos`` entries of each cube.
        cube_dof: int ``[3]``, first of the six ``qvel`` entries of each cube.
        cube_body: int ``[3]``, body of each cube.
        cube_geom: int ``[3]``, geom of each cube.
        finger_geoms: Geoms of the left and the right finger.
        hand_geoms: Every geom of the hand that can collide: fingers, palm, flange.
        plate_mocap: Index of the plate in ``mocap_pos``.
        plate_body: Body of the plate.
        tool_site: Site between the fingertips.
        cameras: Camera name -> camera index.
    """

    joint_qpos: np.ndarray
    joint_dof: np.ndarray
    mirror_qpos: int
    actuator: np.ndarray
    cube_qpos: np.ndarray
    cube_dof: np.ndarray
    cube_body: np.ndarray
    cube_geom: np.ndarray
    finger_geoms: tuple[int, int]
    hand_geoms: frozenset[int]
    plate_mocap: int
    plate_body: int
    tool_site: int
    cameras: dict[str, int]

    @classmethod
    def of(cls, model: mujoco.MjModel) -> Addresses:
        """Looks everything up by name."""

        def geom(name: str) -> int:
            return int(model.geom(name).id)

        plate_body = int(model.body("plate").id)
        fingers = (geom("finger_left"), geom("finger_right"))
        return cls(
            joint_qpos=np.array([model.joint(name).qposadr[0] for name in JOINT_NAMES]),
            joint_dof=np.array([model.joint(name).dofadr[0] for name in JOINT_NAMES]),
            mirror_qpos=int(model.joint("gripper_mirror").qposadr[0]),
            actuator=np.array([model.actuator(name).id for name in JOINT_NAMES]),
            cube_qpos=np.array([model.joint(colour).qposadr[0] for colour in COLOURS]),
            cube_dof=np.array([model.joint(colour).dofadr[0] for colour in COLOURS]),
            cube_body=np.array([model.body(colour).id for colour in COLOURS]),
            cube_geom=np.array([geom(colour) for colour in COLOURS]),
            finger_geoms=fingers,
            hand_geoms=frozenset((*fingers, geom("palm"), geom("flange"))),
            plate_mocap=int(model.body_mocapid[plate_body]),
            plate_body=plate_body,
            tool_site=int(model.site("tool").id),
            cameras={name: int(model.camera(name).id) for name in (*CAMERAS, HUMAN_CAMERA)},
        )


@dataclass(frozen=True)
class StartState:
    """How an episode begins.

    Attributes:
        joints: float64 ``[7]``, rad and m.
        cube_xy: float64 ``[3, 2]`` m, in the order of ``COLOURS``.
        cube_yaw: float64 ``[3]`` rad.
        plate_xy: float64 ``[2]`` m.
    """

    joints: np.ndarray
    cube_xy: np.ndarray
    cube_yaw: np.ndarray
    plate_xy: np.ndarray


def sample_start(rng: np.random.Generator) -> StartState:
    """Draws a start state: things on a fan in front of the arm, apart from each other by rejection sampling."""

    def draw() -> np.ndarray:
        # Uniform over the area of the fan, not over the radius.
        radius = np.sqrt(rng.uniform(_RADIUS_M[0] ** 2, _RADIUS_M[1] ** 2))
        azimuth = rng.uniform(-_AZIMUTH_RAD, _AZIMUTH_RAD)
        return radius * np.array([np.cos(azimuth), np.sin(azimuth)])

    while True:
        points = np.stack([draw() for _ in range(4)])
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        cube_gaps = gaps[:3, :3][np.triu_indices(3, k=1)]
        if cube_gaps.min() >= _CUBE_DISTANCE_M and gaps[3, :3].min() >= _PLATE_DISTANCE_M:
            break
    yaw = rng.uniform(-np.pi, np.pi, size=3)
    joints = HOME.copy()
    joints[:6] += rng.normal(0.0, _JOINT_NOISE_RAD, size=6)
    return StartState(joints=joints, cube_xy=points[:3], cube_yaw=yaw, plate_xy=points[3])


def write_start(model: mujoco.MjModel, data: mujoco.MjData, addresses: Addresses, start: StartState) -> None:
    """Puts a start state into fresh simulation data, at rest, with the command at the measured position."""
    mujoco.mj_resetData(model, data)
    data.qpos[addresses.joint_qpos] = start.joints
    data.qpos[addresses.mirror_qpos] = start.joints[6]
    data.ctrl[addresses.actuator] = start.joints
    for address, xy, yaw in zip(addresses.cube_qpos, start.cube_xy, start.cube_yaw, strict=True):
        data.qpos[address : address + 3] = (xy[0], xy[1], CUBE_HALF_M)
        data.qpos[address + 3 : address + 7] = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
    data.mocap_pos[addresses.plate_mocap] = (start.plate_xy[0], start.plate_xy[1], 0.0)
    mujoco.mj_forward(model, data)

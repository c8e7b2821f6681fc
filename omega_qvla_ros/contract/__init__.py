"""The robot contract: which cameras, which joints in which units and limits, and how fast, as one typed YAML file.

The contract is the robot's side; a ``PolicySpec`` is the checkpoint's side. Nothing moves before both agree
(``check_policy``). Joints are matched by name everywhere, never by position. The fields are described in
``docs/contract.md``.
"""

from omega_qvla_ros.contract.binding import PolicyBinding, check_policy, requirements
from omega_qvla_ros.contract.files import contract_from_dict, load_contract
from omega_qvla_ros.contract.joints import (
    EndPoints,
    GripperMap,
    JointContract,
    JointConversion,
    JointLimits,
)
from omega_qvla_ros.contract.schema import (
    GRIPPER_OUTPUTS,
    TRAJECTORY_OUTPUTS,
    CameraContract,
    CheckpointContract,
    ChunkContract,
    LimitContract,
    OutputContract,
    RobotContract,
    RobotDescriptionContract,
    SafetyContract,
    SensorContract,
)
from omega_qvla_ros.contract.urdf import UrdfLimits, limits_from_urdf, with_urdf_limits

__all__ = [
    "GRIPPER_OUTPUTS",
    "TRAJECTORY_OUTPUTS",
    "CameraContract",
    "CheckpointContract",
    "ChunkContract",
    "EndPoints",
    "GripperMap",
    "JointContract",
    "JointConversion",
    "JointLimits",
    "LimitContract",
    "OutputContract",
    "PolicyBinding",
    "RobotContract",
    "RobotDescriptionContract",
    "SafetyContract",
    "SensorContract",
    "UrdfLimits",
    "check_policy",
    "contract_from_dict",
    "limits_from_urdf",
    "load_contract",
    "requirements",
    "with_urdf_limits",
]

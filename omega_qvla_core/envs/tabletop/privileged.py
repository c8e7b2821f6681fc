"""What only a simulator knows: poses of all things and of the cameras, for the expert and for training labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CameraPose:
    """A pinhole camera with square pixels, as MuJoCo defines it (x right, y up, looking along -z).

    Attributes:
        position: float64 ``[3]`` m, world frame.
        rotation: float64 ``[3, 3]``, columns are the camera's axes in the world frame.
        fovy_rad: Vertical opening angle.
        aspect: Width over height of the image.
    """

    position: np.ndarray
    rotation: np.ndarray
    fovy_rad: float
    aspect: float = 1.0

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Projects world points.

        Args:
            points: float64 ``[N, 3]`` m.

        Returns:
            Image coordinates float64 ``[N, 2]`` (u right, v down, both 0..1 inside the image) and a bool ``[N]``,
            true where the point is in front of the camera and inside the image. Points behind the camera get (-1, -1).
        """
        local = (points - self.position) @ self.rotation
        depth = -local[:, 2]
        in_front = depth > 1e-6
        scale = 0.5 / (np.where(in_front, depth, 1.0) * np.tan(self.fovy_rad / 2.0))
        uv = np.stack([0.5 + local[:, 0] * scale / self.aspect, 0.5 - local[:, 1] * scale], axis=1)
        uv = np.where(in_front[:, None], uv, -1.0)
        inside = in_front & np.all((uv >= 0.0) & (uv < 1.0), axis=1)
        return uv, inside


@dataclass(frozen=True)
class PrivilegedState:
    """Everything about one moment that a policy does not see.

    Attributes:
        joint_positions: float64 ``[7]``, rad and m.
        cube_positions: float64 ``[3, 3]`` m, in the order of ``COLOURS``.
        cube_rotations: float64 ``[3, 3, 3]``.
        plate_position: float64 ``[3]`` m.
        tool_position: float64 ``[3]`` m, the point between the fingertips.
        tool_rotation: float64 ``[3, 3]``; z points up when the tool points down, the fingers open along y.
        cameras: The policy's cameras by name.
    """

    joint_positions: np.ndarray
    cube_positions: np.ndarray
    cube_rotations: np.ndarray
    plate_position: np.ndarray
    tool_position: np.ndarray
    tool_rotation: np.ndarray
    cameras: Mapping[str, CameraPose]


def yaw_of(rotation: np.ndarray) -> float:
    """Yaw of a cube in rad: the heading of one of its level axes. It means something modulo a quarter turn only.

    A cube that was knocked over stands on another face: then two of its three axes are still level, and the first
    level one gives the heading.
    """
    level = np.abs(rotation[2]) < 0.7
    axis = int(np.argmax(level))
    return float(np.arctan2(rotation[1, axis], rotation[0, axis]))

"""Forward and inverse kinematics of the arm, with damped least squares."""

from __future__ import annotations

import mujoco
import numpy as np

from omega_qvla_core.envs.tabletop.scene import POSITION_LIMITS, Addresses, load_model

# Small against the arm's singular values (0.1 to 0.6 in the workspace), enough to bound a step near a singularity.
_DAMPING = 0.02
_MAX_ITERATIONS = 20
_TOLERANCE = 1e-5
_MAX_JOINT_STEP_RAD = 0.4


class ArmKinematics:
    """The six joints of the arm, on its own copy of the model."""

    def __init__(self) -> None:
        self._model = load_model()
        self._data = mujoco.MjData(self._model)
        self._addresses = Addresses.of(self._model)
        self._jacobian = np.zeros((6, self._model.nv))

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tool pose of a joint position.

        Args:
            joints: float64, at least the six arm joints in rad.

        Returns:
            Position float64 ``[3]`` m and rotation float64 ``[3, 3]``.
        """
        self._data.qpos[self._addresses.joint_qpos[:6]] = joints[:6]
        mujoco.mj_kinematics(self._model, self._data)
        site = self._addresses.tool_site
        return self._data.site_xpos[site].copy(), self._data.site_xmat[site].reshape(3, 3).copy()

    def inverse(self, joints: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Joint position of a tool pose near a given one, by damped least squares.

        Each iteration solves ``dq = J^T (J J^T + lambda^2 I)^-1 e`` (Wampler 1986; Nakamura and Hanafusa 1986) for the
        pose error ``e`` and stays inside the joint limits. Where the pose is out of reach the closest point found is
        returned.

        Args:
            joints: float64, at least six, where to start in rad.
            position: float64 ``[3]`` m, wanted tool position.
            rotation: float64 ``[3, 3]``, wanted tool rotation.

        Returns:
            float64 ``[6]`` rad.
        """
        solution = np.array(joints[:6], dtype=np.float64)
        lower, upper = POSITION_LIMITS[:6, 0], POSITION_LIMITS[:6, 1]
        site, dofs = self._addresses.tool_site, self._addresses.joint_dof[:6]
        for _ in range(_MAX_ITERATIONS):
            here, orientation = self.forward(solution)
            error = np.concatenate([position - here, rotation_error(orientation, rotation)])
            if np.abs(error).max() < _TOLERANCE:
                break
            mujoco.mj_comPos(self._model, self._data)
            mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], site)
            jacobian = self._jacobian[:, dofs]
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6), error)
            solution = np.clip(solution + np.clip(step, -_MAX_JOINT_STEP_RAD, _MAX_JOINT_STEP_RAD), lower, upper)
        return solution


def rotation_error(current: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rotation vector (world frame, rad) that turns ``current`` into ``wanted``, both ``[3, 3]``."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(wanted @ current.T).reshape(9))
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector

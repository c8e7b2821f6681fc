"""Contract and checkpoint together: do they fit, and how the vectors of one become those of the other."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import PolicySpec, RobotRequirements
from omega_qvla_ros.contract.joints import JointConversion, conversion
from omega_qvla_ros.contract.schema import RobotContract


@dataclass(frozen=True)
class PolicyBinding:
    """Where the contract's joints stand in the checkpoint's vectors, and in which units. Pure numpy.

    Attributes:
        state_joints: For each state entry of the checkpoint, the index of the joint in the contract.
        action_entries: For each joint of the contract, the index of its action entry in the checkpoint.
        state_units: Conversion of the state, in contract order.
        action_units: Conversion of the actions, in contract order.
        is_delta: bool ``[joints]``: the action is the difference to the position at the observation.
    """

    state_joints: np.ndarray
    action_entries: np.ndarray
    state_units: JointConversion
    action_units: JointConversion
    is_delta: np.ndarray

    def state(self, positions: np.ndarray) -> np.ndarray:
        """The checkpoint's proprioception.

        Args:
            positions: ``[..., joints]`` in contract order and robot units.

        Returns:
            float64 ``[..., state entries]`` in the checkpoint's order and units.
        """
        return self.state_units.to_checkpoint(np.asarray(positions, dtype=np.float64))[..., self.state_joints]

    def targets(self, actions: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Position targets of the robot.

        Args:
            actions: ``[steps, action entries]`` in the checkpoint's order and units. Values that are not finite stay
                so; the guard refuses them.
            observed: ``[joints]`` positions at the observation, in contract order and robot units.

        Returns:
            float64 ``[steps, joints]`` in contract order and robot units.

        Raises:
            ConfigError: The actions have another width.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != len(self.action_entries):
            raise ConfigError(
                f"actions of shape {list(actions.shape)} are no [steps, {len(self.action_entries)}]; the checkpoint "
                "does not keep to its own description"
            )
        actions = actions[:, self.action_entries]
        steps = actions / self.action_units.gain
        return np.where(self.is_delta, observed + steps, self.action_units.to_robot(actions))

    def actions(self, targets: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """The inverse of ``targets``: robot positions as the checkpoint would have written them.

        Args:
            targets: ``[steps, joints]`` in contract order and robot units.
            observed: ``[joints]`` positions at the observation for which the actions are to hold.

        Returns:
            float64 ``[steps, action entries]`` in the checkpoint's order and units.
        """
        steps = (np.asarray(targets, dtype=np.float64) - observed) * self.action_units.gain
        converted = np.where(self.is_delta, steps, self.action_units.to_checkpoint(targets))
        actions = np.empty_like(converted)
        actions[:, self.action_entries] = converted
        return actions


def delta_joints(contract: RobotContract) -> np.ndarray:
    """bool ``[joints]``: which joints take differences."""
    return np.array([(joint.action_mode or contract.checkpoint.action_mode) == "delta" for joint in contract.joints])


def requirements(contract: RobotContract) -> RobotRequirements:
    """The contract as far as a checkpoint has to fit it, for ``preflight``."""
    actions = [joint.action_name or joint.name for joint in contract.joints]
    return RobotRequirements(
        name=contract.name,
        cameras=tuple(camera.key for camera in contract.cameras),
        state_names=tuple(joint.state_name or joint.name for joint in contract.joints if joint.in_state),
        action_names=tuple(actions),
        control_hz=contract.chunk_rate_hz,
        execution_horizon_steps=contract.chunk.execution_horizon_steps,
        delta_names=tuple(name for name, delta in zip(actions, delta_joints(contract)) if delta),
    )


def check_policy(contract: RobotContract, spec: PolicySpec) -> PolicyBinding:
    """Check that a checkpoint fits the robot.

    Args:
        contract: The robot.
        spec: What the checkpoint says about itself.

    Returns:
        The maps between both.

    Raises:
        ConfigError: Camera keys, state names, action names, their stated order, the meaning of an action, or the rate
            of the steps differ; the message prints both sides.
    """
    wanted = requirements(contract)
    _same_names("camera keys", wanted.cameras, [camera.key for camera in spec.cameras])
    _same_names("state names", wanted.state_names, spec.state_names)
    _same_names("action names", wanted.action_names, spec.action_names)
    _same_order("state_order", contract.checkpoint.state_order, spec.state_names)
    _same_order("action_order", contract.checkpoint.action_order, spec.action_names)
    _check_modes(wanted, spec)
    if abs(spec.control_hz - contract.chunk_rate_hz) > 1e-6 * contract.chunk_rate_hz:
        key = "control_rate_hz" if contract.chunk.rate_hz is None else "chunk.rate_hz"
        raise ConfigError(
            f"contract {contract.name!r} takes chunks of {contract.chunk_rate_hz} Hz, the checkpoint {spec.name!r} was "
            f"trained at {spec.control_hz} Hz; set {key} of the contract to {spec.control_hz}"
            + (" (or chunk.rate_hz, to keep the control rate)" if contract.chunk.rate_hz is None else "")
        )
    if contract.chunk.execution_horizon_steps > spec.horizon:
        raise ConfigError(
            f"contract {contract.name!r}: execution_horizon_steps is {contract.chunk.execution_horizon_steps}, the "
            f"checkpoint's chunks have {spec.horizon} steps; choose at most {spec.horizon}"
        )
    state_names = [joint.state_name or joint.name if joint.in_state else None for joint in contract.joints]
    return PolicyBinding(
        state_joints=np.array([state_names.index(name) for name in spec.state_names], dtype=np.intp),
        action_entries=np.array([list(spec.action_names).index(name) for name in wanted.action_names], dtype=np.intp),
        state_units=conversion(contract.joints, "state"),
        action_units=conversion(contract.joints, "action"),
        is_delta=delta_joints(contract),
    )


def _check_modes(wanted: RobotRequirements, spec: PolicySpec) -> None:
    """Compare the meaning of each action where the checkpoint says it."""
    for name, mode in zip(spec.action_names, spec.action_modes):
        expected = ("relative",) if name in wanted.delta_names else ("absolute",)
        if mode not in expected:
            said = "delta" if name in wanted.delta_names else "absolute"
            remedy = (
                "set action_mode of the contract to absolute: the checkpoint's own processing adds the position"
                if mode == "absolute"
                else "use a checkpoint whose actions are joint positions, or action_mode: delta where each step is the "
                "difference to the position at the observation"
            )
            raise ConfigError(
                f"action {name!r} of the checkpoint {spec.name!r} is {mode}, contract {wanted.name!r} says {said}; "
                f"{remedy}"
            )


def _same_order(key: str, stated: tuple[str, ...] | None, checkpoint_names: Sequence[str]) -> None:
    if stated is not None and stated != tuple(checkpoint_names):
        raise ConfigError(
            f"checkpoint.{key} of the contract is [{', '.join(stated)}], the checkpoint has "
            f"[{', '.join(checkpoint_names)}]; correct {key}, or load the checkpoint that it was written for"
        )


def _same_names(what: str, contract_names: Sequence[str], checkpoint_names: Sequence[str]) -> None:
    if len(contract_names) == len(set(checkpoint_names)) and set(contract_names) == set(checkpoint_names):
        return
    unmatched = [name for name in contract_names if name not in checkpoint_names]
    hint = ""
    if unmatched:
        free = [name for name in checkpoint_names if name not in contract_names]
        near = difflib.get_close_matches(unmatched[0], free, n=1, cutoff=0.0)
        hint = f" (nearest to {unmatched[0]!r} is {near[0]!r})" if near else ""
    raise ConfigError(
        f"the {what} of contract and checkpoint differ{hint}: contract [{', '.join(contract_names)}], "
        f"checkpoint [{', '.join(checkpoint_names)}]; correct the contract or load the checkpoint made for this robot"
    )

"""configure of the policy node: parameters -> contract, policy and numbers, each checked before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rclpy.node import Node

from omega_qvla_core.checkpoints.folder import PACK_FILE, is_pack, resolve_folder
from omega_qvla_core.checkpoints.preflight import preflight
from omega_qvla_core.checkpoints.weight_files import find_weights
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.policy_types import PolicySpec
from omega_qvla_core.runtime import Policy
from omega_qvla_ros.contract import RobotContract, check_policy, load_contract, requirements
from omega_qvla_ros.nodes.parameters import value
from omega_qvla_ros.resources import resolve_contract
from omega_qvla_ros.session import PolicyLike, SessionOptions


class LoadedPolicy(PolicyLike, Protocol):
    """What configure needs of a policy: a session's needs, and a first inference before the arm waits for one."""

    def warm_up(self) -> float:
        """Infer on a blank observation; returns the seconds that one inference takes."""


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is loaded.

    Attributes:
        device: ``cpu`` or ``cuda``.
    """

    device: str = "cpu"


PolicyLoader = Callable[[Path, PolicyOptions], LoadedPolicy]
"""Checkpoint folder, options -> policy. The node takes it as an argument, so that a policy can be wrapped."""


def load_policy(folder: Path, options: PolicyOptions) -> LoadedPolicy:
    """The loader of every shipped node.

    Raises:
        OmegaQVLAError: The folder cannot be loaded; the message names it and the remedy.
    """
    return Policy.load(folder, device=options.device)


@dataclass(frozen=True)
class Loaded:
    """What configure found.

    Attributes:
        contract: The robot.
        policy: Loaded, checked against the contract, warmed up.
        weights: Name of the weights file (of the first shard) and bytes of all.
        summary: One line for the log.
        topics: Camera key -> topic.
        image_size: Camera key -> smallest height and width in px.
    """

    contract: RobotContract
    policy: LoadedPolicy
    weights: tuple[str, int]
    summary: str
    topics: dict[str, str]
    image_size: dict[str, tuple[int, int]]


def load(node: Node, policy_loader: PolicyLoader) -> Loaded:
    """Read the contract, load the policy, check one against the other, warm up.

    Args:
        node: Gives the parameters.
        policy_loader: Loads the policy.

    Raises:
        OmegaQVLAError: Anything that is wrong; the message names it and the remedy.
    """
    contract = load_contract(resolve_contract(str(value(node, "contract"))))
    _check_supported(contract)
    control_rate_hz(node, contract)
    instruction(node, contract)
    folder = _checkpoint_folder(str(value(node, "checkpoint")))
    if threads := int(value(node, "inference_threads")):
        torch.set_num_threads(threads)
    policy = policy_loader(folder, PolicyOptions(device=str(value(node, "device"))))
    spec = policy.spec
    check_policy(contract, spec)
    preflight(folder, requirements(contract)).require()
    num_steps = int(value(node, "num_steps"))
    if num_steps not in (0, spec.num_steps):
        raise ConfigError(
            f"num_steps is {num_steps}, {spec.name!r} was made for {spec.num_steps} denoise steps; set num_steps to 0"
        )
    inference_s = policy.warm_up()
    files = [folder / PACK_FILE] if is_pack(folder) else list(find_weights(folder).files)
    weight_bytes = sum(file.stat().st_size for file in files)
    return Loaded(
        contract=contract,
        policy=policy,
        weights=(files[0].name, weight_bytes),
        summary=f"policy {spec.name!r} ({spec.quantization}, {weight_bytes / 1e6:.2f} MB, "
        f"{spec.num_steps} denoise steps, {inference_s * 1e3:.0f} ms per inference)",
        topics={camera.key: camera.topic for camera in contract.cameras},
        image_size={camera.key: (camera.height, camera.width) for camera in spec.cameras},
    )


def _check_supported(contract: RobotContract) -> None:
    """Refuse what the contract can say and this node does not do."""
    types = [output.type for output in contract.outputs]
    if types != ["joint_trajectory"]:
        raise ConfigError(
            f"contract {contract.name!r} has the outputs {', '.join(types)}; one joint_trajectory is sent"
        )
    for camera in contract.cameras:
        if camera.transport != "raw" or camera.resize != "checkpoint":
            raise ConfigError(f"camera {camera.key!r}: only transport raw with resize checkpoint is received")
    if contract.limits.mode == "scale" or contract.safety.estop_topic or contract.robot_description.use == "required":
        raise ConfigError(
            f"contract {contract.name!r}: limits.mode scale, estop_topic, robot_description are not served"
        )


def control_rate_hz(node: Node, contract: RobotContract) -> float:
    """Rate of the control timer.

    Raises:
        ConfigError: It is below the contract's.
    """
    rate_hz = float(value(node, "control_rate_hz")) or contract.control_rate_hz
    if rate_hz < contract.control_rate_hz:
        raise ConfigError(
            f"control_rate_hz is {rate_hz:g}, the contract {contract.name!r} commands at {contract.control_rate_hz:g} "
            f"Hz; guard, staleness and holds run at this rate: set it to 0 or to at least {contract.control_rate_hz:g}"
        )
    return rate_hz


def instruction(node: Node, contract: RobotContract) -> str:
    """What the arm is told first: the parameter, or the contract's default where it is empty.

    Raises:
        ConfigError: The parameter has blanks only.
    """
    text = str(value(node, "instruction"))
    if text and not text.strip():
        raise ConfigError(f"the parameter 'instruction' is {text!r}: give words, or '' for the contract's default")
    return text or contract.default_instruction


def instruction_problem(text: object) -> str | None:
    """Why a running node does not take an instruction, None if it does."""
    return None if str(text).strip() else "an empty instruction is refused; use ~/stop to stop the arm"


def horizon_problem(steps: object, spec: PolicySpec) -> str | None:
    """Why an execution horizon does not fit the checkpoint's chunks, None if it does; 0 is the contract's number."""
    if isinstance(steps, int) and steps <= spec.horizon:
        return None
    return f"execution_horizon is {steps}, the chunks of {spec.name!r} have {spec.horizon} steps; choose at most that"


def blend_problem(blend_time_s: object, spec: PolicySpec) -> str | None:
    """Why a blend time does not fit the checkpoint's chunks, None if it does; negative is the contract's number."""
    chunk_s = spec.horizon / spec.control_hz
    if isinstance(blend_time_s, float) and blend_time_s <= chunk_s:
        return None
    return f"blend_time_s is {blend_time_s}, a chunk of {spec.name!r} lasts {chunk_s:g} s; choose at most that"


def session_options(node: Node, contract: RobotContract, spec: PolicySpec) -> SessionOptions:
    """Numbers from the parameters, where 0 or a negative value means the contract's number.

    Raises:
        ConfigError: Execution horizon or blend time is longer than a chunk of the checkpoint.
    """
    blend_time_s = float(value(node, "blend_time_s"))
    blend_time_s = contract.chunk.blend_time_s if blend_time_s < 0 else blend_time_s
    steps = int(value(node, "execution_horizon")) or contract.chunk.execution_horizon_steps
    for problem in (horizon_problem(steps, spec), blend_problem(blend_time_s, spec)):
        if problem is not None:
            raise ConfigError(problem)
    return SessionOptions(
        execution_horizon_steps=steps,
        blend_time_s=blend_time_s,
        noise_seed=int(value(node, "noise_seed")),
        inference_timeout_s=float(value(node, "inference_timeout_s")),
        retry_delay_s=float(value(node, "retry_delay_s")),
        max_consecutive_errors=int(value(node, "max_consecutive_errors")),
        startup_warn_s=float(value(node, "startup_warn_s")),
    )


def _checkpoint_folder(text: str) -> Path:
    if not text.strip():
        raise ConfigError("the parameter 'checkpoint' is empty; set it to a folder or to a shipped policy's name")
    return resolve_folder(text)

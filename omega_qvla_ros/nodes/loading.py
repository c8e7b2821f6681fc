"""configure of the policy node: parameters -> contract, policy and numbers, each checked before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from omega_qvla_core.quant import set_backend
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.device_errors import free_device_memory, free_memory_bytes, is_out_of_memory
from omega_qvla_core.runtime.weight_report import bytes_by_class, has_quantized_layers
from omega_qvla_ros.contract import RobotContract, check_policy, load_contract, requirements
from omega_qvla_ros.guard import LimitScales
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
        engine: ``auto`` or ``off``, see ``Policy``.
        backend: ``auto``, or what multiplies the codes of quantized layers, see ``omega_qvla_core.kernels``.
    """

    device: str = "cpu"
    engine: str = "auto"
    backend: str = "auto"


MAX_INSTRUCTION_CHARACTERS = 1000
"""Longer than any training instruction by far; what a prompt really takes, its tokenizer says."""

PolicyLoader = Callable[[Path, PolicyOptions], LoadedPolicy]
"""Checkpoint folder, options -> policy. The node takes it as an argument, so that a policy can be wrapped."""


def load_policy(folder: Path, options: PolicyOptions) -> LoadedPolicy:
    """The loader of every shipped node.

    Raises:
        OmegaQVLAError: The folder cannot be loaded, or the backend not be had; the message names it and the remedy.
    """
    if options.backend == "auto":
        return Policy.load(folder, device=options.device, engine=options.engine)
    # The CPU's engine asks every layer for its backend; a GPU's has products of its own.
    on_cpu = options.device == "cpu"
    if options.backend == "triton" and on_cpu:
        raise ConfigError("backend 'triton' computes on an NVIDIA GPU; set device to cuda, or backend to auto")
    policy = Policy.load(folder, device=options.device, engine=options.engine if on_cpu else "off")
    if not has_quantized_layers(policy.model):
        raise ConfigError(
            f"backend is {options.backend!r}, but {policy.spec.name!r} holds no quantized layer; set it to auto"
        )
    set_backend(policy.model, options.backend)
    return policy


@dataclass(frozen=True)
class Loaded:
    """What configure found.

    Attributes:
        contract: The robot.
        policy: Loaded, checked against the contract, warmed up.
        weights: Name of the weights file (of the first shard) and bytes of all.
        weight_classes: Class of module -> bytes in memory; empty where the policy does not show its model.
        summary: One line for the log.
        image_size: Camera key -> smallest height and width in px.
    """

    contract: RobotContract
    policy: LoadedPolicy
    weights: tuple[str, int]
    weight_classes: dict[str, int]
    summary: str
    image_size: dict[str, tuple[int, int]]


def read_contract(node: Node) -> RobotContract:
    """The contract that the parameter names, with the numbers checked that need no checkpoint.

    Raises:
        ConfigError: See ``load_contract``, ``control_rate_hz``, ``instruction``.
    """
    contract = load_contract(resolve_contract(str(value(node, "contract"))))
    control_rate_hz(node, contract)
    instruction(node, contract)
    return contract


def load(node: Node, contract: RobotContract, policy_loader: PolicyLoader) -> Loaded:
    """Load the policy, check it against the contract, warm up.

    Args:
        node: Gives the parameters.
        contract: The robot, its limits complete.
        policy_loader: Loads the policy.

    Raises:
        OmegaQVLAError: Anything that is wrong; the message names it and the remedy.
    """
    folder = _checkpoint_folder(str(value(node, "checkpoint")))
    if threads := int(value(node, "inference_threads")):
        torch.set_num_threads(threads)
    files = [folder / PACK_FILE] if is_pack(folder) else list(find_weights(folder).files)
    weight_bytes = sum(file.stat().st_size for file in files)
    device = str(value(node, "device"))
    with _memory_guard(device, weight_bytes):
        options = PolicyOptions(device, engine=str(value(node, "engine")), backend=str(value(node, "backend")))
        policy = policy_loader(folder, options)
        spec = policy.spec
        check_policy(contract, spec)
        preflight(folder, requirements(contract)).require()
        _check_quantization(node, policy)
        _check_num_steps(int(value(node, "num_steps")), spec)
        inference_s = policy.warm_up()
    model = getattr(policy, "model", None)
    return Loaded(
        contract=contract,
        policy=policy,
        weights=(files[0].name, weight_bytes),
        weight_classes={} if model is None else bytes_by_class(model),
        summary=f"policy {spec.name!r} ({spec.quantization}, {weight_bytes / 1e6:.2f} MB, "
        f"{spec.num_steps} denoise steps, {inference_s * 1e3:.0f} ms per inference)",
        image_size={camera.key: (camera.height, camera.width) for camera in spec.cameras},
    )


@contextmanager
def _memory_guard(device: str, weight_bytes: int) -> Iterator[None]:
    """Turn running out of memory into a message with numbers, and give the memory back."""
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
    # Outside the except block: the error's traceback keeps everything alive that was loaded so far.
    free_device_memory()
    free = free_memory_bytes(device)
    raise ConfigError(
        f"not enough memory on {device!r} to load the policy: its weights alone need {weight_bytes / 1e6:.0f} MB, "
        f"{'an unknown amount' if free is None else f'{free / 1e6:.0f} MB'} is free ({cause}); use a smaller or "
        "quantized checkpoint, or end what else uses the device"
    )


def _check_quantization(node: Node, policy: LoadedPolicy) -> None:
    spec, recipe = policy.spec, str(value(node, "recipe"))
    if recipe and spec.quantization != recipe:
        raise ConfigError(
            f"recipe is {recipe!r}, the checkpoint {spec.name!r} was made with {spec.quantization!r}; load the pack "
            "that was quantized with it, or set recipe to ''"
        )
    if not value(node, "require_quantization"):
        return
    model = getattr(policy, "model", None)
    if spec.quantization == "none" or (model is not None and not has_quantized_layers(model)):
        classes = {} if model is None else bytes_by_class(model)
        held = ", ".join(f"{name} {size} B" for name, size in list(classes.items())[:4]) or "unknown"
        raise ConfigError(
            f"require_quantization is set, but {spec.name!r} (quantization {spec.quantization!r}) holds no quantized "
            f"layer; its weights: {held}; load a pack made by omega-qvla quantize"
        )


def _check_num_steps(num_steps: int, spec: PolicySpec) -> None:
    if num_steps not in (0, spec.num_steps):
        raise ConfigError(
            f"num_steps is {num_steps}, {spec.name!r} was made for {spec.num_steps} denoise steps; set num_steps to 0"
        )


def control_rate_problem(rate_hz: object, contract: RobotContract) -> str | None:
    """Why the control timer cannot have a rate, None if it can; 0 is the contract's rate."""
    if isinstance(rate_hz, float) and (rate_hz == 0.0 or rate_hz >= contract.control_rate_hz):
        return None
    return (
        f"control_rate_hz is {rate_hz}, the contract {contract.name!r} commands at {contract.control_rate_hz:g} Hz; "
        f"guard, staleness and holds run at this rate: set it to 0 or to at least {contract.control_rate_hz:g}"
    )


def control_rate_hz(node: Node, contract: RobotContract) -> float:
    """Rate of the control timer.

    Raises:
        ConfigError: It is below the contract's.
    """
    rate_hz = float(value(node, "control_rate_hz"))
    problem = control_rate_problem(rate_hz, contract)
    if problem is not None:
        raise ConfigError(problem)
    return rate_hz or contract.control_rate_hz


def instruction(node: Node, contract: RobotContract) -> str:
    """What the arm is told first: the parameter, or the contract's default where it is empty.

    Raises:
        ConfigError: The parameter has blanks only.
    """
    text = str(value(node, "instruction"))
    if text and not text.strip():
        raise ConfigError(f"the parameter 'instruction' is {text!r}: give words, or '' for the contract's default")
    problem = instruction_problem(text) if text else None
    if problem is not None:
        raise ConfigError(problem)
    return text or contract.default_instruction


def instruction_problem(text: object) -> str | None:
    """Why a running node does not take an instruction, None if it does."""
    text = str(text)
    if not text.strip():
        return "an empty instruction is refused; use ~/stop to stop the arm"
    if len(text) > MAX_INSTRUCTION_CHARACTERS:
        return (
            f"the instruction has {len(text)} characters, at most {MAX_INSTRUCTION_CHARACTERS} are taken; say it in "
            "one sentence"
        )
    if any(not character.isprintable() for character in text) or "\N{REPLACEMENT CHARACTER}" in text:
        return "the instruction has control characters or was not valid UTF-8; send plain text"
    return None


def horizon_problem(steps: object, spec: PolicySpec) -> str | None:
    """Why an execution horizon does not fit the checkpoint's chunks, None if it does; 0 is the contract's number."""
    if isinstance(steps, int) and steps <= spec.horizon:
        return None
    return f"execution_horizon is {steps}, the chunks of {spec.name!r} have {spec.horizon} steps; choose at most that"


def chunk_rate_problem(rate_hz: object, spec: PolicySpec) -> str | None:
    """Why a rate of inferences does not fit the checkpoint's chunks, None if it does; 0 leaves it to the horizon."""
    if isinstance(rate_hz, float) and (rate_hz == 0.0 or round(spec.control_hz / rate_hz) <= spec.horizon):
        return None
    lowest_hz = spec.control_hz / spec.horizon
    return f"chunk_rate_hz is {rate_hz}, a chunk of {spec.name!r} ends before; choose at least {lowest_hz:g}"


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
    steps = horizon_steps(node, contract, spec)
    for problem in (horizon_problem(steps, spec), blend_problem(blend_time_s, spec)):
        if problem is not None:
            raise ConfigError(problem)
    safety, retry_delay_s = contract.safety, float(value(node, "retry_delay_s"))
    return SessionOptions(
        execution_horizon_steps=steps,
        blend_time_s=blend_time_s,
        noise_seed=int(value(node, "noise_seed")),
        inference_timeout_s=float(value(node, "inference_timeout_s")) or safety.inference_timeout_s,
        retry_delay_s=safety.retry_delay_s if retry_delay_s < 0 else retry_delay_s,
        max_consecutive_errors=int(value(node, "max_consecutive_errors")) or safety.max_consecutive_errors,
        startup_warn_s=float(value(node, "startup_warn_s")) or safety.startup_warn_s,
        start_timeout_s=float(value(node, "start_timeout_s")) or safety.start_timeout_s,
        image_timeout_s=float(value(node, "image_timeout_s")) or None,
        joint_states_timeout_s=float(value(node, "joint_states_timeout_s")) or None,
        stamp_source=str(value(node, "stamp_source")),
        dry_run=bool(value(node, "dry_run")),
        limit_scales=LimitScales(
            position=float(value(node, "position_limit_scale")),
            velocity=float(value(node, "velocity_limit_scale")),
            acceleration=float(value(node, "acceleration_limit_scale")),
        ),
    )


def horizon_steps(node: Node, contract: RobotContract, spec: PolicySpec) -> int:
    """Steps between two inferences: from ``chunk_rate_hz`` where it is given, else ``execution_horizon``."""
    rate_hz = float(value(node, "chunk_rate_hz"))
    if rate_hz > 0.0:
        return max(1, round(spec.control_hz / rate_hz))
    return int(value(node, "execution_horizon")) or contract.chunk.execution_horizon_steps


def free_memory() -> None:
    """Give the memory of a policy that is not used any more back to its device."""
    free_device_memory()


def _checkpoint_folder(text: str) -> Path:
    if not text.strip():
        raise ConfigError("the parameter 'checkpoint' is empty; set it to a folder or to a shipped policy's name")
    return resolve_folder(text)

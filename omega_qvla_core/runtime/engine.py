"""Static engines: the whole way from an observation's tensors to actions, prepared once for fixed shapes.

An engine has its own layout of a model's weights, preallocated buffers, and a fixed sequence of kernels (on a GPU one
graph); it computes what ``model.sample_actions(inputs.embed(model), noise, num_steps)`` computes, up to the rounding
that it states. The model itself stays the reference: training, calibration and whatever an engine does not take run it
step by step ("eager").
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import ConfigError, EngineError
from omega_qvla_core.models.flow import VelocityGuide
from omega_qvla_core.processing.policy_processor import ModelInputs

logger = logging.getLogger(__name__)

ENGINE_CHOICES = ("auto", "off")

# Device type -> module with ``build(model) -> Engine``, imported when it is asked for: its libraries are optional.
_BUILDERS: dict[str, str] = {
    "cpu": "omega_qvla_core.runtime.cpu_engine",
    "cuda": "omega_qvla_core.runtime.cuda_engine",
}


@dataclass(frozen=True)
class EngineShape:
    """What is fixed while an engine runs; one set of buffers each.

    Attributes:
        batch: Observations at a time.
        cameras: Cameras that are present.
        text_tokens: Prompt tokens that there is room for; with the images' in GR00T N1.5, whose prompt holds them.
        num_steps: Denoise steps.
        embodiment: Index, for families with weights per embodiment.
    """

    batch: int
    cameras: int
    text_tokens: int
    num_steps: int
    embodiment: int = 0


class Engine(Protocol):
    """One way to run a whole model; see the module's docstring.

    Attributes:
        name: ``cpu`` or ``cuda``.
        precision: What its products really compute with: ``fp32``, ``bf16``, ``w8a8``, ``w4a8``, ``w4a4``, or the
            recipe's name for a mixture.
    """

    name: str
    precision: str

    def bucket(self, inputs: ModelInputs, num_steps: int) -> EngineShape:
        """The shape that takes these inputs.

        Raises:
            EngineError: It cannot take them; the message says why, and the caller runs the model instead.
        """
        ...

    def prepare(self, shape: EngineShape) -> None:
        """Allocate and warm up for a shape. Does nothing if that was done."""
        ...

    def run(self, inputs: ModelInputs, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None) -> Tensor:
        """Actions float32 ``[B, H, A]`` from noise of that shape, on the model's device; the caller's own tensor."""
        ...

    def stages(self, shape: EngineShape) -> dict[str, Callable[[], None]]:
        """``vision``, ``prefix``, ``denoise`` (all steps) and ``chunk`` (everything): each runs once on the buffers."""
        ...

    def launches(self, shape: EngineShape) -> int:
        """Kernels, or operator calls, for one chunk."""
        ...

    def memory_bytes(self) -> int:
        """Weights in the engine's layout, and buffers."""
        ...


def check_engine(choice: str) -> str:
    """The choice, if there is such a one.

    Raises:
        ConfigError: There is not.
    """
    if choice not in ENGINE_CHOICES:
        raise ConfigError(f"engine is {choice!r}; it must be one of {', '.join(ENGINE_CHOICES)}")
    return choice


def build_engine(model: nn.Module, device: torch.device, untried: bool = False) -> Engine | None:
    """The engine for a model on a device, or None, with the reason in the log.

    Args:
        model: On the device.
        device: Where it is.
        untried: Also take what has driven no arm yet (see ``cuda_engine.build``): for benches, never for a robot.
    """
    module = _BUILDERS.get(device.type)
    if module is None:
        return None
    # The CPU that tests run on has run every CPU engine.
    options = {"untried": untried} if device.type == "cuda" else {}
    try:
        return import_module(module).build(model, **options)
    except EngineError as error:
        logger.warning("no static engine on %s: %s; the model runs step by step", device.type, error)
        return None

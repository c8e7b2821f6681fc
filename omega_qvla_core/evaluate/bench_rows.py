"""The rows of a comparison: one model in one precision, run in one way, stage by stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_quantize import RECIPES, quantize_randomly
from omega_qvla_core.evaluate.bench_shapes import BenchShape, ModelConfig, model_inputs, shaped, start_noise
from omega_qvla_core.runtime.engine import Engine, build_engine
from omega_qvla_core.runtime.policy import Policy

STAGES = ("vision", "prefix", "denoise", "chunk")
RUNTIMES = ("eager", "engine", "compile")

# Shipped policies that stand for a precision of the tabletop policy; other precisions get random codes.
_TABLETOP = {"fp32": "tabletop", "w4a4_grouped": "tabletop_w4a4"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(model: str, size: str, shape: BenchShape) -> ModelConfig:
    """Sizes of a model for a shape.

    Raises:
        ConfigError: There is no such model or size, or the shape does not fit it.
    """
    if model == "tabletop":
        return shaped(Policy.load("tabletop").model.config, shape)
    return shaped(preset(model, size), shape)


def build_model(model: str, size: str, shape: BenchShape, precision: str, device: str) -> nn.Module:
    """A model of a precision: ``fp32``, ``bf16`` or one that ``bench_quantize`` knows.

    The tabletop policy is the trained one; its 4-bit pack is what ``w4a4_grouped`` runs. The others are random.
    """
    if model == "tabletop":
        if precision in _TABLETOP:
            return Policy.load(_TABLETOP[precision], device).model
        network = Policy.load("tabletop", device).model
        return network.to(DTYPES[precision]) if precision in DTYPES else quantize_randomly(network, precision)
    dtype = DTYPES.get(precision, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    network = random_model(config_of(model, size, shape), device, dtype)
    return quantize_randomly(network, precision) if precision in RECIPES else network


class Runner(ABC):
    """One way to run one model."""

    @abstractmethod
    def stages(self) -> dict[str, Callable[[], object]]:
        """Some of ``STAGES`` -> what runs it once."""

    @abstractmethod
    def actions(self) -> Tensor:
        """Actions float32 ``[1, H, A]`` from the inputs and noise that all runners of a shape get."""


class EagerRunner(Runner):
    """The model's own code."""

    def __init__(self, model: nn.Module, shape: BenchShape, device: str) -> None:
        self.model, self.num_steps = model, shape.num_steps
        self.inputs = model_inputs(model.config, shape, device)
        self.noise = start_noise(model.config).to(device)

    def actions(self) -> Tensor:
        with torch.inference_mode():
            return self.model.sample_actions(self.inputs.embed(self.model), self.noise, self.num_steps)

    def stages(self) -> dict[str, Callable[[], object]]:
        with torch.inference_mode():
            prefix = self.inputs.embed(self.model)
            cache = self.model.encode_prefix(prefix, last_hidden=False)
        return {
            "vision": torch.inference_mode()(lambda: self.inputs.embed(self.model)),
            "prefix": torch.inference_mode()(lambda: self.model.encode_prefix(prefix, last_hidden=False)),
            "denoise": torch.inference_mode()(lambda: self.model.sample_actions(cache, self.noise, self.num_steps)),
            "chunk": self.actions,
        }


class EngineRunner(EagerRunner):
    """The static engine.

    Raises:
        EngineError: There is none for this model.
    """

    def __init__(self, model: nn.Module, shape: BenchShape, device: str) -> None:
        super().__init__(model, shape, device)
        # A bench is how an engine that no GPU has run yet gets its first run.
        engine = build_engine(model, torch.device(device), untried=True)
        if engine is None:
            raise EngineError(f"there is no engine for this model on {device}")
        self.engine: Engine = engine
        self.shape = engine.bucket(self.inputs, shape.num_steps)
        engine.prepare(self.shape)

    def actions(self) -> Tensor:
        return self.engine.run(self.inputs, self.noise, self.num_steps)

    def stages(self) -> dict[str, Callable[[], object]]:
        return {**self.engine.stages(self.shape), "chunk": self.actions}


class CompiledRunner(EagerRunner):
    """``torch.compile`` of the model's own code, as a whole; needs a C++ compiler on a CPU."""

    def __init__(self, model: nn.Module, shape: BenchShape, device: str) -> None:
        super().__init__(model, shape, device)
        self._sample = torch.compile(self._eager_actions, mode="max-autotune")
        try:
            self.actions()
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            raise EngineError(f"torch.compile failed: {str(error).splitlines()[0]}") from error

    def actions(self) -> Tensor:
        with torch.inference_mode():
            return self._sample()

    def stages(self) -> dict[str, Callable[[], object]]:
        return {"chunk": self.actions}

    def _eager_actions(self) -> Tensor:
        return self.model.sample_actions(self.inputs.embed(self.model), self.noise, self.num_steps)


_RUNNERS: dict[str, type[EagerRunner]] = {"eager": EagerRunner, "engine": EngineRunner, "compile": CompiledRunner}


def build_runner(runtime: str, model: nn.Module, shape: BenchShape, device: str) -> Runner:
    """A runner by the name of its runtime.

    Raises:
        EngineError: It cannot run this model here; the message says why.
    """
    return _RUNNERS[runtime](model, replace(shape), device)

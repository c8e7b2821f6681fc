"""The static engine for CPUs: Pi 0.5 (and so the tabletop policy) and GR00T N1.5, one observation at a time.

Models are in float32 or quantized. A plan of fixed buffers is made per prefix length and number of denoise steps (and
embodiment), and the most recent ones are kept: lengths differ with the instruction alone. Nothing is padded, so that no
padding is masked. A model whose weights were written, moved or replaced is read again before the next run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.site import QuantizedSite
from omega_qvla_core.runtime.cpu_buffers import Watched, count_operators
from omega_qvla_core.runtime.cpu_examples import example_inputs
from omega_qvla_core.runtime.cpu_gr00t import Gr00tPlan, Gr00tWeights
from omega_qvla_core.runtime.cpu_pi05 import Pi05Plan, Pi05Weights
from omega_qvla_core.runtime.cpu_plan import Plan, Weights
from omega_qvla_core.runtime.engine import EngineShape, VelocityGuide

# Plans that are kept; a robot has a handful of instructions. The tabletop policy's plan takes 0.4 MB, that of Pi 0.5 or
# GR00T N1.5 at full size 0.2 GB.
_PLANS = 8


class _Family(NamedTuple):
    """How the models of a family are read, and what plans are made of them."""

    weights: Callable[[Any], Weights]
    plan: Callable[[Any, Any, Any, int], Plan]
    shape_of: Callable[[Any], Hashable]


_FAMILIES: dict[type[nn.Module], _Family] = {
    Pi05: _Family(Pi05Weights.of, Pi05Plan, Pi05Plan.shape_of),
    Gr00tN15: _Family(Gr00tWeights.of, Gr00tPlan, Gr00tPlan.shape_of),
}


def build(model: nn.Module) -> CpuEngine:
    """The engine of a model.

    Raises:
        EngineError: It does not take the model.
    """
    return CpuEngine(model)


class CpuEngine:
    """See the module's docstring, and ``Engine``.

    Calls from several threads run one after the other. Results agree with the model's to float32 rounding: see
    ``cpu_pi05`` and ``cpu_gr00t``.

    Args:
        model: ``Pi05`` or ``Gr00tN15``, float32, on the CPU.

    Raises:
        EngineError: The model is of another type or elsewhere.
    """

    name = "cpu"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._family = _family(model)
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[Hashable, int], Plan] = OrderedDict()
        self._weights: Weights | None = None
        self._examples: dict[EngineShape, ModelInputs] = {}
        self._watch()

    def bucket(self, inputs: ModelInputs, num_steps: int) -> EngineShape:
        """The exact shape of the inputs.

        Raises:
            EngineError: More than one observation, or an empty prompt; a model that is trained, or whose calls someone
                watches.
        """
        batch = inputs.tokens.shape[0]
        if batch != 1:
            raise EngineError(f"batch is {batch}; the CPU engine runs one observation at a time")
        if self.model.training:
            raise EngineError("the model is in training mode; call eval()")
        if self._watched.has_hooks():
            raise EngineError("hooks watch the model's calls, which an engine does not make")
        cameras, text_tokens = sum(bool(mask.all()) for mask in inputs.image_masks), int(inputs.token_mask.sum())
        if text_tokens == 0:
            raise EngineError("the prompt is empty")
        embodiment = 0 if inputs.embodiment is None else inputs.embodiment[0]
        return EngineShape(1, cameras, text_tokens, num_steps, embodiment)

    @torch.inference_mode()
    def prepare(self, shape: EngineShape) -> None:
        """Make the plan of a shape and run it once on blank inputs."""
        if shape not in self._examples:
            example = example_inputs(self.model.config, shape)
            self.run(example, torch.zeros(self._noise_shape()), shape.num_steps)
            self._examples[shape] = example

    @torch.inference_mode()
    def run(self, inputs: ModelInputs, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None) -> Tensor:
        """Actions float32 ``[1, H, A]`` from noise of that shape.

        Raises:
            ValueError: The noise does not fit the model.
            EngineError: See ``bucket``; or the model was moved or converted.
        """
        if tuple(noise.shape) != self._noise_shape():
            raise ValueError(f"noise has shape {tuple(noise.shape)}; this engine needs {self._noise_shape()}")
        self.bucket(inputs, num_steps)
        with self._lock:
            prefix = inputs.embed(self.model)
            plan = self._plan(prefix, num_steps)
            plan.encode(prefix)
            return plan.denoise(noise[0].float(), guide)[None]

    def stages(self, shape: EngineShape) -> dict[str, Callable[[], None]]:
        """Stages on blank inputs; see ``Engine``."""
        self.prepare(shape)
        inputs, noise = self._examples[shape], torch.zeros(self._noise_shape())
        with torch.inference_mode():
            prefix = inputs.embed(self.model)
        with self._lock:
            plan = self._plan(prefix, shape.num_steps)
        calls = {
            "vision": lambda: inputs.embed(self.model),
            "prefix": lambda: plan.encode(prefix),
            "denoise": lambda: plan.denoise(noise[0]),
            "chunk": lambda: self.run(inputs, noise, shape.num_steps),
        }
        return {name: _Stage(call) for name, call in calls.items()}

    def launches(self, shape: EngineShape) -> int:
        """Operators for one chunk, views included."""
        return count_operators(self.stages(shape)["chunk"])

    def memory_bytes(self) -> int:
        """Copies of weights and buffers, besides the model itself."""
        with self._lock:
            copies = 0 if self._weights is None else self._weights.copied_bytes()
            return copies + sum(plan.bytes() for plan in self._plans.values())

    def _noise_shape(self) -> tuple[int, int, int]:
        return 1, self.model.config.action_horizon, self.model.config.action_dim

    def _watch(self) -> None:
        """Forget what was read of the model, and take it as it is now."""
        _check(self.model)
        self._plans.clear()
        self._weights = None
        self._watched, self._sites = Watched(self.model), list(quantized_sites(self.model))
        self._backends = [site.backend for site in self._sites]
        self.precision = _precision(self._sites)

    def _is_current(self) -> bool:
        return self._watched.is_current() and self._backends == [site.backend for site in self._sites]

    def _plan(self, prefix: Any, num_steps: int) -> Plan:
        if not self._is_current():
            self._watch()
        if self._weights is None:
            self._weights = self._family.weights(self.model)
        shape = self._family.shape_of(prefix)
        key = (shape, num_steps)
        if key not in self._plans:
            self._plans[key] = self._family.plan(self.model, self._weights, shape, num_steps)
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]


@dataclass(frozen=True)
class _Stage:
    """A stage that needs no context."""

    call: Callable[[], object]

    @torch.inference_mode()
    def __call__(self) -> None:
        self.call()


def _family(model: nn.Module) -> _Family:
    for known, family in _FAMILIES.items():
        if isinstance(model, known):
            return family
    raise EngineError(f"the CPU engine has no plan for {type(model).__name__}")


def _check(model: nn.Module) -> None:
    """Refuse weights that the plans do not compute with as the model does."""
    for name, value in model.named_parameters():
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise EngineError(f"{name} is {value.dtype} on {value.device}; the CPU engine takes float32 on the CPU")


def _precision(sites: Sequence[QuantizedSite]) -> str:
    """``fp32``, or the bits of the quantized sites, such as ``w4a4``; ``mixed`` if they differ."""
    found = {f"w{site.spec.recipe.weight_bits}a{site.spec.recipe.activation_bits}" for site in sites}
    if not found:
        return "fp32"
    return found.pop() if len(found) == 1 else "mixed"

"""The static engine for CPUs: Pi 0.5 (and so the tabletop policy) in float32 or quantized, one observation at a time.

A plan of fixed buffers is made per prefix length and number of denoise steps, and the most recent ones are kept:
lengths differ with the instruction alone. Nothing is padded, so that nothing is masked. A model whose weights were
written, moved or replaced is read again before the next run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.linear import quantized_sites
from omega_qvla_core.quant.site import QuantizedSite
from omega_qvla_core.runtime.cpu_buffers import Watched, count_operators
from omega_qvla_core.runtime.cpu_pi05 import Pi05Plan, Pi05Weights
from omega_qvla_core.runtime.cpu_vision import embed, example_inputs
from omega_qvla_core.runtime.engine import EngineShape, VelocityGuide

# Plans that are kept; a robot has a handful of instructions. The tabletop policy's plan takes 0.4 MB, that of Pi 0.5 at
# full size 0.2 GB.
_PLANS = 8


def build(model: nn.Module) -> CpuEngine:
    """The engine of a model.

    Raises:
        EngineError: It does not take the model.
    """
    if not isinstance(model, Pi05):
        raise EngineError(f"the CPU engine has no plan for {type(model).__name__}")
    return CpuEngine(model)


class CpuEngine:
    """See the module's docstring, and ``Engine``.

    Calls from several threads run one after the other. Results agree with the model's to float32 rounding: see
    ``cpu_pi05``.

    Args:
        model: Float32, on the CPU.

    Raises:
        EngineError: The model is of another type or elsewhere.
    """

    name = "cpu"

    def __init__(self, model: Pi05) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[int, int], Pi05Plan] = OrderedDict()
        self._weights: Pi05Weights | None = None
        self._examples: dict[EngineShape, ModelInputs] = {}
        self._watch()

    def bucket(self, inputs: ModelInputs, num_steps: int) -> EngineShape:
        """The exact shape of the inputs.

        Raises:
            EngineError: More than one observation; a model that is trained, or whose calls someone watches.
        """
        batch = inputs.tokens.shape[0]
        if batch != 1:
            raise EngineError(f"batch is {batch}; the CPU engine runs one observation at a time")
        if self.model.training:
            raise EngineError("the model is in training mode; call eval()")
        if self._watched.has_hooks():
            raise EngineError("hooks watch the model's calls, which an engine does not make")
        cameras = sum(bool(mask.all()) for mask in inputs.image_masks)
        return EngineShape(1, cameras, int(inputs.token_mask.sum()), num_steps)

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
            embeddings = embed(self.model, inputs)
            plan = self._plan(embeddings.shape[0], num_steps)
            plan.encode(embeddings)
            return plan.denoise(noise[0].float(), guide)[None]

    def stages(self, shape: EngineShape) -> dict[str, Callable[[], None]]:
        """Stages on blank inputs; see ``Engine``."""
        self.prepare(shape)
        inputs, noise = self._examples[shape], torch.zeros(self._noise_shape())
        with torch.inference_mode():
            embeddings = embed(self.model, inputs)
        with self._lock:
            plan = self._plan(embeddings.shape[0], shape.num_steps)
        calls = {
            "vision": lambda: embed(self.model, inputs),
            "prefix": lambda: plan.encode(embeddings),
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

    def _plan(self, prefix_tokens: int, num_steps: int) -> Pi05Plan:
        if not self._is_current():
            self._watch()
        if self._weights is None:
            self._weights = Pi05Weights.of(self.model)
        key = (prefix_tokens, num_steps)
        if key not in self._plans:
            self._plans[key] = Pi05Plan(self.model, self._weights, prefix_tokens, num_steps)
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


def _check(model: Pi05) -> None:
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

"""The engine of NVIDIA GPUs: every stage of a chunk captured in CUDA graphs, replayed on static buffers.

One graph holds everything from the images to the actions, all denoise steps included. Stages and single steps have
graphs of their own, captured when they are first asked for: for measurements, and for a guide between the steps, which
is a Python function. Without a GPU (Triton's interpreter, in tests) the same sequence runs kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.site import QuantizedSite
from omega_qvla_core.runtime.engine import EngineShape, VelocityGuide

_LEAST_CAPABILITY = (8, 0)
_MOST_SHAPES = 4
"""Sets of buffers and graphs kept at a time."""


def build(model: nn.Module, untried: bool = False) -> CudaEngine:
    """The engine of a model on a GPU.

    Args:
        model: As for ``CudaEngine``, on its device.
        untried: Also take the keypoint encoder, with which no arm has been driven on a GPU. Benches and tests do. A
            robot must not: its weights are float32, the engine computes in bfloat16, and that moved single actions of
            the 4-bit policy by up to 0.5 (normalised units) on an H100.

    Raises:
        EngineError: The package triton is missing, the GPU is too old, the kernels do not compute this model, or no arm
            has been driven with it.
    """
    if find_spec("triton") is None:
        raise EngineError("the package triton is not installed; install omega_qvla_ros[gpu]")
    device = next(model.parameters()).device
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise EngineError(f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0")
    check_precision(model)
    if not untried:
        check_tried(model)
    return CudaEngine(model, capability)


def check_precision(model: nn.Module) -> None:
    """Refuse what would compute in another precision than asked for.

    Raises:
        EngineError: The weights are float32, and none is quantized.
    """
    weights = [one.weight for one in model.modules() if isinstance(one, nn.Linear)]
    quantized = any(isinstance(one, QuantizedSite) for one in model.modules())
    if not quantized and all(one.dtype == torch.float32 for one in weights):
        raise EngineError(
            "the weights are float32 and the engine computes in bfloat16; load them as bfloat16 to use it"
        )


def check_tried(model: nn.Module) -> None:
    """Refuse what has driven no arm; see ``build``.

    Raises:
        EngineError: See above.
    """
    from omega_qvla_core.models.keypoint_vision import KeypointVision

    if any(isinstance(one, KeypointVision) for one in model.modules()):
        raise EngineError(
            "the keypoint encoder computes in float32 and this engine in bfloat16; no arm has been driven with it so "
            "(omega-qvla bench compare --device cuda measures it)"
        )


class CudaEngine:
    """See the module's docstring; the protocol is ``runtime.engine.Engine``.

    Args:
        model: ``Pi05`` (with a SigLIP or keypoint encoder) or ``Gr00tN15``, on its device. Its weights are copied.
        capability: Compute capability, which chooses block sizes.
        dtype: Of rows, keys and values, and unquantized weights.
        expand: Keep 4-bit weights of products for many tokens as int8: faster on GPUs with much memory.
        capture: Whether to capture graphs; without a GPU there are none.

    Raises:
        EngineError: The kernels do not compute this model.
    """

    name = "cuda"

    def __init__(
        self,
        model: nn.Module,
        capability: tuple[int, int],
        dtype: torch.dtype = torch.bfloat16,
        expand: bool = True,
        capture: bool = True,
    ) -> None:
        from omega_qvla_core.kernels.triton_kernels.tuning import tuning

        self._model, self._dtype, self._expand, self._capture = model, dtype, expand, capture
        self._tuned = tuning(capability)
        self._plans: dict[int, Any] = {}
        self._refused: dict[int, str] = {}
        self._running: dict[EngineShape, _Running] = {}
        self._plan_type = _plan_type(model)
        self.precision = ""

    def bucket(self, inputs: ModelInputs, num_steps: int) -> EngineShape:
        """See ``Engine``."""
        return self._plan(num_steps).shape(inputs)

    @torch.no_grad()
    def prepare(self, shape: EngineShape) -> None:
        """See ``Engine``."""
        if shape in self._running:
            return
        if len(self._running) >= _MOST_SHAPES:
            self._running.pop(next(iter(self._running)))
        static = self._plan(shape.num_steps).static(shape)
        self._running[shape] = _Running(static, shape.num_steps, self._capture)

    def run(self, inputs: ModelInputs, noise: Tensor, num_steps: int, guide: VelocityGuide | None = None) -> Tensor:
        """See ``Engine``."""
        # Buffers outlive the caller's inference mode, so they are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            return self._run(inputs, noise, num_steps, guide)

    def _run(self, inputs: ModelInputs, noise: Tensor, num_steps: int, guide: VelocityGuide | None) -> Tensor:
        shape = self.bucket(inputs, num_steps)
        self.prepare(shape)
        running = self._running[shape]
        running.static.load(inputs)
        running.static.x_t.copy_(noise[0])
        if guide is None:
            running.replay("chunk")
        else:
            running.replay("vision")
            running.replay("prefix")
            self._guided(running, guide, num_steps)
        return running.static.x_t[None].clone()

    def stages(self, shape: EngineShape) -> dict[str, Callable[[], None]]:
        """See ``Engine``."""
        with torch.inference_mode(False):
            self.prepare(shape)
        running = self._running[shape]
        return {name: partial(running.replay, name) for name in ("vision", "prefix", "denoise", "chunk")}

    def launches(self, shape: EngineShape) -> int:
        """Kernels and copies of one chunk, counted while they run one by one."""
        self.prepare(shape)
        return self._running[shape].launches()

    def memory_bytes(self) -> int:
        """Weights in the engine's layout, step tables and buffers; the model's own weights are not counted."""
        weights = sum(plan.weight_bytes() for plan in self._plans.values())
        return weights + sum(running.static.bytes() for running in self._running.values())

    def _guided(self, running: _Running, guide: VelocityGuide, num_steps: int) -> None:
        static = running.static
        step = static.plan.step_size
        sign = 1.0 if step > 0 else -1.0
        for index in range(num_steps):
            running.replay(f"step {index}")
            u = guide(static.x_t[None], sign * static.v_t[None], index / num_steps)
            static.x_t.add_(sign * u[0], alpha=step)

    def _plan(self, num_steps: int) -> Any:
        if num_steps in self._refused:
            raise EngineError(self._refused[num_steps])
        if num_steps not in self._plans:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    plan = self._plan_type(self._model, num_steps, self._tuned, self._dtype, self._expand)
            except EngineError as error:
                self._refused[num_steps] = str(error)
                raise
            self._plans, self._running = {num_steps: plan}, {}
            self.precision = plan.precision
        return self._plans[num_steps]


class _Running:
    """The stages of one shape, as graphs where there is a GPU."""

    def __init__(self, static: Any, num_steps: int, capture: bool) -> None:
        self.static = static
        self._steps = num_steps
        self._capture = capture
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def replay(self, stage: str) -> None:
        """Run a stage."""
        if not self._capture:
            self._stage(stage)()
            return
        if stage not in self._graphs:
            self._graphs[stage] = self._captured(self._stage(stage))
        self._graphs[stage].replay()

    def launches(self) -> int:
        """GPU operations of one chunk."""
        from torch.profiler import ProfilerActivity, profile

        self.replay("chunk")
        with profile(activities=[ProfilerActivity.CUDA]) as record, torch.inference_mode(False), torch.no_grad():
            self._stage("chunk")()
            torch.cuda.synchronize()
        return sum(1 for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)

    def _stage(self, stage: str) -> Callable[[], None]:
        static = self.static
        if stage.startswith("step "):
            return partial(static.step, int(stage.removeprefix("step ")))
        return {"vision": static.vision, "prefix": static.prefix, "denoise": self._denoise, "chunk": self._chunk}[stage]

    def _denoise(self, first: int = 0) -> None:
        for index in range(first, self._steps):
            self.static.step(index)
            self._take_step()

    def _take_step(self) -> None:
        self.static.x_t.add_(self.static.v_t, alpha=self.static.plan.step_size)

    def _chunk(self) -> None:
        self.static.vision()
        self.static.prefix_and_first_step()
        self._take_step()
        self._denoise(first=1)

    def _captured(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what a call launches. The call runs first, so that kernels are compiled and buffers exist."""
        before = self.static.x_t.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.static.x_t.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.graph(graph):
            call()
        return graph


def _plan_type(model: nn.Module) -> Callable[..., Any]:
    from omega_qvla_core.models.gr00t_n15 import Gr00tN15
    from omega_qvla_core.models.pi05 import Pi05
    from omega_qvla_core.runtime.cuda_gr00t import CudaGr00t
    from omega_qvla_core.runtime.cuda_pi05 import CudaPi05

    if isinstance(model, Pi05):
        return CudaPi05
    if isinstance(model, Gr00tN15):
        return CudaGr00t
    raise EngineError(f"there are no kernels for a {type(model).__name__}")

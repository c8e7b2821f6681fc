"""How long a model takes, stage by stage, with random weights of any size: no checkpoint is needed.

Stages: ``vision`` (images and prompt to the prefix's embeddings), ``prefix`` (language tower, and adapter where there
is one), ``denoise_step`` (one evaluation of the action head), ``chunk`` (everything, all steps).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.bench_memory import process_peak_bytes
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_config import Pi05Config

STAGES = ("vision", "prefix", "denoise_step", "chunk")
CAMERAS = 3
"""Cameras of every run: Pi 0.5 has three slots."""


@dataclass(frozen=True)
class BenchOptions:
    """One run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Type of the weights.
        batch: Observations at a time.
        num_steps: Denoise steps.
        repeats: Timed repetitions, after two that are not timed.
        present_cameras: Cameras that are there, of three.
        prompt_tokens: Tokens of the prompt that are no padding.
        padded_tokens: Length of the padded prompt.
        drop_masked: Leave out absent cameras and padding.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    num_steps: int = 10
    repeats: int = 10
    present_cameras: int = 2
    prompt_tokens: int = 20
    padded_tokens: int = 200
    drop_masked: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "num_steps", "repeats", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.present_cameras <= CAMERAS:
            raise ConfigError(f"present_cameras is {self.present_cameras}; it must be 1 to {CAMERAS}")
        if self.padded_tokens < self.prompt_tokens:
            raise ConfigError(f"padded_tokens {self.padded_tokens} is below prompt_tokens {self.prompt_tokens}")


@dataclass(frozen=True)
class StageTime:
    """Wall time of one stage, ms."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Attributes:
        family: Of the model.
        parameters: Of the model.
        weight_bytes: Of the model.
        prefix_tokens: Tokens that the language tower read, per row.
        stages: Stage -> time.
        peak_bytes: Largest memory: allocated on the GPU during the run, or of the whole process on a CPU.
    """

    family: str
    parameters: int
    weight_bytes: int
    prefix_tokens: int
    stages: dict[str, StageTime]
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Saving:
    """Time with masked input dropped, as a share of the time without, in one run.

    Attributes:
        kept: Result with absent cameras and padding computed.
        dropped: Result with them left out.
        ratios: Stage -> p50 of ``dropped`` over p50 of ``kept``.
        expected: Stage -> the ratio of multiplications.
        largest_difference: Of the actions of both, which must agree (Pi 0.5 only; padding counts in GR00T).
    """

    kept: BenchResult
    dropped: BenchResult
    ratios: dict[str, float]
    expected: dict[str, float]
    largest_difference: float

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class _Inputs:
    arguments: tuple[Any, ...]
    noise: Tensor


@torch.inference_mode()
def bench(
    model: nn.Module, options: BenchOptions, progress: Callable[[int, int], None] | None = None
) -> tuple[BenchResult, Tensor]:
    """Time every stage.

    Args:
        model: ``Pi05`` or ``Gr00tN15``.
        options: See the class.
        progress: Called with finished and total repetitions.

    Returns:
        The result, and the actions float32 ``[B, H, A]`` of the last repetition.
    """
    inputs = _inputs(model, options)
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    actions, prefix = inputs.noise, None
    for index in range(options.repeats + 2):
        prefix, vision_s = _timed(cuda, partial(model.embed_prefix, *inputs.arguments, drop_masked=options.drop_masked))
        cache, prefix_s = _timed(cuda, partial(model.encode_prefix, prefix, last_hidden=False))
        _, step_s = _timed(cuda, partial(_first_step, model, cache, inputs, options))
        actions, chunk_s = _timed(cuda, partial(_chunk, model, inputs, options))
        # Two repetitions warm caches, kernels and the tables of the denoise steps.
        if index >= 2:
            for stage, elapsed_s in zip(STAGES, (vision_s, prefix_s, step_s, chunk_s)):
                times[stage].append(elapsed_s * 1e3)
        if progress is not None:
            progress(index + 1, options.repeats + 2)
    result = BenchResult(
        family="gr00t_n15" if isinstance(model, Gr00tN15) else "pi05",
        parameters=sum(value.numel() for value in model.parameters()),
        weight_bytes=sum(value.numel() * value.element_size() for value in model.parameters()),
        prefix_tokens=int(prefix.pad_mask.shape[1]),
        stages={stage: _percentiles(values) for stage, values in times.items()},
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else process_peak_bytes(),
    )
    return result, actions


def measure_saving(
    model: nn.Module, options: BenchOptions, progress: Callable[[int, int], None] | None = None
) -> Saving:
    """Time the same observation with and without absent cameras and padding, on one model."""
    kept, full_actions = bench(model, replace(options, drop_masked=False), progress)
    dropped, actions = bench(model, replace(options, drop_masked=True), progress)
    ratios = {stage: dropped.stages[stage].p50_ms / kept.stages[stage].p50_ms for stage in STAGES}
    expected = _expected_ratios(model, options, kept.prefix_tokens, dropped.prefix_tokens)
    return Saving(kept, dropped, ratios, expected, float((actions - full_actions).abs().max()))


def prefix_products(config: Pi05Config | Gr00tConfig, tokens: int) -> int:
    """Multiplications of the language tower (and adapter) over ``tokens`` tokens of one row."""
    if isinstance(config, Pi05Config):
        width, heads, kv, head = config.lm_width, config.num_heads, config.num_kv_heads, config.head_dim
        keys = 2 * width * kv * head
        layer = keys + 2 * width * heads * head + 3 * width * config.lm_mlp_dim
        attention = 2 * tokens * heads * head
        # The last layer stops at its keys and values.
        return tokens * ((config.lm_depth - 1) * (layer + attention) + keys)
    one = config.language
    layer = 2 * one.width * (one.num_heads + one.num_kv_heads) * one.head_dim + 3 * one.width * one.mlp_dim
    total = one.depth * (layer + 2 * tokens * one.num_heads * one.head_dim)
    if config.adapter is not None:
        total += config.adapter.depth * (12 * config.adapter.width**2 + 2 * tokens * config.adapter.width)
    # Keys and values of every cross-attention are made with the prefix.
    crosses = (config.dit.depth + 1) // 2 if config.interleave else config.dit.depth
    return tokens * (total + crosses * 2 * config.feature_width * config.dit.width)


def _expected_ratios(model: nn.Module, options: BenchOptions, kept: int, dropped: int) -> dict[str, float]:
    prefix = prefix_products(model.config, dropped) / prefix_products(model.config, kept)
    # GR00T's prompts hold no tokens of absent cameras, and its vision tower never sees them.
    vision = options.present_cameras / CAMERAS if isinstance(model, Pi05) else 1.0
    return {"vision": vision, "prefix": prefix}


def _chunk(model: nn.Module, inputs: _Inputs, options: BenchOptions) -> Tensor:
    prefix = model.embed_prefix(*inputs.arguments, drop_masked=options.drop_masked)
    return model.sample_actions(prefix, inputs.noise, options.num_steps)


def _first_step(model: nn.Module, cache: Any, inputs: _Inputs, options: BenchOptions) -> Any:
    return next(iter(model.denoise(cache, inputs.noise, options.num_steps)))


def _timed(cuda: bool, call: Callable[[], Any]) -> tuple[Any, float]:
    if cuda:
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - started_s


def _inputs(model: nn.Module, options: BenchOptions) -> _Inputs:
    config, batch = model.config, options.batch
    generator = torch.Generator().manual_seed(0)
    size = config.vision.image_size
    images = [torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for _ in range(CAMERAS)]
    present = [torch.full((batch,), index < options.present_cameras) for index in range(CAMERAS)]
    noise = torch.randn(batch, config.action_horizon, config.action_dim, generator=generator)
    tokens, mask = _gr00t_prompt(config, options) if isinstance(config, Gr00tConfig) else _pi05_prompt(config, options)
    tokens, mask = tokens.expand(batch, -1), mask.expand(batch, -1)
    state = torch.zeros(batch, config.state_dim) if isinstance(config, Gr00tConfig) else None
    tensors = (images, present, tokens, mask, state)
    return _Inputs(tuple(_moved(value, options.device) for value in tensors), noise.to(options.device))


def _pi05_prompt(config: Pi05Config, options: BenchOptions) -> tuple[Tensor, Tensor]:
    """Padding on the right, up to the prompt length of the size."""
    length = min(options.padded_tokens, config.max_token_len)
    mask = torch.arange(length)[None] < min(options.prompt_tokens, length)
    return torch.where(mask, 5, 0), mask


def _gr00t_prompt(config: Gr00tConfig, options: BenchOptions) -> tuple[Tensor, Tensor]:
    """Image tokens of the present cameras, then the text; padding on the left."""
    images = options.present_cameras * config.vision.num_patches
    ids = torch.cat(
        (
            torch.zeros(options.padded_tokens - options.prompt_tokens, dtype=torch.int64),
            torch.full((images,), config.language.image_token_id),
            torch.full((options.prompt_tokens,), 5),
        )
    )
    mask = torch.arange(len(ids)) >= options.padded_tokens - options.prompt_tokens
    return ids[None], mask[None]


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [one.to(device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _percentiles(values: Sequence[float]) -> StageTime:
    p50, p95 = np.percentile(values, (50, 95))
    return StageTime(float(p50), float(p95))

"""Time Pi 0.5 at full size on an NVIDIA GPU: the engine at several precisions, and PyTorch on the same model.

    python scripts/measure_gpu.py engine bf16 w4a4 w8a8
    python scripts/measure_gpu.py pytorch

Weights are random; quantized ones are rounded to nearest by recipe ``fast_w4a4`` (or with 8 bits in its place), without
calibration. Times are CUDA events around the replay of a graph: 20 warm-ups, 100 samples, p50/p95 in ms; ``wall`` is
``engine.run`` with the copies in and the result on the host. Actions are compared with the model's own in the same run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.kernels import code_range, pack_codes
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.linear import replace_linears
from omega_qvla_core.quant.recipe import Recipe, SideRecipe
from omega_qvla_core.quant.rotation import hadamard_blocks
from omega_qvla_core.quant.scope import find_sites
from omega_qvla_core.quant.site import QuantizedSite, Reader, SiteSpec
from omega_qvla_core.runtime.cuda_engine import CudaEngine

# Cameras, prompt tokens, chunk, denoise steps.
SHAPES = ((3, 200, 50, 10), (2, 21, 10, 10))
BITS = {"w4a4": (4, 4), "w4a8": (4, 8), "w8a8": (8, 8)}
# Rows of a weight that are worked on at a time.
ROWS = 8192


@torch.no_grad()
def quantize(model: nn.Module, bits: tuple[int, int]) -> None:
    """Replace the linears in scope ``paper`` by codes rounded to nearest, in place."""
    recipe = Recipe.preset("fast_w4a4").replace_sides(weight_bits=bits[0], activation_bits=bits[1])
    for site in find_sites(model):
        side = replace(
            recipe.resolve(site.readers[0], site.side), smoothing=None, solver="rtn", clip="absmax", per_step=False
        )
        linears = [model.get_submodule(name) for name in site.readers]
        readers = tuple(Reader(name, one.out_features) for name, one in zip(site.readers, linears))
        width = linears[0].in_features
        coded = [codes_of(part, side) for one in linears for part in one.weight.split(ROWS)]
        groups = -(-width // side.activation_group) if side.activation == "token_group" else 1
        tensors = {
            "codes": torch.cat([codes for codes, _ in coded]),
            "scales": torch.cat([scales for _, scales in coded]),
            "activation": torch.ones(1, groups, device=linears[0].weight.device),
        }
        replace_linears(model, QuantizedSite(SiteSpec(site.name, site.side, readers, width, 0, side), tensors))


def codes_of(weight: Tensor, side: SideRecipe) -> tuple[Tensor, Tensor]:
    """Packed codes and float16 scales of some rows, in the rotated basis."""
    parts = weight.float().split(side.block, dim=1)
    rotated = torch.cat([part @ hadamard_blocks(part.shape[1]).to(part) for part in parts], dim=1)
    low, high = code_range(side.weight_bits)
    grouped = rotated.view(rotated.shape[0], -1, side.group or rotated.shape[1])
    scales = (grouped.abs().amax(dim=2) / high).clamp_min(2.0**-14).half()
    codes = (grouped / scales.float()[..., None]).round_().clamp_(low, high).view_as(rotated)
    return pack_codes(codes.to(torch.int8), side.weight_bits), scales


def inputs_of(model: nn.Module, cameras: int, text: int) -> ModelInputs:
    generator, size = torch.Generator().manual_seed(0), model.config.vision.image_size
    images = [(torch.rand(1, 3, size, size, generator=generator) * 2 - 1).cuda() for _ in range(3)]
    masks = [torch.tensor([index < cameras], device="cuda") for index in range(3)]
    tokens = torch.randint(2, 1000, (1, 200), generator=generator).cuda()
    return ModelInputs(images, masks, tokens, (torch.arange(200)[None] < text).cuda(), None, None)


def noise_of(chunk: int) -> Tensor:
    return torch.randn(1, chunk, 32, generator=torch.Generator().manual_seed(1)).cuda()


def event_times_ms(call: Callable[[], object], samples: int = 100, warm_ups: int = 20) -> str:
    for _ in range(warm_ups):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return _percentiles(times)


def wall_times_ms(call: Callable[[], Tensor], samples: int = 50) -> str:
    times = []
    for _ in range(samples + 5):
        started = time.perf_counter()
        call().cpu()
        times.append((time.perf_counter() - started) * 1e3)
    return _percentiles(times[5:])


def _percentiles(times: list[float]) -> str:
    return "{:.2f}/{:.2f}".format(*np.percentile(times, (50, 95)))


@torch.inference_mode()
def engine(precisions: list[str]) -> None:
    for precision in precisions:
        model = random_model(preset("pi05", "full"), "cuda", torch.bfloat16)
        if precision in BITS:
            quantize(model, BITS[precision])
        for cameras, text, chunk, steps in SHAPES:
            model.config = replace(model.config, action_horizon=chunk)
            running, inputs, noise = CudaEngine(model, (9, 0)), inputs_of(model, cameras, text), noise_of(chunk)
            found = running.run(inputs, noise, steps)
            expected = model.sample_actions(inputs.embed(model), noise, steps)
            shape = running.bucket(inputs, steps)
            times = {name: event_times_ms(stage) for name, stage in running.stages(shape).items()}
            times["wall"] = wall_times_ms(lambda run=running.run, one=(inputs, noise, steps): run(*one))
            error = float((found - expected).norm() / expected.norm())
            print(f"{precision} {cameras}/{text}/{chunk}/{steps} {times} difference {error:.1e}", flush=True)
            print(f"  engine {running.memory_bytes() / 1e9:.2f} GB, {running.launches(shape)} launches", flush=True)


@torch.no_grad()
def pytorch() -> None:
    """Eager; eager in one CUDA graph; every block compiled with max-autotune, in one CUDA graph."""
    model = random_model(preset("pi05", "full"), "cuda", torch.bfloat16)
    inputs, noise = inputs_of(model, 3, 200), noise_of(50)

    def chunk() -> Tensor:
        arguments = (inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask, None)
        prefix = model.embed_prefix(*arguments, drop_masked=False)
        return model.sample_actions(replace(prefix, complete=True), noise, 10)

    def graphed() -> str:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            chunk()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chunk()
        return event_times_ms(graph.replay)

    print("eager", event_times_ms(chunk, 20, 5), flush=True)
    print("eager in a CUDA graph", graphed(), flush=True)
    started = time.perf_counter()
    for layers in (model.language_model.layers, model.expert.layers, model.vision.vision_model.encoder.layers):
        for layer in layers:
            layer.compile(mode="max-autotune-no-cudagraphs", dynamic=False)
    chunk()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    print("torch.compile(max-autotune) of every block, in a CUDA graph", graphed(), flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    if sys.argv[1] == "engine":
        engine(sys.argv[2:])
    else:
        pytorch()

"""Time Pi 0.5 or GR00T N1.5 at full size on an NVIDIA GPU: the engine at several precisions, and PyTorch.

    python scripts/measure_gpu.py engine bf16 w4a4 w8a8
    python scripts/measure_gpu.py pytorch
    python scripts/measure_gpu.py --model gr00t_n15 engine bf16 w4a4 w8a8
    python scripts/measure_gpu.py --model gr00t_n15 pytorch
    TRITON_INTERPRET=1 python scripts/measure_gpu.py --model gr00t_n15 --check engine bf16 w4a4

Weights are random; quantized ones are rounded to nearest by recipe ``fast_w4a4`` (or with 8 bits in its place), without
calibration. Times are CUDA events around the replay of a graph: 20 warm-ups, 100 samples, p50/p95 in ms; ``wall`` is
``engine.run`` with the copies in and the result on the host. Actions are compared with the model's own in the same run.
With ``--check`` a tiny model runs on the CPU, the kernels in Triton's interpreter: nothing is timed, only compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_shapes import BenchShape, model_inputs, shaped, start_noise
from omega_qvla_core.kernels import code_range, pack_codes
from omega_qvla_core.models.gr00t_config import Gr00tConfig, StackConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15, Gr00tPrefix
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.linear import replace_linears
from omega_qvla_core.quant.recipe import Recipe, SideRecipe
from omega_qvla_core.quant.rotation import hadamard_blocks
from omega_qvla_core.quant.scope import find_sites
from omega_qvla_core.quant.site import QuantizedSite, Reader, SiteSpec
from omega_qvla_core.runtime.cuda_engine import CudaEngine

SHAPES = {
    "pi05": (BenchShape(3, 200, 50, 10), BenchShape(2, 21, 10, 10)),
    "gr00t_n15": (BenchShape(2, 20, 16, 4), BenchShape(2, 20, 16, 8)),
}
CHECKED = BenchShape(3, 6, 3, 2)
# What random weights of a tiny model are multiplied with, so that it adds something to the noise.
CHECKED_GAIN = 8.0
BITS = {"w4a4": (4, 4), "w4a8": (4, 8), "w8a8": (8, 8)}
# Rows of a weight that are worked on at a time.
ROWS = 8192


@dataclass(frozen=True)
class Target:
    """What is run, and where.

    Attributes:
        model: ``pi05`` or ``gr00t_n15``.
        check: Whether a tiny model is compared on the CPU instead.
    """

    model: str
    check: bool

    @property
    def device(self) -> str:
        return "cpu" if self.check else "cuda"

    @property
    def shapes(self) -> tuple[BenchShape, ...]:
        return (CHECKED,) if self.check else SHAPES[self.model]

    def network(self) -> nn.Module:
        """A random model."""
        if not self.check:
            return random_model(preset(self.model, "full"), self.device, torch.bfloat16)
        model = random_model(_checked_sizes(self.model), self.device, torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(CHECKED_GAIN)
        return model

    def engine(self, model: nn.Module) -> CudaEngine:
        """Built past ``cuda_engine.build``, which refuses what no GPU has run."""
        return CudaEngine(model, (8, 9), torch.float32, capture=False) if self.check else CudaEngine(model, (9, 0))

    def inputs(self, config: Pi05Config | Gr00tConfig, shape: BenchShape) -> ModelInputs:
        """Inputs of a shape; those of Pi 0.5 have three slots for cameras and a prompt padded as it is in openpi."""
        if self.model == "gr00t_n15":
            return model_inputs(config, shape, self.device)
        generator, size, room = torch.Generator().manual_seed(0), config.vision.image_size, config.max_token_len
        images = [(torch.rand(1, 3, size, size, generator=generator) * 2 - 1).to(self.device) for _ in range(3)]
        masks = [torch.tensor([index < shape.cameras], device=self.device) for index in range(3)]
        tokens = torch.randint(2, min(1000, config.vocab_size), (1, room), generator=generator).to(self.device)
        there = (torch.arange(room)[None] < shape.text_tokens).to(self.device)
        return ModelInputs(images, masks, tokens, there, None, None)


def _checked_sizes(model: str) -> Pi05Config | Gr00tConfig:
    """Tiny sizes whose inputs have the 64 columns that a scale spans."""
    sizes = preset(model, "tiny")
    vision = replace(sizes.vision, depth=1, image_size=28)
    if isinstance(sizes, Pi05Config):
        return replace(sizes, vision=vision, lm_depth=2, expert_width=64, expert_mlp_dim=128, max_token_len=6)
    language, dit = replace(sizes.language, depth=1), StackConfig(2, 2, 32)
    return replace(
        sizes, vision=vision, language=language, adapter=StackConfig(1, 4, 16), dit=dit, future_tokens=1, action_dim=7
    )


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
        if linears[0].bias is not None:
            tensors["bias"] = torch.cat([one.bias.float() for one in linears])
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
def engine(target: Target, precisions: list[str]) -> None:
    for precision in precisions:
        model = target.network()
        if precision in BITS:
            quantize(model, BITS[precision])
        for shape in target.shapes:
            model.config = shaped(model.config, shape)
            _set_horizon(model, shape.horizon)
            running, inputs = target.engine(model), target.inputs(model.config, shape)
            noise, steps = start_noise(model.config).to(target.device), shape.num_steps
            found = running.run(inputs, noise, steps)
            expected = model.sample_actions(inputs.embed(model), noise, steps)
            print(f"{target.model} {precision} {shape} {_difference(found, expected, noise)}", flush=True)
            if target.check:
                continue
            bucket = running.bucket(inputs, steps)
            times = {name: event_times_ms(stage) for name, stage in running.stages(bucket).items()}
            times["wall"] = wall_times_ms(lambda run=running.run, one=(inputs, noise, steps): run(*one))
            print(f"  {times}", flush=True)
            print(f"  engine {running.memory_bytes() / 1e9:.2f} GB, {running.launches(bucket)} launches", flush=True)


def _difference(found: Tensor, expected: Tensor, noise: Tensor) -> str:
    """Of the actions, and as a share of what the model adds to the noise."""
    error = (found - expected).norm()
    whole, added = float(error / expected.norm()), float(error / (expected - noise).norm())
    return f"difference {whole:.1e} of the actions, {added:.1e} of what was added to the noise"


def _set_horizon(model: nn.Module, horizon: int) -> None:
    """GR00T's action head keeps the length of its chunk."""
    if isinstance(model, Gr00tN15):
        model.action_head.horizon = horizon


@torch.no_grad()
def pytorch(target: Target) -> None:
    """Eager; eager in one CUDA graph; every block compiled with max-autotune, in one CUDA graph.

    With ``--check`` only that the captured sequence computes what the model does.
    """
    for shape in target.shapes if target.model == "gr00t_n15" else target.shapes[:1]:
        model = target.network()
        model.config = shaped(model.config, shape)
        _set_horizon(model, shape.horizon)
        inputs, noise = target.inputs(model.config, shape), start_noise(model.config).to(target.device)
        prefix_of = _gr00t_prefix(model, inputs) if isinstance(model, Gr00tN15) else _pi05_prefix(model, inputs)

        def chunk(model=model, prefix_of=prefix_of, noise=noise, steps=shape.num_steps) -> Tensor:
            return model.sample_actions(prefix_of(), noise, steps)

        print(f"{target.model} bf16 {shape}", flush=True)
        if target.check:
            expected = model.sample_actions(inputs.embed(model), noise, shape.num_steps)
            print(f"  {_difference(chunk(), expected, noise)}", flush=True)
            continue
        _time_pytorch(model, chunk)


def _pi05_prefix(model: nn.Module, inputs: ModelInputs) -> Callable[[], object]:
    """Without dropping masked input, which waits for the GPU: a graph must not."""
    arguments = (inputs.images, inputs.image_masks, inputs.tokens, inputs.token_mask, None)
    return lambda: replace(model.embed_prefix(*arguments, drop_masked=False), complete=True)


def _gr00t_prefix(model: Gr00tN15, inputs: ModelInputs) -> Callable[[], Gr00tPrefix]:
    """The model's own, but for its count of image tokens, which waits for the GPU."""
    eagle = model.backbone.eagle_model
    places = (inputs.tokens[0] == eagle.image_token_id).nonzero()[:, 0]

    def prefix() -> Gr00tPrefix:
        text = eagle.language_model.model.embed_tokens(inputs.tokens)
        seen = eagle.mlp1(eagle.vision_model.encode(torch.cat(inputs.images))).flatten(0, 1)
        embeddings = text.index_copy(1, places, seen[None].to(text.dtype))
        return Gr00tPrefix(embeddings, inputs.token_mask, inputs.state[:, None], (0,), complete=True)

    return prefix


def _time_pytorch(model: nn.Module, chunk: Callable[[], Tensor]) -> None:
    print("  eager", event_times_ms(chunk, 20, 5), flush=True)
    print("  eager in a CUDA graph", _graphed(chunk), flush=True)
    started = time.perf_counter()
    for layer in _blocks(model):
        layer.compile(mode="max-autotune-no-cudagraphs", dynamic=False)
    chunk()
    print(f"  compiled in {time.perf_counter() - started:.0f} s", flush=True)
    print("  torch.compile(max-autotune) of every block, in a CUDA graph", _graphed(chunk), flush=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    shared = [*model.language_model.layers, *model.vision.vision_model.encoder.layers]
    if isinstance(model, Gr00tN15):
        return [*shared, *model.action_head.vl_self_attention.transformer_blocks, *model.expert.transformer_blocks]
    return [*shared, *model.expert.layers]


def _graphed(chunk: Callable[[], Tensor]) -> str:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chunk()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chunk()
    return event_times_ms(graph.replay)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engine", "pytorch"))
    parser.add_argument("precisions", nargs="*", metavar="PRECISION", help="bf16, " + ", ".join(BITS))
    parser.add_argument("--model", choices=tuple(SHAPES), default="pi05")
    parser.add_argument("--check", action="store_true", help="compare a tiny model on the CPU; nothing is timed")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.precisions) - {"bf16", *BITS})
    if unknown or (options.what == "engine") != bool(options.precisions):
        parser.error(f"engine takes precisions of bf16, {', '.join(BITS)}; pytorch takes none")
    target = Target(options.model, options.check)
    if not target.check:
        print(torch.cuda.get_device_name(), torch.__version__)
    if options.what == "engine":
        engine(target, options.precisions)
    else:
        pytorch(target)


if __name__ == "__main__":
    main()

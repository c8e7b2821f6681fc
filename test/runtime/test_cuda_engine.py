"""The GPU engine against the model: the same kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from omega_qvla_core.errors import EngineError
from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_quantize import quantize_randomly
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.runtime import cuda_sites
from omega_qvla_core.runtime.cuda_engine import CudaEngine, build

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks that fit everywhere, which are also the smallest: the interpreter computes padding too.
CAPABILITY = (8, 9)
HOPPER = (9, 0)
STEPS = 2


def tiny(horizon=10, dtype=torch.float32):
    vision = SiglipConfig(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=14, image_size=28)
    sizes = preset("pi05", "tiny")
    sizes = replace(sizes, lm_depth=2, action_horizon=horizon, vision=vision, expert_width=64, expert_mlp_dim=128)
    return random_model(sizes, DEVICE, dtype)


def inputs_of(model, cameras=2, text=5):
    generator = torch.Generator().manual_seed(0)
    size = model.config.vision.image_size
    images = [(torch.rand(1, 3, size, size, generator=generator) * 2 - 1).to(DEVICE) for _ in range(3)]
    masks = [torch.tensor([index < cameras], device=DEVICE) for index in range(3)]
    tokens = torch.randint(2, 100, (1, 12), generator=generator).to(DEVICE)
    return ModelInputs(images, masks, tokens, (torch.arange(12)[None] < text).to(DEVICE), None, None)


def noise_of(model):
    config = model.config
    shape = (1, config.action_horizon, config.action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def engine_of(model):
    return CudaEngine(model, CAPABILITY, torch.float32, capture=DEVICE == "cuda")


@torch.inference_mode()
def compared(model, engine, inputs, guide=None, steps=STEPS):
    noise = noise_of(model)
    found = engine.run(inputs, noise, steps, guide)
    expected = model.sample_actions(inputs.embed(model), noise, steps, guide)
    return float((found - expected).norm() / (expected - noise).norm())


LIMIT = 1e-5 if DEVICE == "cpu" else 1e-4


@pytest.fixture(autouse=True)
def whole_mantissas(monkeypatch):
    """On a GPU, multiply all of float32, not the 10 bits of a mantissa that tensor cores take by default."""
    import triton

    monkeypatch.setattr(triton.knobs.language, "fp32_default", "ieee")


def test_triton_engine_equals_the_model_with_padding_and_an_absent_camera():
    model = tiny()
    engine = engine_of(model)
    inputs = inputs_of(model)
    shape = engine.bucket(inputs, STEPS)
    assert (shape.cameras, shape.text_tokens) == (2, 8)
    assert compared(model, engine, inputs) < LIMIT
    assert engine.precision == "bf16" and engine.memory_bytes() > 0


def test_triton_engine_equals_the_quantized_model_and_its_guided_steps():
    """int8 products of 4-bit codes, one sum per row in the prefix, group scales in the expert."""
    model = quantize_randomly(tiny(), "w4a4")
    engine = engine_of(model)

    def guide(x, u, tau):
        return u + (1.0 - tau) * 0.1 * x

    assert compared(model, engine, inputs_of(model), guide) < max(LIMIT, 1e-3)
    assert engine.precision == "w4a4"


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 does not fit the blocks of an H100; bfloat16 is tested there")
def test_triton_engine_with_the_blocks_of_an_h100_equals_the_quantized_model():
    """Descriptors, programs that take tiles in turn, groups two at a time; early launches are a GPU's own."""
    model = quantize_randomly(tiny(horizon=50), "w4a4")
    engine = CudaEngine(model, HOPPER, torch.float32, capture=False)
    engine._tuned = replace(engine._tuned, early=False)
    assert compared(model, engine, inputs_of(model, cameras=1), steps=1) < 1e-3


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != HOPPER, reason="there is no GPU of compute capability 9.0"
)
@pytest.mark.parametrize("precision", ["bf16", "w4a4"])
def test_triton_kernels_that_start_early_give_the_same_bits(precision):
    """What is read before the kernel before has ended is what that kernel does not write."""
    model = tiny(horizon=50, dtype=torch.bfloat16)
    model = model if precision == "bf16" else quantize_randomly(model, precision)
    inputs, noise, found = inputs_of(model), noise_of(model), []
    with torch.inference_mode():
        for early in (False, True):
            engine = CudaEngine(model, HOPPER)
            engine._tuned = replace(engine._tuned, early=early)
            found += [engine.run(inputs, noise, STEPS).clone() for _ in range(20)]
    assert found[0].isfinite().all()
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_triton_engine_takes_the_keypoint_encoder_prepared_before_its_first_observation():
    """The encoder's own code runs inside; it reads the state too, whose room must be there before any observation."""
    torch.manual_seed(3)
    model = Pi05(replace(tiny().config, vision=KeypointConfig(32, 2, 7, (8, 8, 8), 2, 8, 4))).to(DEVICE).eval()
    inputs = inputs_of(model)
    inputs = replace(
        inputs, images=inputs.images[:2], image_masks=inputs.image_masks[:2], state=noise_of(model)[:, 0, :7]
    )
    engine = engine_of(model)
    engine.prepare(engine.bucket(inputs, STEPS))
    assert compared(model, engine, inputs) < LIMIT
    moved = replace(inputs, state=inputs.state + 1.0)
    assert compared(model, engine, moved) < LIMIT


def test_triton_engine_keeps_no_weight_in_two_layouts(monkeypatch):
    """What was read of the model, stacked or unpacked, goes once the kernels' layout is made of it."""
    read, kept = cuda_sites.read_site, []

    def watched(*arguments):
        site = read(*arguments)
        kept.append(weakref.ref(site))
        return site

    monkeypatch.setattr(cuda_sites, "read_site", watched)
    model = quantize_randomly(tiny(), "w4a4")
    engine = engine_of(model)
    engine.bucket(inputs_of(model), STEPS)
    gc.collect()
    assert len(kept) > 10 and all(one() is None for one in kept)
    assert engine.precision == "w4a4"


def test_triton_engine_refuses_what_it_does_not_compute():
    model = tiny(horizon=65)
    engine = engine_of(model)
    for _ in range(2):
        with pytest.raises(EngineError, match="the chunk has 65 tokens"):
            engine.bucket(inputs_of(model), STEPS)
    with pytest.raises(EngineError, match="no kernels for a Linear"):
        CudaEngine(torch.nn.Linear(2, 2), CAPABILITY)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU: torch finds none")
def test_triton_engine_does_not_lower_the_precision_of_float32_weights():
    with pytest.raises(EngineError, match="float32"):
        build(tiny())

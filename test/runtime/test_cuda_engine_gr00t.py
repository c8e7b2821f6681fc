"""The GPU engine against GR00T N1.5: the same kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the package triton is not installed")

from omega_qvla_core.errors import EngineError
from omega_qvla_core.evaluate.bench_presets import preset, random_model
from omega_qvla_core.evaluate.bench_quantize import quantize_randomly
from omega_qvla_core.kernels.triton_kernels import attention, large_gemm, rows, small_gemm
from omega_qvla_core.models.gr00t_config import Qwen3Config, StackConfig
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.quant.linear import quantized_sites, replace_linears
from omega_qvla_core.quant.recipe import Recipe, WholeRecipe
from omega_qvla_core.quant.scope import ACTION_HEAD
from omega_qvla_core.quant.site import QuantizedSite
from omega_qvla_core.quant.whole import apply_whole
from omega_qvla_core.runtime import Policy, cuda_engine
from omega_qvla_core.runtime.cuda_engine import CudaEngine
from omega_qvla_core.runtime.engine import build_engine

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks that fit everywhere, which are also the smallest: the interpreter computes padding too.
CAPABILITY = (8, 9)
IMAGE_TOKEN = 39
LIMIT = 1e-5 if DEVICE == "cpu" else 1e-4


@pytest.fixture(autouse=True)
def whole_mantissas(monkeypatch):
    """On a GPU, multiply all of float32, not the 10 bits of a mantissa that tensor cores take by default."""
    import triton

    monkeypatch.setattr(triton.knobs.language, "fp32_default", "ieee")


def tiny(seed=5, **changes):
    """Widths that 64 does not divide in the transformer, 5 tokens of it, 4 of an image."""
    sizes = {
        "language": Qwen3Config(64, 1, 64, 2, 1, 32, 40, IMAGE_TOKEN),
        "vision": SiglipConfig(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=14, image_size=28),
        "adapter": StackConfig(1, 2, 32),
        "dit": StackConfig(2, 2, 48),
        "future_tokens": 1,
        "action_horizon": 3,
        "action_dim": 7,
        "state_dim": 9,
        "num_embodiments": 3,
    }
    model = random_model(replace(preset("gr00t_n15", "tiny"), **{**sizes, **changes}), DEVICE, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def inputs_of(model, words=5, padding=3, embodiment=0, cameras=1):
    """Two cameras, of which some are there; padding on the left, images between the words."""
    config, generator = model.config, torch.Generator().manual_seed(words)
    size = config.vision.image_size
    images = [(torch.rand(1, 3, size, size, generator=generator) * 2 - 1).to(DEVICE) for _ in range(2)]
    masks = [torch.tensor([index < cameras], device=DEVICE) for index in range(2)]
    text = torch.randint(1, IMAGE_TOKEN, (words,), generator=generator)
    seen = torch.full((cameras * config.vision.num_patches,), IMAGE_TOKEN)
    tokens = torch.cat((torch.zeros(padding, dtype=torch.int64), text[:2], seen, text[2:]))[None].to(DEVICE)
    there = (torch.arange(tokens.shape[1]) >= padding)[None].to(DEVICE)
    state = torch.randn(1, config.state_dim, generator=generator).to(DEVICE)
    return ModelInputs(images, masks, tokens, there, state, None, (embodiment,))


def quantized(model, name, steps):
    """Random codes, smoothing and clips of every step, as a recipe would leave them."""
    quantize_randomly(model, "w4a4" if name == "fast_w4a4" else "w4a4_grouped")
    recipe, generator = Recipe.preset(name), torch.Generator(DEVICE).manual_seed(2)
    for site in list(quantized_sites(model)):
        own, tensors, steps_of_site = recipe.resolve(site.spec.readers[0].name, site.spec.side), site.tensors(), 0
        if site.spec.side == ACTION_HEAD and not site.spec.name.endswith(".kv"):
            steps_of_site = steps
        shape = max(steps_of_site, 1), tensors["activation"].shape[1]
        tensors["activation"] = torch.rand(shape, generator=generator, device=DEVICE) * 0.3 + 0.7
        tensors["smooth"] = torch.rand(site.spec.in_features, generator=generator, device=DEVICE) + 0.5
        spec = replace(site.spec, recipe=own, steps=steps_of_site)
        replace_linears(model, QuantizedSite(spec, tensors))
    return model


def engine_of(model):
    return CudaEngine(model, CAPABILITY, torch.float32, capture=DEVICE == "cuda")


@torch.inference_mode()
def compared(model, engine, inputs, steps, guide=None):
    shape = (1, model.config.action_horizon, model.config.action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = engine.run(inputs, noise, steps, guide)
    expected = model.sample_actions(inputs.embed(model), noise, steps, guide)
    return float((found - expected).norm() / (expected - noise).norm())


def test_triton_engine_equals_gr00t_for_prompts_of_one_bucket_and_other_embodiments():
    """Room behind the prompt must be seen by nothing: the model has none."""
    model = tiny()
    engine = engine_of(model)
    longer, shorter = inputs_of(model), inputs_of(model, words=3, padding=0, embodiment=2)
    assert engine.bucket(longer, 2) == engine.bucket(shorter, 2)
    assert (engine.bucket(longer, 2).cameras, engine.bucket(longer, 2).text_tokens) == (1, 8)
    assert compared(model, engine, longer, 2) < LIMIT
    assert compared(model, engine, shorter, 2) < LIMIT
    assert engine.precision == "bf16" and engine.memory_bytes() > 0


def test_triton_engine_equals_gr00t_without_adapter_positions_and_interleaving():
    language = Qwen3Config(48, 2, 64, 2, 1, 32, 40, IMAGE_TOKEN)
    model = tiny(language=language, project_features=True, adapter=None, interleave=False, max_positions=0)
    assert compared(model, engine_of(model), inputs_of(model, cameras=2), 1) < LIMIT


@pytest.mark.parametrize(("recipe", "steps"), [("executable_w4a4", 2), ("fast_w4a4", 1)])
def test_triton_engine_equals_quantized_gr00t_and_its_guided_steps(recipe, steps):
    """Per-step clips and smoothing; codes of one input for queries, keys and values, and for gate and up."""
    model = quantized(tiny(), recipe, steps)
    engine = engine_of(model)

    def guide(x, u, tau):
        return u + (1.0 - tau) * 0.1 * x

    # Where a code lies on an edge depends on how the machine rounds; a wrong engine agrees on no prompt.
    guided = guide if steps > 1 else None
    assert any(
        compared(model, engine, inputs_of(model, words), steps, guided) < max(LIMIT, 1e-3) for words in (5, 4, 6)
    )
    assert engine.precision == "w4a4"


def test_triton_engine_refuses_observations_that_gr00t_engines_do_not_take():
    model = tiny()
    engine, inputs = engine_of(model), inputs_of(model)
    two = torch.cat((inputs.tokens, inputs.tokens))
    for changed, message in (
        ({"tokens": two, "token_mask": two > 0}, "one observation at a time, not 2"),
        ({"image_masks": [inputs.image_masks[0]] * 2}, "2 cameras are there, and 4 image tokens"),
        ({"state": inputs.state[:, :4]}, r"state has shape \[1, 4\]; it takes one of \[1, 9\]"),
        ({"embodiment": (3,)}, "no embodiment 3; there are 3"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.bucket(replace(inputs, **changed), 1)


def test_triton_engine_refuses_gr00t_models_that_the_kernels_do_not_compute():
    model = quantized(tiny(), "executable_w4a4", 2)
    with pytest.raises(EngineError, match="calibrated for 2 denoise steps, not 3"):
        engine_of(model).bucket(inputs_of(model), 3)
    long = tiny(action_horizon=63)
    with pytest.raises(EngineError, match="chunk, state and future tokens are 65 tokens; the kernels take 64"):
        engine_of(long).bucket(inputs_of(long), 1)
    for activation, bits in (("static_channel", 4), ("none", 16)):
        simulated = tiny()
        recipe = replace(
            Recipe.preset("executable_w4a4").language, activation=activation, activation_bits=bits, clip="absmax"
        )
        for site in list(quantized_sites(quantize_randomly(simulated, "w4a4_grouped"))):
            replace_linears(simulated, QuantizedSite(replace(site.spec, recipe=recipe), site.tensors()))
        with pytest.raises(EngineError, match=f"language layer 0 qkv: activation '{activation}' is simulated"):
            engine_of(simulated).bucket(inputs_of(simulated), 1)
    whole = tiny()
    apply_whole(whole, WholeRecipe(), 1, None)
    with pytest.raises(EngineError, match="weights of the embodiments are quantized; use scope paper"):
        engine_of(whole).bucket(inputs_of(whole), 1)


def test_triton_engine_that_has_driven_no_arm_is_for_those_who_ask_for_it(monkeypatch, caplog):
    """A node gets none for the keypoint encoder, and its log says why; a bench gets one. GR00T N1.5 has one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gr00t, tabletop, cuda = tiny().bfloat16(), Policy.load("tabletop_w4a4").model, torch.device("cuda")
    assert build_engine(gr00t, cuda).name == "cuda"
    with pytest.raises(EngineError, match="no arm has been driven"):
        cuda_engine.build(tabletop)
    assert build_engine(tabletop, cuda) is None
    assert "no arm has been driven" in caplog.text and "the model runs step by step" in caplog.text
    assert build_engine(tabletop, cuda, untried=True).name == "cuda"
    with pytest.raises(EngineError, match="float32"):
        cuda_engine.build(gr00t.float())


class _NoKernel:
    """Launched in a kernel's place."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


class _Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def test_triton_stages_of_gr00t_do_nothing_that_waits_for_the_host(monkeypatch):
    """What would break the capture of a graph: values read back, sizes that depend on them, copies from the host."""
    for module, name in (
        *((rows, name) for name in ("norm_rows", "merge_rows", "merge_heads", "activate_rows")),
        *((attention, name) for name in ("attention", "rotate_heads")),
        (large_gemm, "large_gemm"),
        (small_gemm, "small_gemm"),
    ):
        monkeypatch.setattr(module, name, _NoKernel())
    model = tiny()
    engine = CudaEngine(model, CAPABILITY, torch.float32, capture=False)
    stages = engine.stages(engine.bucket(inputs_of(model), 2))
    with torch.no_grad(), _Operators() as operators:
        stages["chunk"]()
    assert "index_copy_" in operators.names
    assert not operators.names & {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "lift_fresh",
        "is_nonzero",
    }

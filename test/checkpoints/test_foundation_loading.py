"""Public checkpoint folders: what loads, and with which memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foundation_folders import (
    EMBEDDING,
    EXPERT_HEAD,
    GOLDEN,
    TIED,
    change_json,
    change_tensors,
    write_shards,
)
from safetensors.torch import load_file

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.layouts import detect
from omega_qvla_core.checkpoints.loading import describe, load_foundation, read_headers
from omega_qvla_core.checkpoints.pi05_sizes import pi05_config
from omega_qvla_core.checkpoints.strict_loading import load_model, matching_names, tensor_dtype
from omega_qvla_core.checkpoints.tensor_names import model_names
from omega_qvla_core.checkpoints.weight_files import StoredTensor, WeightFiles, find_weights
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig

LM_HEAD = "backbone.eagle_model.language_model.lm_head.weight"
TABLE = "backbone.eagle_model.language_model.model.embed_tokens.weight"


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_foundation(read_headers(folder), dtype)[1]


@pytest.mark.parametrize(("layout", "family"), [("openpi", "pi05"), ("lerobot", "pi05"), ("nvidia", "gr00t_n15")])
def test_layouts_are_recognised(pristine, layout, family):
    found = detect(pristine[layout])
    assert (found.layout, found.family) == (layout, family)


def test_openpi_folder_without_config_is_recognised_by_its_tensors(copy_of):
    folder = copy_of("openpi")
    (folder / "config.json").unlink()
    assert detect(folder).layout == "openpi"


@pytest.mark.parametrize("layout", ["openpi", "lerobot", "nvidia"])
def test_every_weight_arrives(pristine, layout):
    source = "gr00t" if layout == "nvidia" else "pi05"
    tensors = load_file(GOLDEN / source / "tiny" / "model.safetensors")
    model = loaded(pristine[layout])
    names = model_names(tensors, "gr00t_n15" if source == "gr00t" else "pi05", layout)
    state = model.state_dict()
    assert state.keys() == names.keys()
    assert all(torch.equal(state[name], tensors[file_name]) for name, file_name in names.items())
    assert not model.training and not any(value.requires_grad for value in model.parameters())


def test_of_lerobots_two_token_tables_the_embedding_counts(copy_of):
    folder = copy_of("lerobot")
    assert loaded(folder).state_dict()[TIED].abs().sum() > 0
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(f"model.{EMBEDDING}"))
    assert loaded(folder).state_dict()[TIED].abs().sum() == 0


def test_unused_tables_may_be_there_or_not(copy_of):
    folder = copy_of("openpi")
    before = loaded(folder).state_dict()
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(EXPERT_HEAD))
    after = loaded(folder).state_dict()
    assert EXPERT_HEAD not in before and before.keys() == after.keys()


def test_gr00ts_output_head_is_never_tied_unless_it_is_all_there_is(copy_of):
    folder = copy_of("nvidia")
    tensors = load_file(GOLDEN / "gr00t" / "tiny" / "model.safetensors")
    assert torch.equal(loaded(folder).state_dict()[TABLE], tensors[TABLE])
    head = tensors[LM_HEAD]
    for change in (lambda t: t.pop(LM_HEAD), lambda t: t.update({LM_HEAD: t.pop(TABLE)})):
        for path in folder.glob("model*"):
            path.unlink()
        copy = dict(tensors)
        change(copy)
        write_shards(folder, copy, 1)
        assert torch.equal(loaded(folder).state_dict()[TABLE], tensors[TABLE])
    assert not torch.equal(head, tensors[TABLE])


def test_lerobots_prefix_of_gr00t_is_accepted(copy_of):
    folder = copy_of("nvidia")
    tensors = load_file(GOLDEN / "gr00t" / "tiny" / "model.safetensors")
    for path in folder.glob("model*"):
        path.unlink()
    write_shards(folder, {f"_groot_model.{name}": value for name, value in tensors.items()}, 1)
    assert torch.equal(loaded(folder).state_dict()[TABLE], tensors[TABLE])


def test_bfloat16_keeps_in_float32_what_openpi_keeps():
    float32 = (
        "action_in_proj.weight",
        "time_mlp_out.bias",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.bias",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.position_embedding.weight",
        "paligemma_with_expert.paligemma.model.language_model.layers.3.input_layernorm.weight",
        "paligemma_with_expert.gemma_expert.model.layers.3.post_attention_layernorm.dense.weight",
        "paligemma_with_expert.paligemma.model.language_model.norm.weight",
        "paligemma_with_expert.gemma_expert.model.norm.dense.bias",
    )
    bfloat16 = (
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.weight",
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight",
        "paligemma_with_expert.gemma_expert.model.layers.3.mlp.up_proj.weight",
        TIED,
    )
    assert all(tensor_dtype(name, "pi05", torch.bfloat16) == torch.float32 for name in float32)
    assert all(tensor_dtype(name, "pi05", torch.bfloat16) == torch.bfloat16 for name in bfloat16)


@pytest.mark.parametrize("layout", ["openpi", "nvidia"])
def test_bfloat16_is_loaded_tensor_by_tensor(pristine, layout):
    family = detect(pristine[layout]).family
    for name, value in loaded(pristine[layout], torch.bfloat16).state_dict().items():
        assert value.dtype == tensor_dtype(name, family, torch.bfloat16), name


def test_a_loaded_model_does_not_depend_on_its_files(copy_of):
    folder = copy_of("openpi")
    model = loaded(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


MEMORY_SCRIPT = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from omega_qvla_core.checkpoints import strict_loading
from omega_qvla_core.checkpoints.weight_files import find_weights
strict_loading.model_names = lambda names, family, source: {name: name for name in names}
build = lambda: nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))
weights = find_weights(Path(sys.argv[1]))
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
before = peak()
model = strict_loading.load_model(build, weights, 'gr00t_n15', torch.float32)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_below_the_model_plus_one_shard(tmp_path):
    tensors = {f"{index}.weight": torch.zeros(2048, 2048) + index for index in range(6)}
    write_shards(tmp_path, tensors, 3)
    model_bytes = sum(value.numel() * 4 for value in tensors.values())
    shard_bytes = model_bytes // 3
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # 8 MB for the allocator and lazily loaded parts of torch.
    assert int(result.stdout) < model_bytes + shard_bytes + 8e6


def test_setups_are_required_and_must_fit_the_framework(copy_of):
    folder = copy_of("openpi")
    (folder / "omega_qvla.json").unlink()
    with pytest.raises(ConfigError, match=r"does not say which robot.*openpi_libero"):
        describe(read_headers(folder))
    with pytest.raises(ConfigError, match=r"robot.framework is 'gr00t'"):
        describe(read_headers(folder, robot="gr00t_libero"))
    with pytest.raises(ConfigError, match=r"robot 'spot' is not known; known: openpi_libero"):
        read_headers(folder, robot="spot")


def test_lerobots_pipeline_says_which_actions_are_relative(copy_of):
    folder = copy_of("lerobot")
    change_json(folder / "omega_qvla.json", lambda data: data["robot"].pop("action_modes"))
    assert describe(read_headers(folder)).policy.action_modes == ("delta", "delta", "absolute")
    change_json(folder / "omega_qvla.json", lambda data: data["robot"].update(action_modes=["absolute"] * 3))
    with pytest.raises(ConfigError, match=r"relative_actions_processor makes 'shoulder' relative.*'absolute'"):
        describe(read_headers(folder))


def test_gr00ts_relative_actions_get_telling_names(copy_of):
    folder = copy_of("nvidia")

    def change(data):
        del data["robot"]["action_names"]
        data["robot"]["action_modes"] = ["relative", "velocity", "absolute"]

    change_json(folder / "omega_qvla.json", change)
    assert describe(read_headers(folder)).policy.action_names == ("arm_0_relative", "arm_1_velocity", "gripper")


def headers_of(keys: dict[str, object]) -> WeightFiles:
    """Headers as if a file held these tensors."""
    tensors = {}
    for name, shape in keys.items():
        sizes = shape[0] if isinstance(shape[0], list) else shape
        tensors[name] = StoredTensor(Path("model.safetensors"), "BF16", tuple(sizes))
    return WeightFiles(Path("model.safetensors"), (), tensors)


def test_the_released_gr00t_headers_fit_the_full_model_exactly():
    keys = json.loads((GOLDEN / "gr00t" / "full_keys.json").read_text())
    with torch.device("meta"):
        model = build_model(Gr00tConfig.from_official_json(keys["released_config"]))
    names = matching_names(model.state_dict(), headers_of(keys["keys"]), "gr00t_n15")
    unused = keys["keys"].keys() - names.values()
    assert all("lm_head" in name or ".vision_model.head." in name for name in unused)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_full_size_pi05_headers_fit_in_both_styles(prefix):
    """412 M vision, 1982 M language, 527 M token table, 428 M expert: the counts of the official files."""
    config = pi05_config("gemma_2b", "gemma_300m", 32, 50, 200, 224, "config.json")
    with torch.device("meta"):
        model = build_model(config)
    own = {name: list(value.shape) for name, value in model.state_dict().items()}
    stored = {f"{prefix}{name}": shape for name, shape in own.items()}
    stored[f"{prefix}{EXPERT_HEAD}"] = [257152, 1024]
    if prefix:
        stored[f"{prefix}{EMBEDDING}"] = [257152, 2048]
    names = matching_names(model.state_dict(), headers_of(stored), "pi05")
    assert len(stored) == (813 if prefix else 812)
    assert sum(math.prod(shape) for shape in own.values()) == 3353433872
    assert names[TIED] == (f"{prefix}{EMBEDDING}" if prefix else TIED)


def test_an_error_names_what_is_missing_and_what_is_too_much():
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: weight; it has the unexpected 1 tensors: wieght"):
        matching_names({"weight": torch.zeros(2)}, headers_of({"wieght": [2]}), "gr00t_n15")


def test_load_model_needs_every_value(tmp_path):
    write_shards(tmp_path, {"weight": torch.zeros(2, 2)}, 1)
    with pytest.raises(CheckpointError, match="lacks 1 tensors: bias"):
        load_model(lambda: torch.nn.Linear(2, 2), find_weights(tmp_path), "gr00t_n15", torch.float32)

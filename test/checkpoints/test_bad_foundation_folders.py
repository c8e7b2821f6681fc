"""Every way in which a public checkpoint folder can be wrong: one line that names file and field, nothing loaded."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from foundation_folders import BUILDERS, change_json, change_tensors, write_shards
from safetensors.torch import load_file, save_file

from omega_qvla_core.checkpoints.layouts import detect
from omega_qvla_core.checkpoints.loading import load_foundation, read_headers
from omega_qvla_core.errors import OmegaQVLAError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STATS = "assets/lab/robot/norm_stats.json"
METADATA = "experiment_cfg/metadata.json"


def load(folder):
    return load_foundation(read_headers(folder), torch.float32)


def refused(folder, *parts: str) -> None:
    with pytest.raises(OmegaQVLAError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def edit(name: str, change):
    return lambda folder: change_json(folder / name, change)


def truncate(name: str):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def pickled(name: str):
    return lambda folder: (folder / name).write_bytes(pickle.dumps({"weights": 1}))


def other_shard(folder) -> None:
    """The second shard of a checkpoint that was cut elsewhere."""
    first, second = (load_file(folder / name) for name in SHARDS)
    moved = next(iter(first))
    save_file({**second, moved: first[moved]}, folder / SHARDS[1])


def shard_in_another_type(folder) -> None:
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / SHARDS[1]).items()}
    save_file(tensors, folder / SHARDS[1])


def renamed(old: str, new: str):
    return lambda folder: change_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({new: tensors.pop(old)})
    )


def reshaped(name: str):
    return lambda folder: change_tensors(
        folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()})
    )


def both_prefixes(folder) -> None:
    change_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"action_in_proj.bias": tensors["model.action_in_proj.bias"].clone()}),
    )


def pi0(folder) -> None:
    name = "paligemma_with_expert.gemma_expert.model.norm.weight"
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(32)}))


def foreign_weights(folder) -> None:
    write_shards(folder, {"backbone.eagle_model.mlp1.0.weight": torch.zeros(2, 2)}, 1)


def without(name: str):
    return lambda folder: (folder / name).unlink()


BAD = {
    "truncated": ("openpi", truncate("model.safetensors"), ["model.safetensors", "not a whole safetensors file"]),
    "truncated shard": ("nvidia", truncate(SHARDS[1]), [SHARDS[1], "not a whole safetensors file"]),
    "pickle": ("openpi", pickled("model.safetensors"), ["model.safetensors", "holds a pickle"]),
    "pickled statistics": (
        "lerobot",
        pickled("policy_preprocessor_step_2_normalizer_processor.safetensors"),
        ["policy_preprocessor_step_2_normalizer_processor.safetensors", "holds a pickle"],
    ),
    "missing shard": ("nvidia", without(SHARDS[0]), [SHARDS[0], "is missing", "index.json lists it"]),
    "no index": ("nvidia", without("model.safetensors.index.json"), ["model.safetensors.index.json is missing"]),
    "mixed shards": ("nvidia", other_shard, [SHARDS[1], "two checkpoints are mixed"]),
    "shard of another conversion": ("nvidia", shard_in_another_type, ["metadata.total_size", "mixed"]),
    "shard elsewhere": (
        "nvidia",
        edit("model.safetensors.index.json", lambda data: data["weight_map"].update(x="../x.safetensors")),
        ["weight_map", "'../x.safetensors'"],
    ),
    "counts": (
        "nvidia",
        edit(
            "model.safetensors.index.json",
            lambda data: data["weight_map"].update(x="model-00001-of-00003.safetensors"),
        ),
        ["weight_map mixes"],
    ),
    "file and index": (
        "nvidia",
        lambda folder: write_shards(folder, {"a": torch.zeros(1)}, 1),
        ["holds both model.safetensors and model.safetensors.index.json"],
    ),
    "half-matching keys": (
        "openpi",
        renamed("action_in_proj.bias", "action_in.bias"),
        ["lacks 1 tensors: action_in_proj.bias", "unexpected 1 tensors: action_in.bias"],
    ),
    "shape": ("openpi", reshaped("action_out_proj.weight"), ["action_out_proj.weight", "[8, 31]", "[8, 32]"]),
    "same tensor twice": ("lerobot", both_prefixes, ["action_in_proj.bias", "are the same tensor"]),
    "Pi 0": ("openpi", pi0, ["holds Pi 0", "norm.weight"]),
    "wrong family": ("openpi", foreign_weights, ["weights are of GR00T N1.5", "config.json describes Pi 0.5"]),
    "other LeRobot policy": ("lerobot", edit("config.json", lambda d: d.update(type="smolvla")), ["type is 'smolvla'"]),
    "other model type": (
        "nvidia",
        edit("config.json", lambda data: data.update(model_type="gr00t_n1")),
        ["config.json: model_type is 'gr00t_n1'"],
    ),
    "config is no JSON": ("nvidia", truncate("config.json"), ["config.json", "not valid JSON"]),
    "size missing": (
        "nvidia",
        edit("config.json", lambda data: data["action_head_cfg"].pop("hidden_size")),
        ["action_head_cfg", "'hidden_size'"],
    ),
    "select_layer": (
        "nvidia",
        edit("config.json", lambda data: data["backbone_cfg"].update(select_layer=2)),
        ["has the unexpected", "layers.2"],
    ),
    "unknown variant": (
        "lerobot",
        lambda folder: (
            change_json(folder / "omega_qvla.json", lambda data: data.pop("model")),
            change_json(folder / "config.json", lambda data: data.update(paligemma_variant="gemma_9b")),
        ),
        ["config.json: paligemma_variant is 'gemma_9b'"],
    ),
    "memory": ("lerobot", lambda folder: (
        change_json(folder / "omega_qvla.json", lambda data: data.pop("model")),
        change_json(folder / "config.json", lambda data: data.update(use_visual_memory=True)),
    ), ["use_visual_memory is true"]),
    "stats width": (
        "openpi",
        edit(STATS, lambda data: data["norm_stats"]["state"].update(q01=[0.0, 0.0])),
        ["norm_stats.json: norm_stats.state.q01 has shape (2,)", "3 entries"],
    ),
    "stats missing": ("openpi", without(STATS), ["norm_stats.json is missing"]),
    "stats of two robots": (
        "openpi",
        lambda folder: (folder / "assets" / "b").mkdir() or (folder / "assets/b/norm_stats.json").write_text("{}"),
        ["several robots (b, lab/robot)", "robot.asset_id"],
    ),
    "stats without quantiles": (
        "openpi",
        edit(STATS, lambda data: data["norm_stats"]["actions"].update(q99=None)),
        ["norm_stats.actions lacks 'q99'"],
    ),
    "degenerate stats": (
        "openpi",
        edit(STATS, lambda data: data["norm_stats"]["actions"]["q99"].__setitem__(1, -1.0)),
        ["norm_stats.actions.q99[1] (elbow) is degenerate"],
    ),
    "stats not finite": (
        "openpi",
        edit(STATS, lambda data: data["norm_stats"]["state"]["q99"].__setitem__(0, float("nan"))),
        ["norm_stats.state.q99[0] is nan"],
    ),
    "LeRobot stats width": (
        "lerobot",
        edit("omega_qvla.json", lambda data: data["robot"].update(
            state_names=["a", "b"], action_modes=["absolute"] * 3)),
        ["relative_actions_processor makes 'shoulder' relative"],
    ),
    "no preprocessor": ("lerobot", without("policy_preprocessor.json"), ["policy_preprocessor.json is missing"]),
    "no normalizer": (
        "lerobot",
        edit("policy_postprocessor.json", lambda data: data["steps"].clear()),
        ["policy_postprocessor.json: steps lists no unnormalizer_processor"],
    ),
    "other epsilon": (
        "lerobot",
        edit("policy_preprocessor.json", lambda data: data["steps"][2]["config"].update(eps=1e-3)),
        ["policy_preprocessor.json: eps is 0.001"],
    ),
    "GR00T stats width": (
        "nvidia",
        edit(METADATA, lambda data: data["tiny"]["statistics"]["action"]["arm"].update(max=[1.0])),
        ["metadata.json: statistics.action.arm.max has shape (1,)", "2 entries"],
    ),
    "GR00T key": (
        "nvidia",
        edit(METADATA, lambda data: data["tiny"]["modalities"]["state"].pop("arm")),
        ["modalities.state has no object 'arm' (there are gripper)"],
    ),
    "embodiment": (
        "nvidia",
        edit("omega_qvla.json", lambda data: data["robot"].update(embodiment_tag="gr1")),
        ["no embodiment 'gr1' (there are tiny)"],
    ),
    "embodiment index": (
        "nvidia",
        edit("omega_qvla.json", lambda data: data["robot"].update(embodiment_id=5)),
        ["robot.embodiment_id 5", "5 projectors"],
    ),
    "unknown embodiment": (
        "nvidia",
        edit("omega_qvla.json", lambda data: data["robot"].pop("embodiment_id")),
        ["'tiny' is not one of new_embodiment"],
    ),
    "camera": (
        "nvidia",
        edit("omega_qvla.json", lambda data: data["robot"]["cameras"][0].update(source="side")),
        ["modalities.video has no object 'side' (there are front, wrist)"],
    ),
    "slot": (
        "openpi",
        edit("omega_qvla.json", lambda data: data["robot"]["cameras"][0].update(source="front_rgb")),
        ["source 'front_rgb' is not one of the checkpoint's base_0_rgb"],
    ),
    "action meaning": (
        "nvidia",
        edit(METADATA, lambda data: data["tiny"]["modalities"]["action"]["gripper"].update(absolute=False)),
        ["'gripper' is not absolute, but robot.action_modes says so"],
    ),
    "no tokenizer": ("openpi", without("tokenizer.json"), ["holds no tokenizer", "google/paligemma-3b-pt-224"]),
    "no tokenizer of GR00T": ("nvidia", without("tokenizer.json"), ["holds no tokenizer", "eagle2_hg_model"]),
    "tokenizer of another model": (
        "openpi",
        lambda folder: BUILDERS["nvidia"](folder.parent / "x")
        and (folder / "tokenizer.json").write_bytes((folder.parent / "x" / "tokenizer.json").read_bytes()),
        ["vocab_size is 300", "use the tokenizer of this checkpoint"],
    ),
    "damaged tokenizer": ("nvidia", truncate("tokenizer.json"), ["tokenizer.json is not a tokenizer"]),
    "sidecar key": (
        "openpi",
        edit("omega_qvla.json", lambda data: data["robot"].update(control_herz=20)),
        ["omega_qvla.json: robot has the unknown key 'control_herz'; did you mean 'control_hz'?"],
    ),
    "delta of another entry": (
        "openpi",
        edit("omega_qvla.json", lambda data: data["robot"].update(state_names=["elbow", "shoulder", "gripper"])),
        ["'shoulder' is delta", "same index"],
    ),
    "size of another type": (
        "openpi",
        edit("config.json", lambda data: data.update(lm_mlp_dim="many")),
        ["config.json: a size is no positive number"],
    ),
    "absurd depth": (
        "openpi",
        edit("config.json", lambda data: data.update(lm_depth=10**12)),
        ["config.json: the language has 1000000000000 layers"],
    ),
    "absurd width": (
        "openpi",
        edit("config.json", lambda data: data.update(action_dim=10**30)),
        ["config.json: no model has these sizes"],
    ),
    "tokenizer without its unknown-token": (
        "openpi",
        edit("tokenizer.json", lambda data: data["model"]["vocab"].pop("<unk>")),
        ["tokenizer.json is not a tokenizer"],
    ),
    "horizon": (
        "openpi",
        edit("omega_qvla.json", lambda data: data["robot"].update(horizon=50)),
        ["action_horizon is 10, robot.horizon 50"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_refused_with_one_line(case, copy_of):
    layout, change, parts = BAD[case]
    folder = copy_of(layout)
    change(folder)
    refused(folder, *parts)


def test_a_missing_config_of_gr00t_is_asked_for(copy_of):
    folder = copy_of("nvidia")
    (folder / "config.json").unlink()
    with pytest.raises(OmegaQVLAError, match=r"weights of GR00T N1.5 but no config.json"):
        detect(folder)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(OmegaQVLAError, match=r"model.safetensors is missing"):
        detect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"family": "pi05"}))
    with pytest.raises(OmegaQVLAError, match=r"model.safetensors is missing"):
        detect(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(OmegaQVLAError, match=r"pytorch_model.bin beside it is a pickle"):
        detect(tmp_path)

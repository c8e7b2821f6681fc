"""Public checkpoint folders in small: the recorded tiny models with everything that their layouts have around them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
JOINTS = ("shoulder", "elbow", "gripper")
WORDS = ("lift", "the", "red", "cube", "Task:", "State:", "Action:", "cube,", "stay", "where", "you", "are")
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
TIED = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def word_tokenizer(special: dict[str, int], size: int) -> Tokenizer:
    """Words split at blanks; numbers share one id; ``special`` at the ids that the tiny models want."""
    free = (index for index in range(3, size) if index not in special.values())
    vocabulary = {"<unk>": 2, **{word: next(free) for word in WORDS}}
    vocabulary.update(special)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def pi05_tokenizer(folder: Path) -> None:
    word_tokenizer({"<pad>": 0, "<bos>": 1}, 300).save(str(folder / "tokenizer.json"))


def gr00t_tokenizer(folder: Path) -> None:
    special = {
        "<|im_start|>": 290,
        "<|im_end|>": 291,
        "<|endoftext|>": 292,
        "<IMG_CONTEXT>": 300,
        "<img>": 301,
        "</img>": 302,
    }
    word_tokenizer(special, 320).save(str(folder / "tokenizer.json"))


def range_stats(dims: int) -> dict[str, list[float]]:
    ones = np.ones(dims)
    return {
        "mean": (0.1 * ones).tolist(),
        "std": (0.5 * ones).tolist(),
        "q01": (-1.0 * ones).tolist(),
        "q99": (1.5 * ones).tolist(),
        "min": (-2.0 * ones).tolist(),
        "max": (2.0 * ones).tolist(),
    }


def robot(framework: str, **changes: object) -> dict[str, object]:
    sources = {
        "openpi": ("base_0_rgb", "left_wrist_0_rgb"),
        "lerobot": ("observation.images.front", "observation.images.wrist"),
        "gr00t": ("front", "wrist"),
    }[framework]
    cameras = [{"key": key, "source": source} for key, source in zip(("front", "wrist"), sources)]
    values: dict[str, object] = {
        "framework": framework,
        "cameras": cameras,
        "control_hz": 20.0,
        "state_names": list(JOINTS),
        "action_names": list(JOINTS),
        "action_modes": ["delta", "delta", "absolute"],
    }
    if framework == "gr00t":
        parts = [{"key": "arm"}, {"key": "gripper"}]
        values |= {"state_parts": parts, "action_parts": parts, "embodiment_tag": "tiny", "embodiment_id": 3}
    return values | changes


def sidecar(folder: Path, **values: object) -> None:
    write_json(folder / "omega_qvla.json", {"format_version": 1, "name": "tiny", **values})


def openpi_folder(folder: Path) -> Path:
    """As openpi's converter writes it; sizes are stated because the tiny model is no official variant."""
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "pi05" / "tiny" / "model.safetensors", folder)
    write_json(folder / "config.json", json.loads((GOLDEN / "pi05" / "tiny" / "config.json").read_text()))
    norm = {"state": range_stats(8), "actions": range_stats(8)}
    write_json(folder / "assets" / "lab" / "robot" / "norm_stats.json", {"norm_stats": norm})
    pi05_tokenizer(folder)
    sidecar(folder, robot=robot("openpi"))
    return folder


def tiny_pi05_sizes() -> dict[str, object]:
    from omega_qvla_core.models.pi05_config import Pi05Config

    return Pi05Config.from_reference_json(json.loads((GOLDEN / "pi05" / "tiny" / "config.json").read_text())).to_json()


def lerobot_folder(folder: Path) -> Path:
    """As LeRobot saves a ``PI05Policy``: prefixed names, both token tables, processor pipelines with statistics."""
    folder.mkdir(parents=True)
    tensors = load_file(GOLDEN / "pi05" / "tiny" / "model.safetensors")
    # LeRobot unties the two; the embedding is the one that is read, so the head may hold anything.
    tensors[EMBEDDING] = tensors[TIED].clone()
    tensors[TIED] = torch.zeros_like(tensors[TIED])
    save_file({f"model.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    features = {
        "observation.state": {"type": "STATE", "shape": [3]},
        "observation.images.front": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 56, 56]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 56, 56]},
    }
    config = {
        "type": "pi05",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "chunk_size": 10,
        "max_action_dim": 8,
        "num_inference_steps": 5,
        "tokenizer_max_length": 16,
        "image_resolution": [56, 56],
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
    }
    write_json(folder / "config.json", config)
    _lerobot_pipelines(folder)
    pi05_tokenizer(folder)
    sidecar(folder, robot=robot("lerobot"), model=tiny_pi05_sizes())
    return folder


def _lerobot_pipelines(folder: Path) -> None:
    norm_map = {"STATE": "QUANTILES", "ACTION": "MEAN_STD", "VISUAL": "IDENTITY"}
    stats = {
        f"{feature}.{name}": torch.tensor(values, dtype=torch.float32)
        for feature in ("observation.state", "action")
        for name, values in range_stats(3).items()
    }
    relative = {"enabled": True, "exclude_joints": ["grip"], "action_names": list(JOINTS)}
    pipelines = {
        "policy_preprocessor": [
            ("rename_observations_processor", {"rename_map": {}}),
            ("relative_actions_processor", relative),
            ("normalizer_processor", {"eps": 1e-8, "norm_map": norm_map}),
            ("tokenizer_processor", {"max_length": 16}),
        ],
        "policy_postprocessor": [("unnormalizer_processor", {"eps": 1e-8, "norm_map": norm_map})],
    }
    for pipeline, steps in pipelines.items():
        entries = []
        for index, (name, config) in enumerate(steps):
            entry = {"registry_name": name, "config": config}
            if name.endswith("normalizer_processor"):
                entry["state_file"] = f"{pipeline}_step_{index}_{name}.safetensors"
                save_file(stats, folder / entry["state_file"])
            entries.append(entry)
        write_json(folder / f"{pipeline}.json", {"name": pipeline, "steps": entries})


def nvidia_folder(folder: Path, shards: int = 2) -> Path:
    """As NVIDIA's fine-tuning saves it: shards with an index, metadata of the embodiment."""
    folder.mkdir(parents=True)
    for name in ("config.json", "eagle_config.json"):
        write_json(folder / name, json.loads((GOLDEN / "gr00t" / "tiny" / name).read_text()))
    write_shards(folder, load_file(GOLDEN / "gr00t" / "tiny" / "model.safetensors"), shards)
    modality = {
        "arm": {"absolute": True, "rotation_type": None, "shape": [2], "continuous": True},
        "gripper": {"absolute": True, "rotation_type": None, "shape": [1], "continuous": True},
    }
    video = {name: {"resolution": [128, 96], "channels": 3, "fps": 20.0} for name in ("front", "wrist")}
    stats = {"arm": range_stats(2), "gripper": range_stats(1)}
    metadata = {
        "statistics": {"state": stats, "action": stats},
        "modalities": {"video": video, "state": modality, "action": modality},
        "embodiment_tag": "tiny",
    }
    write_json(folder / "experiment_cfg" / "metadata.json", {"tiny": metadata})
    gr00t_tokenizer(folder)
    sidecar(folder, robot=robot("gr00t"))
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One file, or several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, places = sorted(tensors), {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[index::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(chosen, file))
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


BUILDERS = {"openpi": openpi_folder, "lerobot": lerobot_folder, "nvidia": nvidia_folder}

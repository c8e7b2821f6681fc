"""Parity folders of any size, recorded with our own models: what a stranger's folder looks like."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.parity import gr00t_case, pi05_case

PI05_CONFIG = {
    "kind": "pi05",
    "lm_width": 40,
    "lm_depth": 4,
    "lm_mlp_dim": 72,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 12,
    "expert_width": 24,
    "expert_mlp_dim": 40,
    "vision_width": 24,
    "vision_depth": 1,
    "vision_heads": 3,
    "vision_mlp_dim": 40,
    "vision_layer_norm_eps": 1e-6,
    "patch_size": 7,
    "image_size": 14,
    "vocab_size": 50,
    "action_dim": 5,
    "action_horizon": 13,
    "max_token_len": 9,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "time_min_period": 4e-3,
    "time_max_period": 4.0,
    "note": "keys that describe the recording are allowed",
}

GR00T_CONFIG = {
    "model_type": "gr00t_n1_5",
    "action_head_cfg": {
        "action_dim": 6,
        "action_horizon": 5,
        "add_pos_embed": True,
        "backbone_embedding_dim": 40,
        "diffusion_model_cfg": {
            "attention_head_dim": 8,
            "interleave_self_attention": True,
            "norm_type": "ada_norm",
            "num_attention_heads": 3,
            "num_layers": 3,
            "output_dim": 20,
            "positional_embeddings": None,
        },
        "hidden_size": 20,
        "input_embedding_dim": 24,
        "max_num_embodiments": 3,
        "max_seq_len": 7,
        "max_state_dim": 11,
        "num_target_vision_tokens": 2,
        "use_vlln": True,
        "vl_self_attention_cfg": {"attention_head_dim": 10, "num_attention_heads": 4, "num_layers": 1},
    },
    "backbone_cfg": {"project_to_dim": None, "select_layer": 2},
}

EAGLE_CONFIG = {
    "image_token_index": 49,
    "text_config": {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 5,
        "head_dim": 8,
        "vocab_size": 50,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 7,
        "image_size": 14,
    },
}


@torch.inference_mode()
def record(folder: Path, family: str) -> Path:
    """Write a folder of sizes that no shipped fixture has; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    return _record_pi05(folder) if family == "pi05" else _record_gr00t(folder)


def edit(path: Path, change) -> None:
    """Apply ``change(tensors)`` to a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)


def _record_pi05(folder: Path) -> Path:
    model = Pi05(Pi05Config.from_reference_json(PI05_CONFIG)).eval()
    _randomise(model)
    generator = torch.Generator().manual_seed(6)
    inputs, outputs = {}, {}
    for case, batch in (("one", 1), ("two", 2)):
        lengths = torch.tensor([9, 4])[:batch, None]
        given = {f"image_{j}": torch.rand(batch, 3, 14, 14, generator=generator) * 2 - 1 for j in range(2)}
        given |= {"image_mask_0": torch.ones(batch, dtype=torch.bool), "image_mask_1": torch.arange(batch) == 1}
        given |= {
            "tokens": torch.randint(1, 50, (batch, 9), generator=generator),
            "token_mask": torch.arange(9) < lengths,
            "state": torch.zeros(batch, 5),
            "noise": torch.randn(batch, 13, 5, generator=generator),
        }
        inputs |= {f"{case}.{name}": value for name, value in given.items()}
        produced = pi05_case.produce(model, given, case, [3])
        outputs |= {f"{case}.{name}": value.contiguous().clone() for name, value in produced.tensors.items()}
    (folder / "config.json").write_text(json.dumps(PI05_CONFIG))
    extra = {"paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(50, 24)}
    return _write(folder, model.state_dict() | extra, inputs, outputs)


def _record_gr00t(folder: Path) -> Path:
    model = Gr00tN15(Gr00tConfig.from_official_json(GR00T_CONFIG, EAGLE_CONFIG)).eval()
    _randomise(model)
    generator = torch.Generator().manual_seed(7)
    inputs, outputs = {}, {}
    for case, batch, padding in (("even", 2, 0), ("padded", 2, 3)):
        words = torch.randint(1, 49, (batch, 6), generator=generator)
        tokens = torch.cat((words[:, :2], torch.full((batch, 4), 49), words[:, 2:]), dim=1)
        mask = torch.ones_like(tokens)
        if padding:
            tokens = torch.cat((torch.zeros(batch, padding, dtype=torch.int64), tokens), dim=1)
            mask = torch.cat((torch.tensor([[0], [1]]).expand(batch, padding), mask), dim=1)
        given = {
            "pixel_values": torch.rand(batch, 3, 14, 14, generator=generator) * 2 - 1,
            "input_ids": tokens,
            "attention_mask": mask,
            "state": torch.randn(batch, 1, 11, generator=generator),
            "embodiment_id": torch.tensor([2, 0]),
            "noise": torch.randn(batch, 5, 6, generator=generator),
        }
        inputs |= {f"{case}/{name}": value.contiguous() for name, value in given.items()}
        produced = gr00t_case.produce(model, given, case, [3])
        variant = "flash/" if padding else ""
        outputs |= {f"{case}/{variant}{name}": value.contiguous().clone() for name, value in produced.tensors.items()}
        if padding:
            outputs[f"{case}/sdpa_cpu/steps3/final_actions"] = torch.zeros(batch, 5, 6)
    (folder / "config.json").write_text(json.dumps(GR00T_CONFIG))
    (folder / "eagle_config.json").write_text(json.dumps(EAGLE_CONFIG))
    head = {"backbone.eagle_model.language_model.lm_head.weight": torch.ones(50, 40)}
    return _write(folder, model.state_dict() | head, inputs, outputs)


def _write(folder: Path, weights: dict, inputs: dict, outputs: dict) -> Path:
    for name, tensors in (("model", weights), ("inputs", inputs), ("outputs", outputs)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder

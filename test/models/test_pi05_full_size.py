"""At full size Pi 0.5 has exactly the names and shapes of the official checkpoints, in both styles."""

import json
from pathlib import Path

import pytest
import torch

from omega_qvla_core.models.pi05 import UNUSED_KEYS, Pi05, canonical_state_dict
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig

KEYS = json.loads((Path(__file__).parent.parent / "data/golden/pi05/full_keys.json").read_text(encoding="utf-8"))
LEROBOT_PREFIX = "model."


def full_size_config() -> Pi05Config:
    dims = KEYS["dims"]
    language, expert, vision = dims["lm"], dims["expert"], dims["vision"]
    return Pi05Config(
        lm_width=language["width"],
        lm_depth=language["depth"],
        lm_mlp_dim=language["mlp_dim"],
        num_heads=language["num_heads"],
        num_kv_heads=language["num_kv_heads"],
        head_dim=language["head_dim"],
        expert_width=expert["width"],
        expert_mlp_dim=expert["mlp_dim"],
        vocab_size=257152,
        action_dim=32,
        action_horizon=50,
        max_token_len=200,
        vision=SiglipConfig(
            width=vision["width"],
            depth=vision["depth"],
            num_heads=vision["heads"],
            mlp_dim=vision["mlp_dim"],
            patch_size=vision["patch"],
            image_size=vision["image"],
        ),
    )


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    with torch.device("meta"):
        model = Pi05(full_size_config())
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def test_openpi_names_and_shapes(shapes):
    official = {name: row[0] for name, row in KEYS["keys_openpi"].items()}
    assert canonical_state_dict(official) == shapes
    assert set(UNUSED_KEYS) <= official.keys()


def test_lerobot_names_and_shapes(shapes):
    official = KEYS["keys_lerobot"]
    assert all(name.startswith(LEROBOT_PREFIX) for name in official)
    assert (
        canonical_state_dict({name.removeprefix(LEROBOT_PREFIX): shape for name, shape in official.items()}) == shapes
    )

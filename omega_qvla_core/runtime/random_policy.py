"""A tiny policy with random weights: for tests and for checking the wiring of a robot. It has learned nothing.

Its plans are slow on purpose, so that the arm visibly moves and no guard objects: every joint drifts from where it is
at about ``DRIFT_RAD_S``, with a small random part that depends on images, instruction and state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from omega_qvla_core.checkpoints.description import PolicyDescription
from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.processing.normalization import AxisStats, NormStats
from omega_qvla_core.processing.policy_config import PolicyConfig
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer
from omega_qvla_core.runtime.policy import Policy

ARM_JOINTS = tuple(f"joint_{index}" for index in range(1, 7))
GRIPPER = "gripper"
CAMERAS = ("front", "wrist")
CONTROL_HZ = 20.0
HORIZON = 16
DRIFT_RAD_S = 0.1
"""Mean speed of the arm joints; a twentieth of what small arms do."""
DRIFT_M_S = 0.002
"""Mean opening speed of the gripper."""
RANDOM_PART = 0.1
"""Random part of a step's target, as a share of one period's drift."""

_TEXTS = (
    "touch the red cube",
    "lift the green cube",
    "pick up the blue cube and place it on the plate",
)
_IMAGE_SIZE_PX = 56
_MAX_TOKENS = 16


def random_policy(seed: int = 0, device: str | torch.device = "cpu") -> Policy:
    """A random policy for the tabletop robot: cameras ``front`` and ``wrist``, six joints and a gripper.

    Args:
        seed: Fixes the weights.
        device: Where it computes.

    Returns:
        A policy with a SigLIP encoder (56 px), whose every action is a delta to the measured joint. It can be saved.
    """
    names = (*ARM_JOINTS, GRIPPER)
    tokenizer = WordTokenizer.from_texts(_TEXTS)
    config = Pi05Config(
        lm_width=64,
        lm_depth=2,
        lm_mlp_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        expert_width=64,
        expert_mlp_dim=128,
        vocab_size=len(tokenizer.vocabulary),
        action_dim=len(names),
        action_horizon=HORIZON,
        max_token_len=_MAX_TOKENS,
        vision=SiglipConfig(width=64, depth=1, num_heads=2, mlp_dim=128, patch_size=14, image_size=_IMAGE_SIZE_PX),
    )
    policy = PolicyConfig(
        cameras=tuple(CameraSpec(key, _IMAGE_SIZE_PX, _IMAGE_SIZE_PX) for key in CAMERAS),
        state_names=names,
        action_names=names,
        action_modes=("delta",) * len(names),
        control_hz=CONTROL_HZ,
        first_action_delay_s=1.0 / CONTROL_HZ,
        num_steps=4,
    )
    description = PolicyDescription("random", config, policy, _stats(len(ARM_JOINTS)), tokenizer)
    return Policy(_random_model(config, seed), description, device)


def _stats(arm_joints: int) -> NormStats:
    """Generic state range (half a turn, 4 cm) and narrow deltas around a slow drift that grows along the chunk."""
    state_high = np.array([np.pi / 2] * arm_joints + [0.04])
    state_low = np.array([-np.pi / 2] * arm_joints + [0.0])
    per_period = np.array([DRIFT_RAD_S] * arm_joints + [DRIFT_M_S]) / CONTROL_HZ
    drift = np.arange(1, HORIZON + 1)[:, None] * per_period
    spread = RANDOM_PART * per_period
    return NormStats(
        AxisStats("min_max", state_low, state_high, "random policy: state"),
        AxisStats("min_max", drift - spread, drift + spread, "random policy: actions"),
    )


def _random_model(config: Pi05Config, seed: int) -> Pi05:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Pi05(config)
        # A new expert block is the identity and a new linear shrinks its input; with unit gain instead, plans depend on
        # what is seen and told, as a trained policy's do.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in model.expert.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                nn.init.normal_(norm.dense.bias, std=1.0)
    return model

"""From a trained model to a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from omega_qvla_core.checkpoints.description import PolicyDescription
from omega_qvla_core.checkpoints.folder import save_checkpoint
from omega_qvla_core.envs.tabletop import CAMERAS, CONTROL_HZ, CONTROL_PERIOD_S, JOINT_NAMES
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.processing.policy_config import PolicyConfig
from omega_qvla_core.train.dataset import ARM_JOINTS, Demonstrations

DEFAULT_NUM_STEPS = 4
"""Denoise steps at run time; the prototype found 4 as good as 8 (99 and 97 of 100)."""


def tabletop_description(data: Demonstrations, model: Pi05, name: str, num_steps: int) -> PolicyDescription:
    """Everything about the trained policy but its weights."""
    size = model.config.vision.image_size
    modes = ["delta"] * ARM_JOINTS + ["absolute"] * (len(JOINT_NAMES) - ARM_JOINTS)
    policy = PolicyConfig(
        cameras=tuple(CameraSpec(camera, size, size) for camera in CAMERAS),
        state_names=JOINT_NAMES,
        action_names=JOINT_NAMES,
        action_modes=tuple(modes),
        control_hz=CONTROL_HZ,
        first_action_delay_s=CONTROL_PERIOD_S,
        num_steps=num_steps,
    )
    return PolicyDescription(name, model.config, policy, data.stats, data.tokenizer)


def export_policy(
    data: Demonstrations, model: Pi05, folder: Path, name: str, num_steps: int = DEFAULT_NUM_STEPS
) -> None:
    """Write the checkpoint folder of a trained tabletop policy (weights as bfloat16)."""
    save_checkpoint(tabletop_description(data, model, name, num_steps), model, folder)

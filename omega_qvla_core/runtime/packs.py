"""Packs as policies that run."""

from __future__ import annotations

from pathlib import Path

import torch

from omega_qvla_core.quant.pack import read_pack
from omega_qvla_core.runtime.policy import Policy


def load_pack(folder: str | Path, device: str | torch.device = "cpu") -> Policy:
    """Read a pack folder; the same as ``Policy.load`` but that anything else than a pack is refused.

    Args:
        folder: What ``save_pack`` wrote, or the name of a shipped pack.
        device: Where it computes.

    Raises:
        PackError: The file is missing or damaged, was made for another model or number of denoise steps.
        ConfigError: A configuration file or the recipe has an unknown key or value, or the device does not exist.
    """
    description, model, recipe = read_pack(folder)
    return Policy(model, description, device, quantization=recipe)

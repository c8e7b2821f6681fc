"""The quantizer: calibrate, quantize, pack, report.

::

    quantized, result = quantize_policy(policy, Recipe.preset("executable_w4a4"), observations)
    save_pack(quantized, "my_policy_w4a4")
    policy = load_pack("my_policy_w4a4")

``load_pack`` gives a policy that runs, so that it lives in ``runtime``, which builds on this package and never the
other way round. Its name is handed on here, at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.calibrate import Calibration, calibrate
from omega_qvla_core.quant.linear import QuantizedLinear, set_backend
from omega_qvla_core.quant.pack import read_pack, save_pack
from omega_qvla_core.quant.policy import quantize_policy
from omega_qvla_core.quant.presets import PRESETS, with_activations
from omega_qvla_core.quant.quantize import quantize_linears
from omega_qvla_core.quant.recipe import Override, Recipe, SideRecipe, WholeRecipe
from omega_qvla_core.quant.report import QuantReport, report
from omega_qvla_core.quant.report_files import write_report
from omega_qvla_core.quant.scope import InputSite, find_sites
from omega_qvla_core.quant.streaming import StreamResult, quantize_checkpoint

__all__ = [
    "PRESETS",
    "AutoChoice",
    "Calibration",
    "InputSite",
    "Override",
    "QuantReport",
    "QuantizedLinear",
    "Recipe",
    "SideRecipe",
    "StreamResult",
    "WholeRecipe",
    "calibrate",
    "find_sites",
    "load_pack",
    "quantize_checkpoint",
    "quantize_linears",
    "quantize_policy",
    "read_pack",
    "report",
    "save_pack",
    "set_backend",
    "with_activations",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """``load_pack`` of the runtime (PEP 562)."""
    if name == "load_pack":
        return importlib.import_module("omega_qvla_core.runtime.packs").load_pack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

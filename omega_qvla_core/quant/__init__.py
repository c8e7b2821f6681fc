"""The quantizer: calibrate, quantize, pack, report.

::

    quantized, result = quantize_policy(policy, Recipe.preset("executable_w4a4"), observations)
    save_pack(quantized, "my_policy_w4a4")
    policy = load_pack("my_policy_w4a4")
"""

from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.calibrate import Calibration, calibrate
from omega_qvla_core.quant.linear import QuantizedLinear, set_backend
from omega_qvla_core.quant.pack import load_pack, save_pack
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
    "report",
    "save_pack",
    "set_backend",
    "with_activations",
    "write_report",
]

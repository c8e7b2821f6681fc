"""Backends that multiply quantized activations with quantized weights, behind one interface.

``backend("reference")`` dequantizes and multiplies floats; ``backend("cpu")`` multiplies integer codes.
"""

from __future__ import annotations

import difflib

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.kernels.base import Backend, GroupedWeight
from omega_qvla_core.kernels.codes import code_range, pack_codes, packed_columns, unpack_codes
from omega_qvla_core.kernels.cpu import CpuBackend
from omega_qvla_core.kernels.reference import ReferenceBackend, dequantize

__all__ = [
    "BACKENDS",
    "Backend",
    "GroupedWeight",
    "backend",
    "code_range",
    "dequantize",
    "pack_codes",
    "packed_columns",
    "unpack_codes",
]

BACKENDS: dict[str, Backend] = {one.name: one for one in (ReferenceBackend(), CpuBackend())}


def backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: There is none; the message names the nearest one.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"backend {name!r} does not exist; did you mean {near!r}? Backends: {', '.join(BACKENDS)}")
    return BACKENDS[name]

"""Backends that multiply quantized activations with quantized weights, behind one interface.

``backend("reference")`` dequantizes and multiplies floats; ``backend("cpu")`` multiplies integer codes;
``backend("triton")`` does so on a GPU, and needs the package triton.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.util import find_spec

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

TRITON = "triton"


def backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: There is none (the message names the nearest one), or the package triton is not installed.
    """
    if name == TRITON:
        return _triton_backend()
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"backend {name!r} does not exist; did you mean {near!r}? Backends: {_names()}")
    return BACKENDS[name]


def _triton_backend() -> Backend:
    if find_spec("triton") is None:
        raise ConfigError(
            "backend 'triton' needs the package triton, which is not installed; install omega_qvla_ros[gpu], "
            "or use backend 'cpu'"
        )
    return import_module("omega_qvla_core.kernels.triton_kernels.backend").TritonBackend()


def _names() -> str:
    return ", ".join((*BACKENDS, TRITON))

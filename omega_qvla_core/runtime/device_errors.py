"""Errors of the compute device: not the policy's fault, and not cured by trying again."""

from __future__ import annotations

import gc

import torch

_LOST = ("CUDA error", "CUDA driver error", "device-side assert", "cudaError", "CUBLAS_STATUS", "CUDNN_STATUS")
"""How torch's texts begin when the device is lost; older releases have no class of their own for it."""
_CPU_ALLOCATION = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the machine's."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATION in str(error)


def is_device_error(error: BaseException) -> bool:
    """Whether memory ran out or the device is lost: the policy cannot run on in this process state."""
    if is_out_of_memory(error):
        return True
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def free_device_memory() -> None:
    """Give memory that nothing refers to back to the device. Safe when the device is lost."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        return  # a lost device has no cache any more


def free_memory_bytes(device: str) -> int | None:
    """Free bytes of a CUDA device; None where the device does not say."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except RuntimeError:
        return None


def used_memory_bytes() -> int:
    """Bytes that torch holds on the GPU, 0 without one."""
    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0

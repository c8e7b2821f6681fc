"""What this device reaches at best, measured in the run that the figures are compared with."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from omega_qvla_core.kernels import GroupedWeight, backend

# Square products of this size run near a device's peak; larger ones on a GPU, which has more to fill.
_CPU_SIZE, _CUDA_SIZE = 1024, 8192
# Larger than the caches of a CPU's core complex; and than a GPU's second level.
_CPU_COPY_BYTES, _CUDA_COPY_BYTES = 256 << 20, 2 << 30
_REPEATS = 5


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings.

    Attributes:
        device: Its name.
        threads: Threads that torch computes with (CPU).
        plain: Operations per second of a product in the unquantized type.
        integer: Operations per second of an exact product of 4-bit codes with one sum per row; at least ``plain``.
        bandwidth: Bytes per second that a copy reads and writes.
    """

    device: str
    threads: int
    plain: float
    integer: float
    bandwidth: float


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Time a product, an integer product and a copy."""
    cuda = device.type == "cuda"
    size = _CUDA_SIZE if cuda else _CPU_SIZE
    left = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    plain = 2 * size**3 / _best_s(lambda: torch.mm(left, left, out=out), cuda)
    integer = 2 * size**3 / _best_s(_integer_product(size, device), cuda)
    copied = torch.zeros((_CUDA_COPY_BYTES if cuda else _CPU_COPY_BYTES) // 4, device=device)
    target = torch.zeros_like(copied)
    bandwidth = 2 * 4 * copied.numel() / _best_s(lambda: target.copy_(copied), cuda)
    return Peaks(device_name(device), torch.get_num_threads(), plain, max(plain, integer), bandwidth)


def best_of(one: Peaks, other: Peaks) -> Peaks:
    """The higher of two measurements: other work on the machine lowers them."""
    return replace(
        one,
        plain=max(one.plain, other.plain),
        integer=max(one.integer, other.integer),
        bandwidth=max(one.bandwidth, other.bandwidth),
    )


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU, with the instructions that torch uses on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()}, {capability}"


def _integer_product(size: int, device: torch.device) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (size, size), generator=generator, dtype=torch.int8).to(device)
    if device.type == "cuda":
        right = codes.t().contiguous().t()
        return lambda: torch._int_mm(codes, right)
    weight = backend("cpu").prepare(GroupedWeight(codes, torch.ones(size, 1), size))
    activations, scales = codes.float()[None], torch.ones(1, size, 1)
    return lambda: backend("cpu").linear(activations, scales, weight)


def _best_s(call: Callable[[], object], cuda: bool) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def _cpu_model() -> str:
    """Linux names the CPU in a file; elsewhere the platform's own word has to do."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""What a comparison of engines and precisions is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.bench_presets import SIZES
from omega_qvla_core.evaluate.bench_quantize import RECIPES
from omega_qvla_core.evaluate.bench_shapes import MODELS, BenchShape

WARM_UPS, SAMPLES = 20, 100


@dataclass(frozen=True)
class CompareOptions:
    """One comparison.

    Attributes:
        model: ``tabletop``, ``pi05`` or ``gr00t_n15``.
        size: ``tiny``, ``mid`` or ``full``; the tabletop policy has one size.
        shape: What is run.
        precisions: Rows besides the unquantized ones; of ``bench_quantize.RECIPES``.
        device: ``cpu`` or ``cuda``.
        threads: Threads of torch on a CPU; 0 leaves them as they are.
        warm_ups: Runs of every stage that are not counted.
        samples: Runs that are.
        compiled: Whether to add a row for ``torch.compile``.
        cpu_time: Count this process's processor time instead of wall time, for a machine that does other work (CPU).
            With several threads their times add up.
        memory: Whether to measure the peak memory of each row in a process of its own (CPU).
    """

    model: str
    shape: BenchShape
    size: str = "mid"
    precisions: tuple[str, ...] = ("w8a8", "w4a8", "w4a4")
    device: str = "cpu"
    threads: int = 0
    warm_ups: int = WARM_UPS
    samples: int = SAMPLES
    compiled: bool = False
    cpu_time: bool = False
    memory: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (("model", self.model, MODELS), ("size", self.size, SIZES)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        for precision in self.precisions:
            if precision not in RECIPES:
                raise ConfigError(f"precision {precision!r} does not exist; there are {', '.join(RECIPES)}")
        if self.samples < 1 or self.warm_ups < 0 or self.threads < 0:
            raise ConfigError("samples must be at least 1, warm_ups and threads at least 0")
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise ConfigError(f"device is {self.device!r}; it must be cpu or cuda")
        if self.cpu_time and self.device != "cpu":
            raise ConfigError(f"cpu_time says nothing about device {self.device!r}; leave it out")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device {self.device!r} is not available: torch finds no CUDA GPU; use cpu")

    @property
    def unquantized(self) -> str:
        """The precision that the quantized ones are compared with: bf16 on a GPU, fp32 on a CPU."""
        return "fp32" if self.device == "cpu" else "bf16"

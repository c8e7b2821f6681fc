"""Whether a comparison fits into memory, and what one row of it takes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch

from omega_qvla_core.checkpoints import families
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.bench_options import CompareOptions
from omega_qvla_core.evaluate.bench_rows import DTYPES, build_model, build_runner
from omega_qvla_core.evaluate.bench_shapes import ModelConfig

T = TypeVar("T")

# Of the machine's memory, for all rows together: the rest is for activations, the system and its other programs.
_USABLE = 0.7
# Copies of the weights that one precision holds: the model's, and at most one in the engine's layout.
_COPIES = 2


def check_fits(config: ModelConfig, options: CompareOptions) -> None:
    """Refuse what would fill the memory; all rows are held at the same time.

    Raises:
        ConfigError: With the arithmetic.
    """
    with torch.device("meta"):
        numbers = sum(value.numel() for value in families.build_model(config).parameters())
    each = numbers * DTYPES[options.unquantized].itemsize
    rows = 1 + len(options.precisions)
    needed = each * rows * _COPIES
    available = _memory_bytes(options.device)
    if needed > available * _USABLE:
        raise ConfigError(
            f"{options.model} {options.size} has {numbers / 1e9:.2f} G weights, {each / 1e9:.1f} GB each time; "
            f"{rows} precisions with an engine each may take {needed / 1e9:.0f} GB, and {_USABLE:.0%} of this device's "
            f"memory are {available * _USABLE / 1e9:.0f} GB. Use --size mid, or fewer precisions"
        )


def peak_bytes(options: CompareOptions, precision: str, runtime: str) -> int:
    """Largest resident size of a process that builds one row and runs it three times, with interpreter and torch."""
    return in_own_process(_peak_of_row, options, precision, runtime)


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """What a function of a module gives in a new process.

    Raises:
        ConfigError: The process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "the process that was measured was killed, most likely because memory ran out; take a smaller size, or "
                "end other programs"
            ) from error


def _peak_of_row(options: CompareOptions, precision: str, runtime: str) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build_model(options.model, options.size, options.shape, precision, options.device)
    runner = build_runner(runtime, model, options.shape, options.device)
    for _ in range(3):
        runner.actions()
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """Largest resident size of this process.

    Linux carries what ``getrusage`` gives over from the parent; its status file starts anew.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

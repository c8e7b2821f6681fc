"""One process that keeps a processor busy on and off: ``python -m omega_qvla_ros.soak.load SEED``.

It ends with its parent, whatever ends that.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

SPELL_S = (0.2, 3.0)
"""Shortest and longest spell of work, and of rest."""
SLICE_S = 0.02


def burn(seed: int) -> None:
    """Work and rest in turn until the parent is gone."""
    parent, generator = os.getppid(), random.Random(seed)
    while os.getppid() == parent:
        until_s = time.monotonic() + generator.uniform(*SPELL_S)
        while time.monotonic() < until_s and os.getppid() == parent:
            sum(range(10_000))
        until_s = time.monotonic() + generator.uniform(*SPELL_S)
        while time.monotonic() < until_s and os.getppid() == parent:
            time.sleep(SLICE_S)


def start_burners(count: int, seed: int) -> list[subprocess.Popen[bytes]]:
    """``count`` processes of this module; the caller ends them."""
    command = [sys.executable, "-m", "omega_qvla_ros.soak.load"]
    return [subprocess.Popen([*command, str(seed + k)], stdin=subprocess.DEVNULL) for k in range(count)]


if __name__ == "__main__":
    burn(int(sys.argv[1]))

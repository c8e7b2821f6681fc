"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident set now; the peak where the system does not tell (no /proc)."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return peak_bytes()


def peak_bytes() -> int:
    """Largest resident set so far."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest) * (1 if sys.platform == "darwin" else 1024)

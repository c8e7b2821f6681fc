"""Fingerprints of files and settings, so that stored results are never taken for those of something else."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGITS = 16
"""Hexadecimal digits kept: 64 bits, to tell versions apart, not to stop a forger."""


def fingerprint(*parts: Path | str) -> str:
    """Hash of the contents of files and of texts, in the given order."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:DIGITS]

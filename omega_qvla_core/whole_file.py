"""Files that have their name only once they are whole."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then give it that name; a former file is replaced in one step.

    The file may be read by whom the process's umask says, whatever ``write`` does: safetensors makes files that nobody
    but their owner reads, and a node often runs as another account than the person who quantized.

    Args:
        path: Name of the file; its folder exists.
        write: Called with the name to write to.

    Raises:
        OSError: The file cannot be written, or the folder does not exist.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)
    write(partial)
    partial.chmod(mode)
    partial.replace(path)

"""Links the data files of setup.py into the running Python's prefix, beside an editable installation.

``pip install --editable`` leaves out ``share/`` and ``lib/omega_qvla_ros``. With links to the working tree, ROS finds
launch files, config and executables there, and an edit is seen at once (what ``colcon build --symlink-install`` does).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools  # noqa: F401  # provides distutils, which Python 3.12 no longer has

# isort: split
from distutils.core import run_setup

ROOT = Path(__file__).resolve().parent.parent


def remove_stale_links(folder: Path) -> None:
    """Removes links into the working tree whose file is gone."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.exists():
            path.unlink()


def main() -> int:
    os.chdir(ROOT)
    # A wheel is what an editable installation stands in for: its data files include the executables.
    distribution = run_setup("setup.py", script_args=["bdist_wheel"], stop_after="commandline")
    prefix = Path(sys.prefix)
    for folder, files in distribution.data_files:
        target = prefix / folder
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            link = target / Path(file).name
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / file)
    for base in ("share", "lib"):
        remove_stale_links(prefix / base / distribution.get_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())

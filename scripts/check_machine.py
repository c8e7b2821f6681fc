"""Says what this machine lacks for the installation from wheels, before anything is downloaded.

Run by the Makefile with the system's Python, so it imports the standard library only.
"""

import ctypes
import importlib.util
import platform
import sys

# The ros-* wheels exist for these; 3.10 to 3.12 are what the project supports.
OLDEST, NEWEST = (3, 10), (3, 12)


def loads(*libraries):
    """Whether one of the shared libraries can be loaded."""
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def problems():
    """Yields one message for each thing that is missing, with its remedy."""
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        yield (
            f"Python {version[0]}.{version[1]} ({sys.executable}) is not supported: 3.10 to 3.12 are. "
            "Name one: make PYTHON=python3.12 ..."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        yield (
            f"ROS 2 wheels exist for Linux on x86_64, this is {platform.system()} on {platform.machine()}. "
            "Install ROS 2 and build with colcon: docs/installation.md."
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        yield "Python's venv module is missing. Install it: sudo apt install python3-venv"
    if not loads("libEGL.so.1") or not loads("libOpenGL.so.0", "libGL.so.1"):
        yield (
            "OpenGL without a screen (EGL) is missing, the simulator draws the camera images with it. Install it: "
            "sudo apt install libegl1 libgl1 libgl1-mesa-dri"
        )


def main():
    found = list(problems())
    for problem in found:
        print("error: " + problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

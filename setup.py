"""Build of the ROS 2 package ``omega_qvla_ros`` and of the ROS-free library ``omega_qvla_core`` beside it.

One file serves two builds:

* ``colcon build`` calls ``setup.py install`` (or ``develop``); ``setup.cfg`` sends the console scripts to
  ``lib/omega_qvla_ros``, where ``ros2 run`` and ``launch_ros`` look.
* ``pip install .`` builds a wheel, which puts console scripts into ``bin`` and ignores that part of ``setup.cfg``. A
  wheel therefore carries ``lib/omega_qvla_ros/<name>`` as well: small executables that hand over to ``bin/<name>``.

Version ranges are stated here; the exact versions that the demo and the tests run with are in ``constraints.txt``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "omega_qvla_ros"
ROOT = Path(__file__).resolve().parent

CORE_REQUIREMENTS = [
    "numpy>=1.26,<3",
    "torch>=2.4,<3",
    "safetensors>=0.4.3,<1",
    "tokenizers>=0.20,<1",
    "transformers>=4.48,<6",
    "mujoco>=3.3,<4",
    "typer>=0.12,<1",
    "rich>=13,<16",
    "imageio>=2.34,<3",
    "imageio-ffmpeg>=0.5,<1",
    "matplotlib>=3.8,<4",
    "opencv-python-headless>=4.10,<5",  # cv-bridge reads the CV_MAT type constants, which OpenCV 5 changed
    "pillow>=10.2",
    "pyyaml>=6,<7",
]

# ROS 2 from the package index, for machines without a ROS installation. With one, rosdep installs what package.xml
# names and this extra is not asked for. The wheels are built for Linux on x86_64.
ROS_REQUIREMENTS = [
    "ros-rclpy>=9.1,<10",
    "ros-rmw-fastrtps-cpp>=9.3,<10",
    "ros-sensor-msgs>=5.5,<6",
    "ros-trajectory-msgs>=5.5,<6",
    "ros-std-msgs>=5.5,<6",
    "ros-std-srvs>=5.5,<6",
    "ros-diagnostic-msgs>=5.5,<6",
    "ros-visualization-msgs>=5.5,<6",
    "ros-action-msgs>=2.3,<3",
    "ros-builtin-interfaces>=2.3,<3",
    "ros-geometry-msgs>=5.5,<6",
    "ros-lifecycle-msgs>=2.3,<3",
    "ros-rcl-interfaces>=2.3,<3",
    "ros-rosgraph-msgs>=2.3,<3",
    "ros-ament-index-python>=1.11,<2",
    "cv-bridge>=1.13.0.post0,<2",
    # cv-bridge declares no dependencies; 1.13 calls ndarray.tostring, which numpy 2.3 removed.
    "numpy<2.3",
]

# Bags: recording, replay, calibration from a bag. Works without ROS.
TOOLS_REQUIREMENTS = [
    "rosbags>=0.11,<0.12",  # bags/ ends an interrupted bag through the library's storage classes
    "apsw>=3.40",  # comes with rosbags; its errors are caught
]

# Kernels for NVIDIA GPUs. Optional: CUDA builds of torch bring the release that they were made with.
GPU_REQUIREMENTS = ["triton>=3.3,<4 ; sys_platform == 'linux'"]

TEST_REQUIREMENTS = [
    "pytest>=7.4,<8.4",  # launch_testing and launch_pytest break on 8.4 and later
    "pytest-timeout>=2.2",
    "hypothesis>=6.98",
    *GPU_REQUIREMENTS,  # the kernels run in Triton's interpreter, and are compiled for GPUs that are not there
]


def core_data() -> list[str]:
    """Files of ``omega_qvla_core`` that are not Python: shipped policies, MJCF, recipes, schemas.

    Listed one by one because ``**`` in ``package_data`` needs setuptools 62.3 and ROS distributions ship older ones.
    """
    core = ROOT / "omega_qvla_core"
    return sorted(
        path.relative_to(core).as_posix()
        for path in core.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    )


def share(folder: str, pattern: str = "*") -> list[tuple[str, list[str]]]:
    """``data_files`` entries that copy ``folder`` with its subfolders to ``share/omega_qvla_ros``."""
    target = Path("share") / PACKAGE
    files = (path for path in sorted((ROOT / folder).rglob(pattern)) if path.is_file() and path.suffix != ".pyc")
    relative = [path.relative_to(ROOT) for path in files]
    return [((target / path.parent).as_posix(), [path.as_posix()]) for path in relative]


def wheel_executables() -> list[tuple[str, list[str]]]:
    """``lib/omega_qvla_ros`` executables of a wheel; colcon makes its own there from the console scripts."""
    if "bdist_wheel" not in sys.argv:
        return []
    scripts = sorted((ROOT / "scripts" / "executables").iterdir())
    return [(f"lib/{PACKAGE}", [path.relative_to(ROOT).as_posix() for path in scripts])]


setup(
    name=PACKAGE,
    version="0.1.0",
    description="W4A4 vision-language-action policies (Ω-QVLA) that drive an arm over ROS 2.",
    author="Omega-QVLA maintainers",
    author_email="maintainers@omega-qvla.dev",
    maintainer="Omega-QVLA maintainers",
    maintainer_email="maintainers@omega-qvla.dev",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["omega_qvla_core", "omega_qvla_core.*", PACKAGE, f"{PACKAGE}.*"]),
    package_data={"omega_qvla_core": core_data()},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        *share("launch", "*.launch.py"),
        *share("config"),
        *wheel_executables(),
    ],
    zip_safe=False,
    install_requires=["setuptools", *CORE_REQUIREMENTS],
    extras_require={
        "ros": ROS_REQUIREMENTS,
        "tools": TOOLS_REQUIREMENTS,
        "gpu": GPU_REQUIREMENTS,
        "test": TEST_REQUIREMENTS,
        "dev": [*TEST_REQUIREMENTS, "ruff>=0.6"],
    },
    entry_points={
        "console_scripts": [
            "omega-qvla = omega_qvla_core.cli:main",
            "policy_node = omega_qvla_ros.nodes.policy_node:main",
            "composed_node = omega_qvla_ros.nodes.composed:main",
            "mujoco_bridge_node = omega_qvla_ros.nodes.mujoco_bridge_node:main",
            "episode_runner_node = omega_qvla_ros.nodes.episode_runner_node:main",
            "recorder_node = omega_qvla_ros.nodes.recorder_node:main",
            "omega-qvla-ros = omega_qvla_ros.cli:main",
            "demo = omega_qvla_ros.demo:main",
        ],
        # Recordings that `omega-qvla quantize --calibration` reads; the library finds them without knowing ROS.
        "omega_qvla.observation_sources": ["bag = omega_qvla_ros.bags.calibration:SOURCE"],
    },
)

"""The one place that sets environment variables for child processes: ROS 2, Fast DDS and MuJoCo read nothing else.

Used by the demo and the tests, which start nodes as processes. Nodes themselves read parameters only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from omega_qvla_ros.resources import config_file

MAX_DOMAIN_ID = 101
"""Highest ROS_DOMAIN_ID whose ports stay below the ephemeral port range on every system (ROS 2 documentation)."""
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
"""Old and new name of the variable that Fast DDS reads; 3.0 and later warn about the old one."""
OLD_FAST_DDS = ("humble", "iron", "jazzy")
"""ROS distributions whose Fast DDS (2.x) knows the old name only."""
PROFILES = {"shm": "fastdds_shm.xml", "udp": "fastdds_udp.xml"}


def free_domain_id(salt: int = 0) -> int:
    """A domain id that differs between processes started at about the same time, 1 to 101.

    Args:
        salt: Distinguishes several graphs of one process, such as the tests of one run.
    """
    return 1 + (os.getpid() * 7 + salt * 13) % MAX_DOMAIN_ID


def ros_environment(
    domain_id: int,
    *,
    profile: str | None = "shm",
    mujoco_gl: str | None = "egl",
    threads: int | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Environment for a node that is started as a process on this machine.

    Args:
        domain_id: ``ROS_DOMAIN_ID``; the same for all processes of one graph, another one for every other graph.
        profile: ``shm`` (simulation and tests: best-effort camera images arrive, same host only), ``udp`` (a robot
            on a network; not run by us) or None for the defaults of Fast DDS.
        mujoco_gl: ``MUJOCO_GL`` backend for off-screen rendering, None to leave it alone (a viewer needs a display).
        threads: CPU threads of torch and BLAS (``OMP_NUM_THREADS``), None to leave it alone.
        base: Variables to start from, the present process's by default.

    Returns:
        All variables for ``subprocess.Popen(env=...)``.

    Raises:
        ValueError: Unknown profile or a domain id out of range.
    """
    if not 0 <= domain_id <= MAX_DOMAIN_ID:
        raise ValueError(f"ROS_DOMAIN_ID {domain_id} is not within 0..{MAX_DOMAIN_ID}")
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"unknown Fast DDS profile {profile!r}; choose one of {', '.join(PROFILES)} or None")
    environment = dict(os.environ if base is None else base)
    environment["ROS_DOMAIN_ID"] = str(domain_id)
    # Without this every process multicasts on the network interfaces (default SUBNET).
    environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    environment["AMENT_PREFIX_PATH"] = _ament_prefix_path(environment.get("AMENT_PREFIX_PATH", ""))
    for name in PROFILE_VARIABLES:
        environment.pop(name, None)
    if profile is not None:
        old = environment.get("ROS_DISTRO") in OLD_FAST_DDS
        environment[PROFILE_VARIABLES[not old]] = str(config_file(PROFILES[profile]))
    if mujoco_gl is not None:
        environment["MUJOCO_GL"] = mujoco_gl
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    # A child's log lines must come out at once, a parent may wait for them.
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def enter_ros_environment(domain_id: int, *, profile: str | None = "shm") -> None:
    """Give the present process the environment of the nodes that it starts, before it initializes rclpy itself.

    Args:
        domain_id: See ``ros_environment``.
        profile: See ``ros_environment``.
    """
    wanted = ros_environment(domain_id, profile=profile, mujoco_gl=None)
    for name in PROFILE_VARIABLES:
        if name not in wanted:
            os.environ.pop(name, None)
    os.environ.update(wanted)


def _ament_prefix_path(present: str) -> str:
    """The prefix of the ``ros-*`` wheels is the Python prefix; they do not set the variable themselves."""
    prefixes = [prefix for prefix in present.split(os.pathsep) if prefix]
    own = Path(sys.prefix)
    if (own / "share" / "ament_index").is_dir() and str(own) not in prefixes:
        prefixes.append(str(own))
    return os.pathsep.join(prefixes)

"""Environment of child processes and where configuration files are found."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.process_environment import MAX_DOMAIN_ID, PROFILES, free_domain_id, ros_environment
from omega_qvla_ros.resources import config_file, share_directory


def test_graph_stays_on_this_host_with_the_shipped_profile() -> None:
    environment = ros_environment(7, base={"PATH": "/bin", "FASTRTPS_DEFAULT_PROFILES_FILE": "old.xml"})
    assert environment["ROS_DOMAIN_ID"] == "7"
    assert environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    assert environment["FASTDDS_DEFAULT_PROFILES_FILE"] == str(config_file("fastdds_shm.xml"))
    assert "FASTRTPS_DEFAULT_PROFILES_FILE" not in environment
    assert environment["MUJOCO_GL"] == "egl" and environment["PATH"] == "/bin"


def test_a_distribution_with_an_older_fast_dds_gets_the_name_that_it_reads() -> None:
    environment = ros_environment(7, base={"ROS_DISTRO": "jazzy", "FASTDDS_DEFAULT_PROFILES_FILE": "other.xml"})
    assert environment["FASTRTPS_DEFAULT_PROFILES_FILE"] == str(config_file("fastdds_shm.xml"))
    assert "FASTDDS_DEFAULT_PROFILES_FILE" not in environment


def test_defaults_of_fast_dds_and_of_mujoco_can_be_had() -> None:
    base = {"FASTDDS_DEFAULT_PROFILES_FILE": "x.xml", "MUJOCO_GL": "glfw"}
    environment = ros_environment(1, profile=None, mujoco_gl=None, threads=2, base=base)
    assert "FASTDDS_DEFAULT_PROFILES_FILE" not in environment
    assert environment["MUJOCO_GL"] == "glfw" and environment["OMP_NUM_THREADS"] == "2"


def test_prefix_of_the_wheels_is_added_once_behind_what_is_there() -> None:
    first = ros_environment(1, base={"AMENT_PREFIX_PATH": "/opt/ros/kilted"})["AMENT_PREFIX_PATH"]
    assert first.split(":")[0] == "/opt/ros/kilted"
    assert ros_environment(1, base={"AMENT_PREFIX_PATH": first})["AMENT_PREFIX_PATH"] == first
    if (Path(sys.prefix) / "share" / "ament_index").is_dir():
        assert first.split(":")[1:] == [sys.prefix]


@pytest.mark.parametrize(("domain", "profile"), [(-1, "shm"), (MAX_DOMAIN_ID + 1, "shm"), (1, "tcp")])
def test_wrong_values_are_refused(domain: int, profile: str) -> None:
    with pytest.raises(ValueError):
        ros_environment(domain, profile=profile, base={})


def test_domain_ids_are_in_range_and_differ_by_salt() -> None:
    ids = {free_domain_id(salt) for salt in range(7)}
    assert len(ids) == 7 and all(1 <= value <= MAX_DOMAIN_ID for value in ids)


@pytest.mark.parametrize("name", PROFILES.values())
def test_profiles_are_well_formed_and_only_the_real_one_reaches_other_hosts(name: str) -> None:
    root = ElementTree.parse(config_file(name)).getroot()
    kinds = {element.text for element in root.iter("{http://www.eprosima.com}type")}
    assert kinds == ({"SHM"} if name == "fastdds_shm.xml" else {"SHM", "UDPv4"})


def test_missing_file_lists_what_is_there() -> None:
    assert (share_directory() / "config" / "robots" / "tabletop.yaml").is_file()
    with pytest.raises(ConfigError, match="robots/tabletop.yaml"):
        config_file("robots/unknown.yaml")

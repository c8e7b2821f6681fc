"""What a launch file would start: the launch service runs for real, ``echo`` stands in front of every command line.

Vendors' packages are absent, so stand-ins of them are made in an ament prefix of the test: launch files that declare
nothing and start nothing, and executables that are never run. What the vendors' own launch files start is not tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from launch import LaunchContext, LaunchDescription, LaunchService
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, RegisterEventHandler, SetLaunchConfiguration
from launch.event_handlers import OnProcessStart
from launch.events.process import ProcessStarted
from launch.launch_description_sources import get_launch_description_from_python_launch_file

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
RECORDER = """
from pathlib import Path
from launch import LaunchDescription
from launch.actions import OpaqueFunction

def generate_launch_description():
    def note(context):
        values = dict(context.launch_configurations)
        Path(__file__).with_suffix(".given").write_text(repr(values))
    return LaunchDescription([OpaqueFunction(function=note)])
"""
"""A stand-in of a vendor's launch file: writes down the arguments that it was given."""


@dataclass(frozen=True)
class Started:
    """One node as launch would start it."""

    command: list[str]
    parameters: dict[str, object]
    environment: dict[str, str]


def arguments_of(path: Path) -> list[DeclareLaunchArgument]:
    """Every argument of a launch file."""
    return get_launch_description_from_python_launch_file(str(path)).get_launch_arguments()


def choices_of(path: Path) -> list[dict[str, str]]:
    """The defaults of a launch file, and each choice that is not a default."""
    cases: list[dict[str, str]] = [{}]
    for argument in arguments_of(path):
        default = "".join(part.describe().strip("'") for part in argument.default_value or ())
        cases += [{argument.name: choice} for choice in sorted(set(argument.choices or ()) - {default})]
    return cases


def start(
    path: Path, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch, distribution: str = "kilted"
) -> dict[str, Started]:
    """What a launch file starts, by ``executable``; several of one name are ``executable``, ``executable 2``...

    What it sets in the environment goes with ``monkeypatch``.
    """
    for name in (*PROFILE_VARIABLES, "MUJOCO_GL", "GZ_SIM_RESOURCE_PATH"):
        monkeypatch.setenv(name, "")  # remembers the value from before; launch writes into os.environ
        monkeypatch.delenv(name)
    monkeypatch.setenv("ROS_DISTRO", distribution)
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    started: dict[str, Started] = {}

    def note(event: ProcessStarted, _: LaunchContext) -> None:
        name = Path(next(part for part in event.cmd if "/lib/" in part)).name
        count = sum(key.split(" ")[0] == name for key in started)
        key = f"{name} {count + 1}" if count else name
        started[key] = Started(event.cmd, parameters_of(event.cmd), dict(event.env or os.environ))

    source = IncludeLaunchDescription(str(path), launch_arguments=arguments.items())
    service = LaunchService(noninteractive=True)
    service.include_launch_description(
        LaunchDescription(
            [
                RegisterEventHandler(OnProcessStart(on_start=note)),
                SetLaunchConfiguration("launch-prefix", "echo"),
                source,
            ]
        )
    )
    # The exit code says nothing: echo ends at once, and ends the launch while it is still starting.
    service.run()
    return started


def parameters_of(command: list[str]) -> dict[str, object]:
    """Parameters of the node in the order in which rcl applies the files."""
    found: dict[str, object] = {}
    for flag, value in pairwise(command):
        if flag == "--params-file":
            for node in yaml.safe_load(Path(value).read_text(encoding="utf-8")).values():
                found.update(node["ros__parameters"])
    return found


def stand_in(prefix: Path, package: str, launch_files: Iterable[str] = (), executables: Iterable[str] = ()) -> None:
    """A vendor's package in an ament prefix."""
    marker = prefix / "share/ament_index/resource_index/packages" / package
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for folder in (prefix / "share" / package / "launch", prefix / "lib" / package):
        folder.mkdir(parents=True, exist_ok=True)
    for name in launch_files:
        (prefix / "share" / package / "launch" / name).write_text(RECORDER)
    for name in executables:
        file = prefix / "lib" / package / name
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)

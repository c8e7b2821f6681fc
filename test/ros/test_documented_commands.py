"""Every command of docs/checkpoint_to_arm.md exists: verbs, options, nodes, parameters, launch files and arguments."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from omega_qvla_core.cli import app as core_app
from omega_qvla_ros.cli import app as ros_app
from omega_qvla_ros.nodes import parameters
from omega_qvla_ros.nodes.policy_parameters import POLICY_NODE

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "checkpoint_to_arm.md"
APPS: dict[str, Any] = {"omega-qvla": get_command(core_app), "omega-qvla-ros": get_command(ros_app)}
NODES = {
    "policy_node": POLICY_NODE,
    "mujoco_bridge_node": parameters.MUJOCO_BRIDGE_NODE,
    "episode_runner_node": parameters.EPISODE_RUNNER_NODE,
    "recorder_node": parameters.RECORDER_NODE,
}
ROS_ONLY = {"use_sim_time"}
"""Parameters that every node has."""


def commands() -> list[str]:
    """Lines of code blocks, and commands in running text."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(
        r"`((?:omega-qvla|ros2) [^`]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    return [line for line in [*lines, *inline] if line.strip() and not line.startswith("export ")]


def own(line: str) -> bool:
    words = shlex.split(line)
    return words[0] in APPS or ("omega_qvla_ros" in words[:-1] and "NAME" not in words)


def test_the_page_has_commands_of_every_kind() -> None:
    found = commands()
    for kind in (
        "omega-qvla quantize",
        "omega-qvla-ros replay",
        "ros2 run omega_qvla_ros",
        "ros2 launch omega_qvla_ros",
    ):
        assert any(line.startswith(kind) for line in found), kind


@pytest.mark.parametrize("line", [line for line in commands() if own(line)])
def test_command_exists(line: str) -> None:
    words = shlex.split(line)
    if words[0] in APPS:
        check_verb(APPS[words[0]], words[1:])
    elif words[:3] == ["ros2", "run", "omega_qvla_ros"]:
        check_node(words[3], words[4:])
    else:
        assert words[:3] == ["ros2", "launch", "omega_qvla_ros"], line
        check_launch(words[3], words[4:])


def check_verb(command: Any, words: list[str]) -> None:
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{words[0]} is not one of {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    free = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    named = {name: option for option in options for name in (*option.opts, *option.secondary_opts)}
    missing = {option.name for option in options if option.required}
    while words:
        word, words = words[0], words[1:]
        if not word.startswith("--"):
            assert free, f"{command.name} takes no further argument {word!r}"
            free.pop(0)
            continue
        assert word in named, f"{command.name} has no {word}; it has {sorted(named)}"
        missing.discard(named[word].name)
        if not named[word].is_flag:
            assert words, f"{word} wants a value"
            words = words[1:]
    assert not missing and not [p for p in free if p.required], f"{command.name} lacks {missing or free}"


def check_node(name: str, words: list[str]) -> None:
    scripts = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'"{name} = omega_qvla_ros.nodes.{name}:main"' in scripts
    names = {spec.name for spec in NODES[name]} | ROS_ONLY
    for word in words:
        if ":=" in word:
            assert word.split(":=")[0] in names, f"{name} has no parameter {word}"


def check_launch(name: str, words: list[str]) -> None:
    assert (ROOT / "launch" / name).is_file()
    # launch is not installed everywhere; the declarations are plain calls with the name as a string.
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "launch").rglob("*.py")]
    declared = {found for text in texts for found in re.findall(r'"([a-z_]+)"', text)}
    for word in words:
        argument, assigned, _ = word.partition(":=")
        assert assigned and argument in declared, f"{name} has no argument {word}"

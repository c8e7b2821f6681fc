"""Every launch file with every choice of every argument: what it would start, with which parameters and environment.

The launch service runs for real; ``echo`` stands in front of each node's command line, so that no node starts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Not "launch": the folder of that name in the repository would be found as a namespace package.
pytest.importorskip("launch_ros.actions", reason="launch and launch_ros come with a ROS installation only")
ament_index = pytest.importorskip("ament_index_python", reason="ament_index_python is not installed")
try:
    SHARE = Path(ament_index.get_package_share_directory("omega_qvla_ros"))
except (OSError, LookupError) as missing:
    pytest.skip(f"omega_qvla_ros is not on AMENT_PREFIX_PATH: {missing}", allow_module_level=True)

from launched import LAUNCH, PROFILE_VARIABLES, arguments_of, choices_of, start

from omega_qvla_core.envs.tabletop import COLOURS, KINDS, Task
from omega_qvla_ros.bringup.robots import ROBOTS

FILES = [LAUNCH / "policy.launch.py", LAUNCH / "sim.launch.py"]


def every_choice() -> list[pytest.param]:
    """The defaults of each file, and each choice that is not a default."""
    return [
        pytest.param(
            path, choice, id=f"{path.name}-{'-'.join('='.join(item) for item in choice.items()) or 'defaults'}"
        )
        for path in FILES
        for choice in choices_of(path)
    ]


def test_there_are_launch_files_for_the_simulation_and_for_an_arm():
    arms = [f"{name}_{kind}.launch.py" for name in ROBOTS for kind in ("real", "sim")]
    assert sorted(path.name for path in LAUNCH.glob("*.launch.py")) == sorted([path.name for path in FILES] + arms)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.launch.py")), ids=lambda path: path.name)
def test_every_argument_is_described_and_has_a_default_or_must_be_given(path):
    for argument in arguments_of(path):
        assert argument.description != "no description given", argument.name
        if path in FILES:
            assert argument.default_value is not None, argument.name


@pytest.mark.parametrize(("path", "arguments"), every_choice())
def test_every_choice_starts_installed_executables(path, arguments, monkeypatch):
    started = start(path, arguments, monkeypatch)
    expected = {"policy_node"} | ({"mujoco_bridge_node"} if path.name == "sim.launch.py" else set())
    assert set(started) == expected
    for node in started.values():
        executable = next(part for part in node.command if "/omega_qvla_ros/" in part)
        assert os.access(executable, os.X_OK)


def test_sim_tells_the_policy_what_the_simulator_judges(monkeypatch):
    started = start(LAUNCH / "sim.launch.py", {"task": "lift:green", "seed": "7", "namespace": "cell"}, monkeypatch)
    policy, bridge = started["policy_node"], started["mujoco_bridge_node"]
    assert bridge.parameters["task"] == "lift:green"
    assert bridge.parameters["seed"] == 7
    assert policy.parameters["instruction"] == Task.parse("lift:green").instruction
    assert policy.parameters["checkpoint"] == "tabletop_w4a4"
    assert policy.parameters["use_sim_time"] is True
    assert policy.parameters["inference_threads"] == 1  # two cores: the simulator needs the other one
    for node in started.values():
        assert "__ns:=/cell" in node.command
        assert node.environment["FASTDDS_DEFAULT_PROFILES_FILE"] == str(SHARE / "config" / "fastdds_shm.xml")


@pytest.mark.parametrize(
    ("arguments", "checkpoint"),
    [
        ({"quantized": "true"}, "tabletop_w4a4"),
        ({"quantized": "false"}, "tabletop"),
        ({"quantized": "false", "checkpoint": "/data/mine"}, "/data/mine"),
    ],
)
def test_sim_chooses_the_checkpoint(arguments, checkpoint, monkeypatch):
    started = start(LAUNCH / "sim.launch.py", arguments, monkeypatch)
    assert started["policy_node"].parameters["checkpoint"] == checkpoint


def test_sim_keeps_an_instruction_that_looks_like_yaml(monkeypatch):
    started = start(LAUNCH / "sim.launch.py", {"instruction": "no: touch 1"}, monkeypatch)
    assert started["policy_node"].parameters["instruction"] == "no: touch 1"


@pytest.mark.parametrize(("viewer", "backend"), [("false", "egl"), ("true", "glfw")])
def test_sim_draws_with_what_the_viewer_needs(viewer, backend, monkeypatch):
    started = start(LAUNCH / "sim.launch.py", {"viewer": viewer}, monkeypatch)
    assert started["mujoco_bridge_node"].environment["MUJOCO_GL"] == backend


def test_sim_names_the_profile_as_the_fast_dds_of_jazzy_reads_it(monkeypatch):
    started = start(LAUNCH / "sim.launch.py", {}, monkeypatch, distribution="jazzy")
    profile = str(SHARE / "config" / "fastdds_shm.xml")
    assert all(node.environment["FASTRTPS_DEFAULT_PROFILES_FILE"] == profile for node in started.values())


def test_sim_runs_episodes_when_asked_to(monkeypatch):
    started = start(LAUNCH / "sim.launch.py", {"episodes": "3", "seed": "400100"}, monkeypatch)
    assert started["episode_runner_node"].parameters["episodes"] == 3
    assert started["episode_runner_node"].parameters["first_seed"] == 400100


def test_sim_offers_the_tasks_that_the_environment_has():
    task = next(argument for argument in arguments_of(LAUNCH / "sim.launch.py") if argument.name == "task")
    assert set(task.choices) == {f"{kind}:{colour}" for kind in KINDS for colour in COLOURS}


def test_policy_for_an_arm_takes_its_topics_and_no_simulation_profile(monkeypatch):
    arguments = {
        "contract": "arm.yaml",
        "command_topic": "/jtc/joint_trajectory",
        "joint_states_topic": "/arm/joint_states",
    }
    policy = start(LAUNCH / "policy.launch.py", arguments, monkeypatch)["policy_node"]
    assert policy.parameters["contract"] == "arm.yaml"
    assert policy.parameters["use_sim_time"] is False
    assert policy.parameters["inference_threads"] == 0
    assert "joint_trajectory:=/jtc/joint_trajectory" in policy.command
    assert "joint_states:=/arm/joint_states" in policy.command
    assert not set(PROFILE_VARIABLES) & set(policy.environment)

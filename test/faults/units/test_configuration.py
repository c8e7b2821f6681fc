"""What is refused before anything can move: statistics, cameras, names, parameters."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rclpy
import torch
import yaml
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from robot_fixtures import contract_dict, toy_contract, toy_spec

from omega_qvla_core.checkpoints.preflight import preflight, read_requirements
from omega_qvla_core.errors import ConfigError, OmegaQVLAError
from omega_qvla_core.policy_types import CameraSpec
from omega_qvla_core.runtime.policy import Policy
from omega_qvla_core.runtime.random_policy import random_policy
from omega_qvla_ros.contract import check_policy, contract_from_dict, load_contract
from omega_qvla_ros.nodes import loading, parameters, policy_parameters
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.resources import config_file

CONTRACT = config_file("robots/tabletop.yaml")
STATISTICS = "norm_stats.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "random"
    random_policy().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def narrow(stats: dict) -> None:
    for name in ("min", "max"):
        stats["state"][name] = stats["state"][name][:6]


def stand_still(stats: dict) -> None:
    stats["state"]["min"][2] = stats["state"]["max"][2]


def not_finite(stats: dict) -> None:
    stats["actions"]["max"][0][1] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stats: stats.pop("state"), "state"),
        (lambda stats: stats["actions"].pop("max"), "max"),
        (narrow, "state"),
        (stand_still, r"state\[2\] is degenerate"),
        (not_finite, r"actions\.max\[0\]\[1\] is not finite"),
    ],
    ids=["missing", "half missing", "wrong width", "no spread", "not finite"],
)
def test_fault_36_statistics_that_cannot_be_used_are_refused_by_name(
    folder: Path, change: Callable[[dict], object], words: str
) -> None:
    stats = json.loads((folder / STATISTICS).read_text())
    change(stats)
    (folder / STATISTICS).write_text(json.dumps(stats))
    with pytest.raises(OmegaQVLAError, match=words):
        Policy.load(folder)
    report = preflight(folder, read_requirements(CONTRACT))
    assert not report.passed
    with pytest.raises(ConfigError, match=words):
        report.require()


def test_fault_36_missing_file_is_refused_by_name(folder: Path) -> None:
    (folder / STATISTICS).unlink()
    with pytest.raises(OmegaQVLAError, match=STATISTICS):
        Policy.load(folder)


def refused_node(context: Context, folder: Path, loader: loading.PolicyLoader, **parameters: object) -> PolicyNode:
    """A policy node whose configure has failed."""
    given = [Parameter(name, value=value) for name, value in {"checkpoint": str(folder), **parameters}.items()]
    made = PolicyNode(context=context, policy_loader=loader, parameter_overrides=given)
    assert made.trigger_configure() is TransitionCallbackReturn.FAILURE
    return made


def test_fault_30_what_was_loaded_before_the_memory_ran_out_is_freed(context: Context, saved: Path) -> None:
    """The policy is there when its first inference finds no room; nothing may keep it, not even the error's trace."""
    loaded: list[weakref.ref] = []
    full = True

    def warm_up() -> float:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 0.1

    def load(folder: Path, options: loading.PolicyOptions) -> Policy:
        policy = loading.load_policy(folder, options)
        policy.warm_up = warm_up
        loaded.append(weakref.ref(policy.model))
        return policy

    made = refused_node(context, saved, load)
    assert "not enough memory" in made._reporter.configure_error
    gc.collect()
    assert loaded[0]() is None
    full = False
    assert made.trigger_configure() is TransitionCallbackReturn.SUCCESS and loaded[1]() is not None
    made.trigger_cleanup()
    gc.collect()
    assert loaded[1]() is None
    made.destroy_node()


def test_fault_38_policy_that_calls_itself_quantized_and_is_not_is_refused(context: Context, saved: Path) -> None:
    """A load that fell back to full precision; the message has the bytes by class of layer."""

    def fall_back(folder: Path, options: loading.PolicyOptions) -> Policy:
        policy = loading.load_policy(folder, options)
        policy.spec = replace(policy.spec, quantization="w4a4")
        return policy

    made = refused_node(context, saved, fall_back, require_quantization=True)
    error = made._reporter.configure_error
    assert "require_quantization is set" in error and "(quantization 'w4a4') holds no quantized layer" in error
    assert re.search(r"Linear \d+ B", error), error
    made.destroy_node()


def test_fault_38_bytes_of_a_pack_are_reported_by_class_of_layer(context: Context) -> None:
    given = [Parameter("checkpoint", value="tabletop_w4a4"), Parameter("require_quantization", value=True)]
    made = PolicyNode(context=context, parameter_overrides=given)
    assert made.trigger_configure() is TransitionCallbackReturn.SUCCESS
    values = {pair.key: pair.value for pair in made._reporter._full_status(1).values}
    sizes = {key: int(size) for key, size in values.items() if key.startswith("weights_bytes.")}
    assert sizes["weights_bytes.QuantizedSite"] > 0 and int(values["weights_bytes"]) > 0
    made.trigger_cleanup()
    made.destroy_node()


def test_fault_39_activation_without_a_controller_holds_from_the_first_control_period(
    context: Context, saved: Path
) -> None:
    """Not from the next look at who subscribes, when the arm would have moved: one of two controllers may be there."""
    made = PolicyNode(context=context, parameter_overrides=[Parameter("checkpoint", value=str(saved))])
    assert made.trigger_configure() is TransitionCallbackReturn.SUCCESS
    assert made.trigger_activate() is TransitionCallbackReturn.SUCCESS
    session = made._session
    assert session.running and not session.safety.may_move
    assert "nobody subscribes to 'joint_trajectory'" in session.safety.held("output")
    made.trigger_shutdown()
    made.destroy_node()


@pytest.mark.parametrize("keys", [("front",), ("front", "wrist", "side"), ("front", "hand")])
def test_fault_37_cameras_of_contract_and_checkpoint_differ(keys: tuple[str, ...]) -> None:
    spec = toy_spec(cameras=tuple(CameraSpec(key, 64, 64) for key in keys))
    with pytest.raises(ConfigError) as caught:
        check_policy(toy_contract(), spec)
    text = str(caught.value)
    assert "camera keys" in text
    assert "contract [front, wrist]" in text and f"checkpoint [{', '.join(keys)}]" in text


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    made = Context()
    rclpy.init(context=made, args=[], domain_id=free_domain_id(70))
    yield made
    rclpy.try_shutdown(context=made)


def node(context: Context, configured: bool = True, **overrides: object) -> tuple[Node, list[str]]:
    """A node with the policy node's parameters and their checks, and what is unknown among the given ones."""
    given = [Parameter(name, value=value) for name, value in overrides.items()]
    made = Node("node", context=context, parameter_overrides=given, start_parameter_services=False)
    unknown = parameters.declare(made, policy_parameters.POLICY_NODE)
    checks = {"instruction": loading.instruction_problem}
    made.add_on_set_parameters_callback(parameters.checker(policy_parameters.POLICY_NODE, lambda: configured, checks))
    return made, unknown


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("execution_horizon", -1, ""),
        ("execution_horizon", 10**6, ""),
        ("execution_horizon", "four", ""),
        ("blend_time_s", 5.1, ""),
        ("blend_time_s", float("nan"), ""),
        ("noise_seed", -5, ""),
        ("instruction", "  ", "empty instruction is refused"),
        ("instruction", 5, ""),
        ("checkpoint", "other", "read at configure"),
        ("auto_activate", True, ""),
    ],
)
def test_fault_46_bad_value_at_run_time_is_refused_with_a_reason_and_the_old_one_stays(
    context: Context, name: str, bad: object, words: str
) -> None:
    made, _ = node(context)
    before = parameters.value(made, name)
    result = made.set_parameters([Parameter(name, value=bad)])[0]
    assert not result.successful and result.reason and words in result.reason
    assert parameters.value(made, name) == before
    made.destroy_node()


def test_fault_46_one_bad_value_refuses_the_whole_set(context: Context) -> None:
    made, _ = node(context)
    result = made.set_parameters_atomically([Parameter("noise_seed", value=7), Parameter("instruction", value="")])
    assert not result.successful and parameters.value(made, "noise_seed") == 0
    made.destroy_node()


@pytest.mark.parametrize(
    ("given", "nearest"),
    [({"chekpoint": "x"}, "checkpoint"), ({"execution_horison": 3}, "execution_horizon"), ({"blend_time": 0.1}, None)],
)
def test_fault_47_typing_error_in_a_parameter_is_named_with_the_nearest_one(
    context: Context, given: dict, nearest: str | None
) -> None:
    made, unknown = node(context, **given)
    (text,) = unknown
    assert f"unknown parameter {next(iter(given))!r}; did you mean '{nearest or 'blend_time_s'}'?" == text
    made.destroy_node()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_velocity: 2.0", "max_velocty: 2.0", "max_velocity"),
        ("sync_tolerance_s", "sync_tolerence_s", "sync_tolerance_s"),
        ("control_rate_hz", "control_rate", "control_rate_hz"),
    ],
)
def test_fault_47_typing_error_in_a_contract_is_named_with_the_nearest_key(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(CONTRACT.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=words) as caught:
        load_contract(path)
    assert new.split(":")[0] in str(caught.value)


def test_fault_47_unknown_joint_is_named_with_the_nearest_one() -> None:
    data = contract_dict()
    data["joints"][0]["name"] = "sholder"
    with pytest.raises(ConfigError, match="nearest to 'sholder' is 'shoulder'"):
        check_policy(contract_from_dict(data), toy_spec())


def test_fault_47_shipped_contract_as_written_is_accepted() -> None:
    """Otherwise the three tests above would refuse anything."""
    assert load_contract(CONTRACT).name == yaml.safe_load(CONTRACT.read_text())["name"]

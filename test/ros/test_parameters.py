"""One table of parameters, the commented YAML files and the declared descriptors say the same."""

from __future__ import annotations

import re

import pytest
import rclpy
import yaml
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_msgs.msg import String

from omega_qvla_ros.nodes import parameters, policy_parameters, qos
from omega_qvla_ros.nodes.parameters import When
from omega_qvla_ros.process_environment import free_domain_id
from omega_qvla_ros.resources import config_file

TABLES = {
    "policy_node": policy_parameters.POLICY_NODE,
    "mujoco_bridge_node": parameters.MUJOCO_BRIDGE_NODE,
    "episode_runner_node": parameters.EPISODE_RUNNER_NODE,
    "recorder_node": parameters.RECORDER_NODE,
}


@pytest.fixture(scope="module")
def context():
    made = Context()
    rclpy.init(context=made, args=[], domain_id=free_domain_id(50))
    yield made
    rclpy.try_shutdown(context=made)


def node(context: Context, **overrides: object) -> Node:
    given = [Parameter(name, value=value) for name, value in overrides.items()]
    return Node("node", context=context, parameter_overrides=given, start_parameter_services=False)


@pytest.mark.parametrize("name", TABLES)
def test_yaml_and_table_agree(name: str) -> None:
    text = config_file(f"{name}.yaml").read_text()
    values = yaml.safe_load(text)[f"/**/{name}"]["ros__parameters"]
    table = {spec.name: spec for spec in TABLES[name]}
    assert list(values) == list(table)
    flat = re.sub(r"\n\s*# ", " ", text)
    for key, value in values.items():
        assert value == table[key].default and type(value) is type(table[key].default), key
        assert table[key].description in flat, f"{key}: the comment is not the description"
        assert table[key].origin in flat
        assert f"Changes {table[key].when.value}." in flat


@pytest.mark.parametrize("name", TABLES)
def test_every_number_has_a_range_that_holds_its_default(name: str) -> None:
    for spec in TABLES[name]:
        assert spec.description.endswith("."), spec.name
        if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
            assert spec.minimum is not None and spec.minimum <= spec.default <= spec.maximum, spec.name


def test_declared_with_descriptors_and_ranges(context: Context) -> None:
    made = node(context)
    assert parameters.declare(made, policy_parameters.POLICY_NODE) == []
    for spec in policy_parameters.POLICY_NODE:
        descriptor = made.describe_parameter(spec.name)
        assert descriptor.description == spec.description
        assert descriptor.read_only == (spec.when is When.START)
        assert parameters.value(made, spec.name) == spec.default
    result = made.set_parameters([Parameter("execution_horizon", value=-1)])[0]
    assert not result.successful
    assert parameters.value(made, "execution_horizon") == 0
    made.destroy_node()


def test_misspelt_parameter_is_named_with_the_nearest_one(context: Context) -> None:
    made = node(context, checkpont="x")
    assert parameters.declare(made, policy_parameters.POLICY_NODE) == [
        "unknown parameter 'checkpont'; did you mean 'checkpoint'?"
    ]
    made.destroy_node()


@pytest.mark.parametrize(
    ("table", "given", "words"),
    [
        ("recorder_node", {"storage": "mcab"}, "choose 'mcap' or 'sqlite3' (nearest: 'mcap')"),
        ("policy_node", {"stamp_source": "heder"}, "choose 'header' or 'receive' (nearest: 'header')"),
        ("policy_node", {"engine": "atuo"}, "choose 'auto' or 'off' (nearest: 'auto')"),
    ],
)
def test_misspelt_choice_is_named_with_the_nearest_one(context: Context, table: str, given: dict, words: str) -> None:
    made = node(context, **given)
    (text,) = parameters.declare(made, TABLES[table])
    assert words in text
    made.destroy_node()


def test_changes_at_the_wrong_time_and_bad_values_are_refused_with_a_reason(context: Context) -> None:
    made = node(context)
    parameters.declare(made, policy_parameters.POLICY_NODE)
    configured = False
    made.add_on_set_parameters_callback(
        parameters.checker(
            policy_parameters.POLICY_NODE, lambda: configured, {"instruction": lambda text: None if text else "empty"}
        )
    )

    def set_one(name: str, value: object) -> str | None:
        result = made.set_parameters([Parameter(name, value=value)])[0]
        return None if result.successful else result.reason

    assert set_one("checkpoint", "a") is None
    configured = True
    assert "read at configure" in set_one("checkpoint", "b")
    assert parameters.value(made, "checkpoint") == "a"
    assert set_one("instruction", "") == "empty"
    assert set_one("instruction", "go") is None
    assert set_one("auto_activate", True) is not None  # read-only
    made.destroy_node()


def test_qos_override_is_taken_by_its_topic_and_a_misspelt_one_is_named(context: Context) -> None:
    depth, typo = (f"qos_overrides./{topic}.subscription.depth" for topic in ("image", "imgae"))
    made = node(context, **{depth: 7, typo: 3})
    assert parameters.declare(made, policy_parameters.POLICY_NODE) == []  # judged when the topics are there
    options = QoSOverridingOptions.with_default_policies()
    heard = made.create_subscription(
        String, "image", lambda _: None, qos.own(qos.IMAGE), qos_overriding_options=options
    )
    assert parameters.unused_qos_overrides(made) == [f"parameter {typo!r} belongs to no topic; did you mean {depth!r}?"]
    assert heard.qos_profile.depth == 7 and qos.IMAGE.depth == 1
    made.destroy_node()

"""Numbers of the policy node that only contract and checkpoint together can judge, and what it says about its clock."""

from __future__ import annotations

import pytest
import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter
from robot_fixtures import toy_contract, toy_spec

from omega_qvla_core.errors import ConfigError
from omega_qvla_ros.nodes import diagnostics, loading, parameters, policy_parameters
from omega_qvla_ros.process_environment import free_domain_id


@pytest.fixture(scope="module")
def context():
    made = Context()
    rclpy.init(context=made, args=[], domain_id=free_domain_id(51))
    yield made
    rclpy.try_shutdown(context=made)


@pytest.fixture
def node(context: Context):
    made: list[Node] = []

    def make(**overrides: object) -> Node:
        given = [Parameter(name, value=value) for name, value in overrides.items()]
        made.append(Node("node", context=context, parameter_overrides=given, start_parameter_services=False))
        assert parameters.declare(made[-1], policy_parameters.POLICY_NODE) == []
        return made[-1]

    yield make
    for one in made:
        one.destroy_node()


def test_control_rate_below_the_contracts_is_refused_with_both_numbers(node) -> None:
    """Guard, staleness and holds run at this rate."""
    with pytest.raises(ConfigError, match=r"control_rate_hz is 0\.1, .* at 20 Hz"):
        loading.control_rate_hz(node(control_rate_hz=0.1), toy_contract())
    assert loading.control_rate_hz(node(), toy_contract()) == 20.0
    assert loading.control_rate_hz(node(control_rate_hz=50.0), toy_contract()) == 50.0


def test_blank_instruction_is_refused_and_an_empty_one_is_the_default(node) -> None:
    contract = toy_contract(default_instruction="wave")
    with pytest.raises(ConfigError, match="'instruction' is '   '"):
        loading.instruction(node(instruction="   "), contract)
    assert loading.instruction(node(), contract) == "wave"
    assert loading.instruction(node(instruction="go"), contract) == "go"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"execution_horizon": 9}, "execution_horizon is 9, the chunks of 'toy' have 8 steps"),
        ({"blend_time_s": 0.41}, r"blend_time_s is 0\.41, a chunk of 'toy' lasts 0\.4 s"),
    ],
)
def test_horizon_and_blend_longer_than_a_chunk_are_refused(node, given: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loading.session_options(node(**given), toy_contract(), toy_spec())


def test_horizon_and_blend_up_to_a_chunk_are_taken(node) -> None:
    options = loading.session_options(node(execution_horizon=8, blend_time_s=0.4), toy_contract(), toy_spec())
    assert (options.execution_horizon_steps, options.blend_time_s) == (8, 0.4)
    options = loading.session_options(node(), toy_contract(), toy_spec())
    assert (options.execution_horizon_steps, options.blend_time_s) == (4, 0.1)


def test_clock_that_does_not_go_is_a_problem() -> None:
    assert "no /clock is published; set use_sim_time:=false" in diagnostics.clock_problem(0, 0.0, 0.05)
    assert "has not run for 0.11 s" in diagnostics.clock_problem(1, 0.11, 0.05)
    assert diagnostics.clock_problem(1, 0.09, 0.05) is None

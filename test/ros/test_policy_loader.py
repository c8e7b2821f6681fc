"""A policy node with a loader of the caller's own: a wrapped policy, without a switch for it in the node."""

from __future__ import annotations

from pathlib import Path

import pytest
import rclpy
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from omega_qvla_ros.nodes import loading
from omega_qvla_ros.nodes.policy_node import PolicyNode
from omega_qvla_ros.process_environment import free_domain_id


@pytest.fixture
def context():
    made = Context()
    rclpy.init(context=made, args=[], domain_id=free_domain_id(51))
    yield made
    rclpy.try_shutdown(context=made)


def test_given_loader_gets_folder_and_options_and_gives_the_policy(context: Context, checkpoint: str) -> None:
    asked = []

    def load(folder: Path, options: loading.PolicyOptions) -> loading.LoadedPolicy:
        asked.append((folder, options.device, options.engine))
        return loading.load_policy(folder, options)

    given = [Parameter("checkpoint", value=checkpoint), Parameter("engine", value="off")]
    node = PolicyNode(context=context, policy_loader=load, parameter_overrides=given)
    assert node.trigger_configure() is TransitionCallbackReturn.SUCCESS
    assert asked == [(Path(checkpoint), "cpu", "off")]
    assert node.trigger_cleanup() is TransitionCallbackReturn.SUCCESS
    node.destroy_node()

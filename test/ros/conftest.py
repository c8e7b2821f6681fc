"""Environment of the ROS tests. Set on import: Fast DDS reads its profile once, when a process first uses it."""

from __future__ import annotations

import pytest

from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id

enter_ros_environment(free_domain_id())

from graph_fixtures import Graph  # noqa: E402 - needs the environment above
from node_forks import ForkedNode  # noqa: E402

from omega_qvla_core.runtime.random_policy import random_policy  # noqa: E402


@pytest.fixture
def graph(tmp_path):
    """Processes and a node of the test on a ROS graph of their own; ended afterwards."""
    made = Graph(tmp_path, ForkedNode)
    yield made
    made.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny policy with random weights: it moves the arm slowly, and means nothing by it."""
    folder = tmp_path_factory.mktemp("policy") / "random"
    random_policy().save(folder)
    return str(folder)

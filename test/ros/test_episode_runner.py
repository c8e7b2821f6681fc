"""Episodes over topics, asked for from Python as the demo does."""

from __future__ import annotations

import numpy as np
import pytest
from graph_fixtures import BRIDGE, DEADLINE_S, POLICY, Graph
from node_forks import ForkedNode

from omega_qvla_core.envs.tabletop import COLOURS, KINDS, Task
from omega_qvla_core.runtime.random_policy import random_policy
from omega_qvla_ros.nodes.episode_runner_node import EpisodeError, EpisodeRecord, episode_requests, run_episodes
from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id, ros_environment
from omega_qvla_ros.processes import NodeProcess, first_failure, running

DOMAIN = free_domain_id(40)


@pytest.fixture
def domain():
    """``run_episodes`` takes the domain from the environment of its process."""
    enter_ros_environment(DOMAIN)
    yield DOMAIN
    enter_ros_environment(free_domain_id())


def test_requests_rotate_tasks_and_colours() -> None:
    requests = episode_requests(9, 400_000)
    assert {request.task for request in requests} == {f"{kind}:{colour}" for kind in KINDS for colour in COLOURS}
    assert [request.seed for request in requests] == list(range(400_000, 400_009))
    assert episode_requests(2, 1, ["lift"])[1].task == "lift:green"


def test_episodes_run_one_after_the_other(domain: int, tmp_path) -> None:
    random_policy().save(tmp_path / "random")
    environment = ros_environment(domain, threads=1)
    bridge = NodeProcess(BRIDGE, environment, tmp_path / "bridge.log", {"episode_limit_s": 1.0, "overview": True})
    policy = ForkedNode(
        POLICY,
        environment,
        tmp_path / "policy.log",
        {
            "checkpoint": str(tmp_path / "random"),
            "use_sim_time": True,
            "auto_activate": True,
            "start_on_activate": False,
            "inference_threads": 1,
        },
    )
    seen: list[EpisodeRecord] = []
    frames: list[tuple[tuple[int, ...], float]] = []
    try:
        run = run_episodes(
            episode_requests(3, 400_000),
            on_episode=seen.append,
            on_frame=lambda topic, rgb, time_s: frames.append((rgb.shape, time_s)),
            startup_timeout_s=DEADLINE_S,
            episode_timeout_s=DEADLINE_S,
        )
    except EpisodeError as error:
        raise AssertionError(f"{error}\n{bridge.log_text()}\n{policy.log_text()}") from error
    finally:
        assert policy.stop(DEADLINE_S) == 0
        assert bridge.stop(DEADLINE_S) == 0
    assert list(run.records) == seen and len(seen) == 3
    for index, record in enumerate(seen):
        assert (record.index, record.seed) == (index, 400_000 + index)
        assert record.instruction == Task.parse(record.task).wording(record.seed)
        assert record.success or record.sim_time_s == pytest.approx(1.0, abs=0.06)
        assert record.rejected_trajectories == 0 and record.wall_s > 0
    assert float(run.policy["inference_p50_ms"]) > 0 and float(run.policy["inference_p95_ms"]) > 0
    assert float(run.policy["control_rate_hz"]) > 5.0
    assert run.policy["trajectories_invalid"] == "0" and run.bridge["trajectories_rejected"] == "0"
    assert len(frames) > 10 and frames[0][0] == (368, 480, 3)
    assert (np.diff([time_s for _, time_s in frames]) > 0).all()


def test_failed_configuration_of_the_policy_is_reported(domain: int, tmp_path) -> None:
    policy = ForkedNode(
        POLICY, ros_environment(domain), tmp_path / "policy.log", {"checkpoint": "nowhere", "auto_activate": True}
    )
    try:
        with pytest.raises(EpisodeError, match="there is no checkpoint folder 'nowhere'"):
            run_episodes(episode_requests(1, 0), startup_timeout_s=DEADLINE_S)
    finally:
        policy.stop()


def test_node_that_dies_at_its_start_is_reported_at_once(domain: int, tmp_path) -> None:
    with (
        running(lambda: NodeProcess(BRIDGE, ros_environment(domain), tmp_path / "bridge.log", {"sead": 1})) as nodes,
        pytest.raises(EpisodeError, match=r"mujoco_bridge_node ended with code 1[\s\S]*did you mean 'seed'"),
    ):
        run_episodes(episode_requests(1, 0), startup_timeout_s=10 * DEADLINE_S, failure=lambda: first_failure(nodes))


def test_missing_nodes_are_named(tmp_path) -> None:
    graph = Graph(tmp_path)
    graph.close()
    with pytest.raises(EpisodeError, match="mujoco_bridge_node is not ready after 1 s: nothing heard of it"):
        run_episodes(episode_requests(1, 0), startup_timeout_s=1.0)

"""The whole way with real processes: simulator, policy node with a trace, recorder; then the bag through the policy."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
from graph_fixtures import Graph

from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.observation_sources import ObservationRequest, read_observations
from omega_qvla_ros.bags.playback import Playback
from omega_qvla_ros.bags.reader import Bag
from omega_qvla_ros.bags.replay import ReplayOptions, differences, replay
from omega_qvla_ros.contract import load_contract
from omega_qvla_ros.resources import resolve_contract
from omega_qvla_ros.trace import read_trace

RECORDER = "omega_qvla_ros.nodes.recorder_node"


def test_a_recorded_run_gives_its_own_chunks_again(graph: Graph, checkpoint: str, tmp_path: Path) -> None:
    bag_folder, trace_file = tmp_path / "run", tmp_path / "run.jsonl"
    graph.start_bridge(episode_limit_s=1000.0)
    recorder = graph.start(RECORDER, {"bag": str(bag_folder), "use_sim_time": True, "min_free_mb": 1})
    graph.wait(lambda: "recorder_node" in graph.diagnostics, "the recorder's report")
    policy = graph.start_policy(checkpoint=checkpoint, auto_activate=True, trace_file=str(trace_file))
    graph.wait(lambda: int(graph.policy().get("trace_chunks", 0)) >= 5, "five traced chunks")
    assert graph.policy()["trace_error"] == "" and graph.policy()["trace_dropped"] == "0"
    for process in (policy, recorder):
        process.send(signal.SIGINT)
        graph.wait(lambda process=process: process.returncode is not None, "the node's end")
        assert process.returncode == 0, process.log_text()

    loaded, contract = Policy.load(checkpoint), load_contract(resolve_contract("tabletop"))
    trace = read_trace(trace_file)
    assert len(trace.records) >= 5 and trace.header.joints == contract.joint_names
    with Bag(bag_folder) as bag:
        playback = Playback(bag, contract, loaded.spec)
        found = replay(playback, loaded, ReplayOptions(), trace=trace)
        recorded = {moment.snapshot.stamp_ns: moment for moment in playback.moments()}
    # Cameras are best effort: on a busy machine the recorder may lack a picture that the node had.
    assert len(found) >= 3
    made = differences(found, contract.chunk.execution_horizon_steps)
    # One thread in the node and several here: products are summed in another order.
    np.testing.assert_allclose(made["trace"].largest, 0.0, atol=1e-4)
    assert made["commands"].count > 0
    for record in trace.records:
        moment = recorded.get(record.observation_ns)
        if moment is not None:
            assert dict(moment.snapshot.image_stamps_ns) == record.image_stamps_ns
            assert moment.instruction == record.instruction == "touch the red cube"
    request = ObservationRequest(loaded.spec, contract="tabletop", max_observations=4)
    observations = read_observations(bag_folder, request).observations
    assert len(observations) == 4 and {o.instruction for o in observations} == {"touch the red cube"}

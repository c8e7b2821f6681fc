"""Every inference of a session leaves one record that says what became of it."""

from __future__ import annotations

import numpy as np
import pytest
from robot_fixtures import PERIOD_NS
from session_rig import Rig

from omega_qvla_core.noise import inference_seed


@pytest.fixture
def rig():
    made = Rig(noise_seed=3)
    yield made
    made.close()


def test_placed_chunks_tell_what_they_were_planned_on(rig: Rig) -> None:
    rig.run(12)
    records = rig.records
    assert len(records) >= 4 and {record.outcome for record in records} == {"placed"}
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert [record.noise_seed for record in records] == [inference_seed(3, k) for k in range(len(records))]
    for record, (observation, seed) in zip(records, rig.policy.seen):
        assert record.noise_seed == seed and record.instruction == observation.instruction == "go"
        np.testing.assert_array_equal(record.positions, observation.state[::-1])  # the checkpoint's order is the other
        assert record.chunk().shape == (8, 2)
        assert set(record.image_stamps_ns.values()) == {record.observation_ns}
        assert record.age_s == pytest.approx((record.time_ns - record.observation_ns) * 1e-9)
    assert sum(record.skipped_steps for record in records) == rig.session.scheduler.skipped_steps


def test_refused_and_failed_inferences_tell_why(rig: Rig) -> None:
    rig.run(4)
    rig.policy.fault = float("nan")
    rig.run(4)
    rejected = [record for record in rig.records if record.outcome == "rejected"]
    assert rejected and "finite" in rejected[0].reason and np.isnan(rejected[0].chunk()).any()
    rig.policy.fault = RuntimeError("no more")
    for _ in range(40):
        rig.tick()
        if rig.records[-1].outcome == "failed":
            break
    assert rig.records[-1].outcome == "failed" and rig.records[-1].reason == "RuntimeError: no more"
    assert rig.records[-1].actions == ()


def test_chunks_of_another_task_are_dropped_with_their_reason(rig: Rig) -> None:
    rig.run(4)
    while not rig.session.worker.busy:
        rig.now += PERIOD_NS
        rig.feed()
        rig.step()
    rig.session.set_instruction("stop that", rig.now)
    rig.wait()
    rig.session.collect(rig.now)
    assert rig.records[-1].outcome == "dropped" and rig.records[-1].reason.startswith("task: ")
    assert rig.records[-1].instruction == "go"

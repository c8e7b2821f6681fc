"""Recording, storing and resuming demonstrations."""

from __future__ import annotations

import numpy as np
import pytest

from omega_qvla_core.envs.tabletop import TASKS, VELOCITY_LIMITS, Task, demonstrations
from omega_qvla_core.envs.tabletop.demonstrations import Recorder, generate, load_shard
from omega_qvla_core.envs.tabletop.seeds import VALIDATION
from omega_qvla_core.errors import ConfigError


@pytest.fixture(scope="module")
def recorder():
    shared = Recorder()
    yield shared
    shared.close()


@pytest.fixture(autouse=True)
def _use_shared_recorder(recorder, monkeypatch):
    monkeypatch.setattr(demonstrations, "_recorder", recorder)


def test_episode_holds_every_array_for_every_step(recorder):
    task = Task("lift", "green")
    episode = recorder.record(VALIDATION[0], task)
    count = len(episode)
    assert episode.success and episode.instruction == task.wording(VALIDATION[0])
    shapes = {key: value.shape[1:] for key, value in episode.steps.items()}
    assert shapes == {
        "front": (64, 64, 3),
        "wrist": (64, 64, 3),
        "state": (7,),
        "action": (7,),
        "executed": (7,),
        "burst": (),
        "after_success": (),
        "cube_position": (3, 3),
        "cube_yaw": (3,),
        "plate_position": (3,),
        "tool_position": (3,),
        "tool_rotation": (3, 3),
        "front_uv": (4, 2),
        "wrist_uv": (4, 2),
        "front_inside": (4,),
        "wrist_inside": (4,),
        "front_visible": (4,),
        "wrist_visible": (4,),
    }
    assert all(len(value) == count for value in episode.steps.values())
    assert episode.steps["front"].dtype == np.uint8 and episode.steps["action"].dtype == np.float32
    assert 5 <= episode.steps["after_success"].sum() <= 8
    assert not (episode.steps["front_visible"] & ~episode.steps["front_inside"]).any()


def test_recording_is_deterministic_and_the_noise_is_not_in_the_labels(recorder):
    task = Task("touch", "red")
    first, second = recorder.record(7, task), recorder.record(7, task)
    for key, value in first.steps.items():
        np.testing.assert_array_equal(value, second.steps[key])
    steps = first.steps
    quiet = ~steps["burst"]
    noise = (steps["executed"] - steps["action"])[quiet, :6]
    assert 0.005 < noise.std() < 0.03
    clean = recorder.record(7, task, noise=False).steps
    np.testing.assert_array_equal(clean["executed"], clean["action"])
    assert not clean["burst"].any()


def test_labels_are_reachable_in_a_few_periods(recorder):
    steps = recorder.record(9, Task("place", "blue")).steps
    lead = np.abs(steps["action"] - steps["state"])[:, :6]
    assert (lead < 4 * 0.05 * VELOCITY_LIMITS[:6]).all()


def test_generate_resumes_and_does_not_depend_on_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrations, "SHARD_SEEDS", 2)
    touch = TASKS[:3]
    calls = []
    first = generate(tmp_path / "a", 3, seeds=VALIDATION, tasks=touch, progress=lambda *done: calls.append(done))
    assert calls == [(0, 3), (2, 3), (3, 3)]
    assert first.attempted == 3 and first.kept == 3 and len(first.shards) == 2
    content = [path.read_bytes() for path in first.shards]
    stamps = [path.stat().st_mtime_ns for path in first.shards]
    first.shards[1].unlink()
    again = generate(tmp_path / "a", 3, seeds=VALIDATION, tasks=touch)
    assert again == first
    assert [path.read_bytes() for path in again.shards] == content
    assert again.shards[0].stat().st_mtime_ns == stamps[0]
    assert not list((tmp_path / "a").glob("*.partial"))

    episodes = [episode for path in first.shards for episode in load_shard(path)]
    assert [episode.seed for episode in episodes] == list(VALIDATION[:3])
    assert [episode.task for episode in episodes] == list(touch)
    assert sum(len(episode) for episode in episodes) == first.steps
    assert all(episode.steps["after_success"][-1] for episode in episodes)


def test_generate_refuses_a_folder_made_with_other_settings(tmp_path):
    generate(tmp_path, 1, seeds=VALIDATION, tasks=TASKS[:1])
    with pytest.raises(ConfigError, match="noise"):
        generate(tmp_path, 1, seeds=VALIDATION, tasks=TASKS[:1], noise=False)
    with pytest.raises(ConfigError, match="seeds"):
        generate(tmp_path, 1, seeds=VALIDATION[5:], tasks=TASKS[:1])


def test_damaged_shard_is_named(tmp_path):
    summary = generate(tmp_path, 1, seeds=VALIDATION, tasks=TASKS[:1])
    path = summary.shards[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=path.name):
        load_shard(path)
    with pytest.raises(ConfigError, match=path.name):
        generate(tmp_path, 1, seeds=VALIDATION, tasks=TASKS[:1])


def test_parallel_generation_gives_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrations, "SHARD_SEEDS", 1)
    alone = generate(tmp_path / "one", 2, processes=1, seeds=VALIDATION, tasks=TASKS[:2])
    together = generate(tmp_path / "two", 2, processes=2, seeds=VALIDATION, tasks=TASKS[:2])
    assert [path.read_bytes() for path in alone.shards] == [path.read_bytes() for path in together.shards]


@pytest.mark.parametrize(("episodes", "processes"), [(0, 1), (20_000, 1), (1, 0)])
def test_bad_numbers_are_named(tmp_path, episodes, processes):
    with pytest.raises(ConfigError):
        generate(tmp_path, episodes, processes=processes, seeds=VALIDATION)

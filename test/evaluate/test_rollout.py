"""Rollouts end, are resumable and paired; the shipped policy and its pack really do the task."""

import json
import shutil
from pathlib import Path

import pytest

from omega_qvla_core.envs.tabletop import COLOURS, TabletopEnv, Task
from omega_qvla_core.envs.tabletop.seeds import VALIDATION
from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.parallel import Row, read_results, row_source, run_rows
from omega_qvla_core.evaluate.rollout import run_episode, task_of_seed
from omega_qvla_core.noise import inference_seed
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.random_policy import random_policy


@pytest.fixture(scope="module")
def env():
    environment = TabletopEnv()
    yield environment
    environment.close()


@pytest.mark.parametrize("name", ["tabletop", "tabletop_w4a4"])
def test_shipped_policy_does_what_it_is_told(env, name):
    policy = Policy.load(name)
    tasks = [Task("touch", "green"), Task("lift", "blue"), Task("place", "red")]
    results = [run_episode(policy, env, VALIDATION[k], task) for k, task in enumerate(tasks)]
    # 99 % each on 900 fresh seeds; a broken policy or pack does none of them.
    assert sum(result.success for result in results) >= 2
    assert not any(result.wrong_colour for result in results)
    assert all(result.steps <= task.max_steps for result, task in zip(results, tasks, strict=True))


def test_an_episode_of_a_policy_that_knows_nothing_ends_at_the_cut_off(env):
    task = Task("touch", "red")
    result = run_episode(random_policy(), env, VALIDATION[0], task, execute_steps=16)
    assert not result.success and result.steps == task.max_steps


def test_execute_steps_beyond_the_horizon_are_refused(env):
    with pytest.raises(ValueError, match="horizon"):
        run_episode(random_policy(), env, VALIDATION[0], Task("touch", "red"), execute_steps=17)


def test_colours_rotate_and_noise_seeds_differ():
    assert {task_of_seed("lift", seed).colour for seed in range(3)} == set(COLOURS)
    assert len({inference_seed(seed, i) for seed in range(10) for i in range(10)}) == 100


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """(row, folder with its policy and ``results.jsonl``, results) of one seed: a process that imports torch."""
    folder = tmp_path_factory.mktemp("run")
    policy = folder / "policy"
    random_policy().save(policy)
    row = Row("random", str(policy), row_source(str(policy), 16))
    found = run_rows([row], ["touch"], VALIDATION[:1], folder / "results.jsonl", processes=1, execute_steps=16)
    return row, folder, found


def test_runs_resume_where_they_were(one_run, tmp_path):
    row, folder, first = one_run
    rows, seeds = [row], VALIDATION[:2]
    file = Path(shutil.copy(folder / "results.jsonl", tmp_path))
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"row": "rand')  # an interrupted write
    done = []
    both = run_rows(
        rows, ["touch"], seeds, file, processes=1, execute_steps=16, progress=lambda d, t, r: done.append(d)
    )
    assert done == [1, 2]
    assert both[0] == first[0] and [r.seed for r in both] == list(seeds)
    assert read_results(file) == both


def test_a_damaged_results_file_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('nonsense\n{"row": "a"}\n')
    with pytest.raises(ConfigError, match=r"results.jsonl:1"):
        read_results(file)


def test_results_are_plain_json(env):
    result = run_episode(random_policy(), env, VALIDATION[1], Task("touch", "blue"), execute_steps=16)
    assert json.loads(json.dumps(result.to_json()))["seed"] == VALIDATION[1]


def test_results_of_other_weights_or_settings_are_never_taken_for_these(one_run, tmp_path):
    row, folder, _ = one_run
    policy = Path(shutil.copytree(folder / "policy", tmp_path / "policy"))
    assert row_source(str(policy), 16) == row.source
    file = Path(shutil.copy(folder / "results.jsonl", tmp_path))
    kept = file.read_text()
    other = Row("random", str(policy), row_source(str(policy), 8))
    with pytest.raises(ConfigError, match="other weights or settings"):
        run_rows([other], ["touch"], VALIDATION[:1], file, processes=1, execute_steps=8)
    random_policy(seed=1).save(policy)
    assert row_source(str(policy), 16) != row.source
    assert file.read_text() == kept

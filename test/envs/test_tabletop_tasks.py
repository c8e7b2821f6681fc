"""Tasks and their wordings."""

from __future__ import annotations

import pytest

from omega_qvla_core.envs.tabletop import COLOURS, KINDS, STAGES, TASKS, Task
from omega_qvla_core.errors import ConfigError


def test_canonical_instructions():
    assert Task("touch", "red").instruction == "touch the red cube"
    assert Task("lift", "green").instruction == "lift the green cube"
    assert Task("place", "blue").instruction == "pick up the blue cube and place it on the plate"


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_wordings_are_plain_and_name_only_their_colour(task):
    assert len(set(task.wordings)) >= 4
    assert task.wordings[0] == task.instruction
    for wording in task.wordings:
        assert wording == wording.lower()
        assert all(character.isalpha() or character == " " for character in wording)
        assert [colour for colour in COLOURS if colour in wording.split()] == [task.colour]


def test_no_wording_means_two_tasks():
    every = [wording for task in TASKS for wording in task.wordings]
    assert len(set(every)) == len(every)


def test_wording_follows_the_seed_and_all_are_used():
    task = Task("place", "red")
    drawn = [task.wording(seed) for seed in range(200)]
    assert drawn == [task.wording(seed) for seed in range(200)]
    assert set(drawn) == set(task.wordings)


def test_parse_and_print_round_trip():
    for task in TASKS:
        assert Task.parse(str(task)) == task
        assert task.stages == STAGES[task.kind]
    assert {task.kind for task in TASKS} == set(KINDS)


@pytest.mark.parametrize("text", ["place", "place:pink", "throw:red", "", "place:"])
def test_bad_tasks_are_named(text):
    with pytest.raises(ConfigError):
        Task.parse(text)

"""Comparison over random halves: paired, resumable, by recipe content."""

from __future__ import annotations

import json

import pytest

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant import Recipe
from omega_qvla_core.quant.splits import halves, measure_splits, splits_table

ROWS = [Recipe.preset("w8a8"), Recipe.preset("rtn")]


def test_halves_are_disjoint_whole_and_reproducible():
    one, other = halves(16, 3)
    assert sorted([*one, *other]) == list(range(16)) and len(one) == 8
    assert halves(16, 3) == (one, other) and halves(16, 4) != (one, other)


def test_an_interrupted_comparison_goes_on_and_gives_the_same(policy, sixteen_observations, tmp_path):
    seen, path = sixteen_observations, tmp_path / "results.jsonl"
    whole = measure_splits(policy, seen, ROWS, range(2))
    measure_splits(policy, seen, ROWS[:1], range(1), path)
    kept = path.read_text()
    calls = []
    again = measure_splits(policy, seen, ROWS, range(2), path, lambda done, total, what: calls.append(total))
    assert again == whole and calls[0] == 3
    assert path.read_text().startswith(kept) and len(path.read_text().splitlines()) == 4
    assert all(whole["w8a8"][split]["relative"] < whole["rtn"][split]["relative"] for split in range(2))


def test_the_table_states_means_and_paired_differences():
    found = {
        "a": {0: {"relative": 0.2, "median": 0.1}, 1: {"relative": 0.4, "median": 0.3}},
        "b": {0: {"relative": 0.1, "median": 0.1}, 1: {"relative": 0.3, "median": 0.4}},
    }
    row = splits_table(found).splitlines()[-1]
    assert "0.2000 (standard error 0.1000) | -0.1000 (standard error 0.0000), lower in 2 of 2" in row
    assert "0.0500 (standard error 0.0500), lower in 0 of 2" in row


@pytest.mark.parametrize("text", ["no json\n", json.dumps({"split": 1}) + "\n", "3\n"])
def test_another_file_is_refused(policy, sixteen_observations, tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no results of splits"):
        measure_splits(policy, sixteen_observations, ROWS, range(1), path)

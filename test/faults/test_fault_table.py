"""docs/faults.md names every row of the matrix with the tests that exist, at the levels that the matrix names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fault_table():
    """The script, as a module."""
    path = ROOT / "scripts" / "fault_table.py"
    spec = importlib.util.spec_from_file_location("fault_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_table"] = module
    spec.loader.exec_module(module)
    return module


def test_matrix_has_every_row_once(fault_table) -> None:
    rows = fault_table.read_rows()
    assert [row.number for row in rows] == list(range(1, 56))
    assert [row.number for row in rows if not row.level] == [51, 55]


def test_every_counted_row_has_a_test_at_every_level(fault_table) -> None:
    tests = fault_table.collect_tests()
    missing = [
        f"{row.number} ({level}): {row.fault}"
        for row in fault_table.read_rows()
        for level in row.level
        if not tests.get(row.number, {}).get(level)
    ]
    assert missing == []


def test_document_lists_the_rows_and_tests_that_exist(fault_table) -> None:
    """If this fails: python scripts/fault_table.py"""
    text = fault_table.DOCUMENT.read_text(encoding="utf-8")
    written = fault_table.table(fault_table.read_rows(), fault_table.collect_tests(), {})
    expected = fault_table.without_results(f"{fault_table.BEGIN}\n{written}\n{fault_table.END}")
    assert fault_table.without_results(text) == expected


def junit(path: Path, *cases: tuple[str, str]) -> Path:
    inner = "".join(f'<testcase name="{name}">{content}</testcase>' for name, content in cases)
    path.write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    return path


def test_row_passes_only_if_all_of_its_tests_did(fault_table, tmp_path: Path) -> None:
    row = fault_table.Row(20, "NaN", "hold", "UL")
    tests = {"U": ["test_fault_20_a"], "L": ["test_fault_20_b"]}

    def result(*cases: tuple[str, str]) -> str:
        return fault_table.row_result(row, tests, fault_table.read_results([junit(tmp_path / "a.xml", *cases)]))

    good = ("test_fault_20_a[nan]", "")
    assert result(good, ("test_fault_20_b", "")) == "passed"
    assert result(good, ("test_fault_20_b", "<skipped/>")) == "skipped"
    assert result(good, ("test_fault_20_a[inf]", "<failure/>"), ("test_fault_20_b", "")) == "failed"
    assert result(good) == "not run"
    assert fault_table.row_result(row, {"U": ["test_fault_20_a"]}, {}) == "no test at level L"
    assert fault_table.row_result(fault_table.Row(51, "x", "y", ""), {}, {}) == fault_table.NOT_APPLICABLE


def test_several_runs_are_merged(fault_table, tmp_path: Path) -> None:
    """A test that is skipped without a package and passes with it has passed."""
    first = junit(tmp_path / "a.xml", ("test_fault_41_a", "<skipped/>"), ("test_fault_42_a", ""))
    second = junit(tmp_path / "b.xml", ("test_fault_41_a", ""), ("test_fault_42_a", "<failure/>"))
    merged = fault_table.read_results([first, second])
    assert {name: outcome.result for name, outcome in merged.items()} == {
        "test_fault_41_a": "passed",
        "test_fault_42_a": "failed",
    }

"""The table of docs/faults.md: every row of the fault matrix, its tests, and what they gave.

    pytest test/faults -o junit_family=xunit1 --junitxml=out/faults.xml
    python scripts/fault_table.py out/faults.xml

Several result files (of runs with other packages installed) may be given; a test counts as passed if it passed in one
and failed in none. Without a file the rows and tests are renewed and the results stay. Exits with 1 if a counted row
does not pass.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "test" / "faults"
DOCUMENT = ROOT / "docs" / "faults.md"
LEVEL_FOLDERS = {"U": "units", "L": "topics", "launch": "launch"}
BEGIN, END = "<!-- table: written by scripts/fault_table.py -->", "<!-- end of table -->"
PREFIX = "test_fault_"
NOT_APPLICABLE = "not applicable"
SEVERITY = ("failed", "passed", "skipped")
"""Of the same test in several runs the first of these counts."""


@dataclass(frozen=True)
class Row:
    """One row of the matrix; ``level`` has the letters U and L, or is empty where the row is not counted."""

    number: int
    fault: str
    expected: str
    level: str


@dataclass
class Outcome:
    """What a test gave: worst of its parameter sets, and the largest value of every property."""

    result: str
    values: dict[str, float] = field(default_factory=dict)


def read_rows() -> list[Row]:
    """The matrix."""
    data = yaml.safe_load((SUITE / "matrix.yaml").read_text(encoding="utf-8"))
    return [Row(**entry) for entry in data["rows"]]


def collect_tests() -> dict[int, dict[str, list[str]]]:
    """Row number -> level -> names of its tests, read from the sources."""
    found: dict[int, dict[str, list[str]]] = {}
    for level, folder in LEVEL_FOLDERS.items():
        for path in sorted((SUITE / folder).glob("test_*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name.startswith(PREFIX):
                    number = int(node.name[len(PREFIX) :].split("_")[0])
                    found.setdefault(number, {}).setdefault(level, []).append(node.name)
    return found


def read_results(files: Iterable[Path]) -> dict[str, Outcome]:
    """Test name without parameters -> outcome."""
    merged: dict[str, Outcome] = {}
    for file in files:
        for name, outcome in _one_run(file).items():
            known = merged.get(name)
            if known is None:
                merged[name] = outcome
                continue
            known.result = min(known.result, outcome.result, key=SEVERITY.index)
            for key, value in outcome.values.items():
                known.values[key] = max(value, known.values.get(key, value))
    return merged


def _one_run(file: Path) -> dict[str, Outcome]:
    """Within one run the worst parameter set counts, a skipped one included."""
    order = ("failed", "skipped", "passed")
    run: dict[str, Outcome] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        if not name.startswith(PREFIX):
            continue
        tags = {child.tag for child in case}
        result = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcome = run.setdefault(name, Outcome("passed"))
        outcome.result = min(outcome.result, result, key=order.index)
        for entry in case.iter("property"):
            key, value = entry.get("name", ""), float(entry.get("value", "nan"))
            outcome.values[key] = max(value, outcome.values.get(key, value))
    return run


def row_result(row: Row, tests: Mapping[str, Sequence[str]], results: Mapping[str, Outcome]) -> str:
    """``passed`` only if every level has a test and every test of those levels passed; a skip is no pass."""
    if not row.level:
        return NOT_APPLICABLE
    missing = [level for level in row.level if not tests.get(level)]
    if missing:
        return f"no test at level {missing[0]}"
    outcomes = [results.get(name, Outcome("not run")).result for level in ("U", "L") for name in tests.get(level, ())]
    return next((outcome for outcome in ("failed", "not run", "skipped") if outcome in outcomes), "passed")


def table(rows: Sequence[Row], tests: Mapping[int, Mapping[str, Sequence[str]]], results: Mapping[int, str]) -> str:
    """The table as Markdown."""
    lines = ["| # | fault | expected | level | tests | result |", "|---|---|---|---|---|---|"]
    for row in rows:
        names = [
            f"{level}: {', '.join(f'`{name[len(PREFIX) + 3 :]}`' for name in tests[row.number][level])}"
            for level in LEVEL_FOLDERS
            if tests.get(row.number, {}).get(level)
        ]
        level = " + ".join(row.level) or "-"
        result = results.get(row.number, "not run") if row.level else NOT_APPLICABLE
        cells = (row.number, row.fault, row.expected, level, "<br>".join(names) or "-", result)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def times(rows: Sequence[Row], tests: Mapping[int, Mapping[str, Sequence[str]]], results: Mapping[str, Outcome]) -> str:
    """Time from the fault to the hold, where a row has a bound."""
    lines = [
        "| # | fault | bound, s | exact, injected clock, worst phase, s | measured in processes, s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = {
            level: [results[name].values for name in tests.get(row.number, {}).get(level, ()) if name in results]
            for level in ("U", "L")
        }
        bounds = [values["bound_s"] for level in found.values() for values in level if "bound_s" in values]
        if not bounds:
            continue
        cells = [
            max((values["fault_to_hold_s"] for values in found[level] if "fault_to_hold_s" in values), default=None)
            for level in ("U", "L")
        ]
        shown = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"| {row.number} | {row.fault} | {max(bounds):.3f} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def document_results(text: str) -> dict[int, str]:
    """The result column of the table in the document."""
    cells = [line.strip("| ").split(" | ") for line in _between(text).splitlines() if line.startswith("| ")]
    return {int(row[0]): row[-1] for row in cells if len(row) == 6 and row[0].isdigit()}


def without_results(text: str) -> list[str]:
    """Every line of the document's table without its result."""
    lines = [line for line in _between(text).splitlines() if line.startswith("| ") and line.count(" | ") == 5]
    return [line.rpartition(" | ")[0] for line in lines]


def _between(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Write the document's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="junit XML files of pytest test/faults")
    files = parser.parse_args().results
    rows, tests = read_rows(), collect_tests()
    text = DOCUMENT.read_text(encoding="utf-8")
    outcomes = read_results(files)
    by_row = {row.number: row_result(row, tests.get(row.number, {}), outcomes) for row in rows}
    if not files:
        by_row = document_results(text)
    counted = [row.number for row in rows if row.level]
    passed = sum(by_row.get(number) == "passed" for number in counted)
    inside = f"\n\n**{passed} of {len(counted)} rows pass.**\n\n{table(rows, tests, by_row)}\n\n"
    if files:
        inside += f"### From the fault to the hold\n{times(rows, tests, outcomes)}\n\n"
    else:
        inside += _between(text).partition("### From")[1] + _between(text).partition("### From")[2]
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + inside.rstrip() + "\n\n" + END + rest.partition(END)[2], encoding="utf-8")
    for number in counted:
        if by_row.get(number) != "passed":
            print(f"row {number}: {by_row.get(number, 'not run')}")
    print(f"{passed} of {len(counted)} rows pass")
    sys.exit(passed != len(counted))


if __name__ == "__main__":
    main()

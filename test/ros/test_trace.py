"""The trace: what is written comes back, disks fail without anybody waiting, and damaged files are said clearly."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omega_qvla_core.errors import RecordingError
from omega_qvla_ros import trace_view
from omega_qvla_ros.trace import ChunkRecord, ChunkTrace, TraceHeader, read_trace, rows

HEADER = TraceHeader("toy", ("shoulder", "finger"), "toy", "none", ("finger", "shoulder"), 0.05, 0.05)


def record(number: int, **changes: object) -> ChunkRecord:
    values = {
        "time_ns": 1_000_000_000 * number + 20_000_000,
        "sequence": number,
        "epoch": 0,
        "task": 1,
        "instruction": "touch the red cube",
        "observation_ns": 1_000_000_000 * number,
        "image_stamps_ns": {"front": 1_000_000_000 * number},
        "positions": (0.1, 0.02),
        "noise_seed": 7,
        "latency_s": 0.01 * number,
        "age_s": 0.02,
        "outcome": "placed",
        "actions": rows(np.full((4, 2), 0.1 * number)),
    }
    return ChunkRecord(**{**values, **changes})


def written(path: Path, *records: ChunkRecord) -> Path:
    trace = ChunkTrace(path, HEADER)
    for one in records:
        trace.write(one)
    trace.close()
    assert trace.error is None and trace.written == len(records) and trace.dropped == 0
    return trace.path


def test_records_come_back_bit_for_bit(tmp_path: Path) -> None:
    actions = np.random.default_rng(0).standard_normal((16, 2))
    sent = [record(1, actions=rows(actions)), record(2, outcome="rejected", reason="jump of 'finger'", clamped=3)]
    back = read_trace(written(tmp_path / "run.jsonl", *sent))
    assert back.header == HEADER and list(back.records) == sent and back.cut_lines == 0
    np.testing.assert_array_equal(back.records[0].chunk(), actions)


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    bad = record(1, outcome="rejected", reason="not finite", actions=((np.nan, 1.0), (np.inf, 2.0)))
    path = written(tmp_path / "run.jsonl", bad)
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    np.testing.assert_array_equal(read_trace(path).records[0].chunk(), [[np.nan, 1.0], [np.nan, 2.0]])


def test_a_failed_inference_has_no_actions(tmp_path: Path) -> None:
    failed = record(1, outcome="failed", reason="RuntimeError: no", actions=())
    assert read_trace(written(tmp_path / "run.jsonl", failed)).records == (failed,)


def test_a_trace_that_exists_is_kept(tmp_path: Path) -> None:
    first = written(tmp_path / "run.jsonl", record(1))
    second = written(tmp_path / "run.jsonl", record(2))
    assert second == tmp_path / "run_1.jsonl" and read_trace(first).records[0].sequence == 1
    with pytest.raises(RecordingError, match="cannot be made"):
        ChunkTrace(Path("/dev/null/run.jsonl"), HEADER)


def test_it_ends_at_its_largest_size_and_says_so(tmp_path: Path) -> None:
    trace = ChunkTrace(tmp_path / "run.jsonl", HEADER, max_bytes=1500)
    for number in range(20):
        trace.write(record(number))
    trace.close()
    assert trace.error is not None and "largest size" in trace.error
    assert 0 < trace.written < 20 and trace.written + trace.dropped >= 19
    assert trace.path.stat().st_size <= 1500
    assert len(read_trace(trace.path).records) == trace.written


FULL = """
import resource, sys
from pathlib import Path
from test_trace import HEADER, record
from omega_qvla_ros.trace import ChunkTrace
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
trace = ChunkTrace(Path(sys.argv[1]), HEADER)
for number in range(50):
    trace.write(record(number))
trace.close()
trace.write(record(99))
print(trace.error, trace.written, trace.dropped)
"""


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    path = tmp_path / "run.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"the trace {path} ends after ")
    back = read_trace(path)
    assert len(back.records) >= 2 and back.cut_lines == 1


def test_cut_and_foreign_files_are_said(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", record(1), record(2))
    text = path.read_text()
    path.write_text(text[:-30])
    cut = read_trace(path)
    assert [one.sequence for one in cut.records] == [1] and cut.cut_lines == 1
    for damage, message in {
        "": "is empty",
        "hello\n": "run.jsonl:1 is not JSON",
        "[]\n": "run.jsonl:1 is no JSON object",
        '{"format": "other"}\n': "is not a trace of the format",
        "no line end": "no whole line",
    }.items():
        path.write_text(damage)
        with pytest.raises(RecordingError, match=message):
            read_trace(path)
    lines = text.splitlines()
    second = json.loads(lines[1])
    for change, message in {
        "outcme": "unknown key 'outcme'; did you mean 'outcome'",
        "actions": "no rows of numbers",
        "image_stamps_ns": "must map camera keys",
        "outcome": "must be one of placed, dropped",
    }.items():
        path.write_text("\n".join([lines[0], json.dumps({**second, change: "x"}), ""]))
        with pytest.raises(RecordingError, match=message):
            read_trace(path)
    with pytest.raises(RecordingError, match="does not exist; .*trace_file"):
        read_trace(tmp_path / "gone")


def test_figures_and_picture_of_a_run(tmp_path: Path) -> None:
    records = [record(k) for k in range(1, 5)]
    records.append(record(5, outcome="dropped", reason="late", actions=()))
    records.append(replace(record(6), outcome="rejected", reason="jump", instruction="lift the green cube"))
    trace = read_trace(written(tmp_path / "run.jsonl", *records))
    summary = trace_view.summarise(trace)
    assert summary.outcomes == {"placed": 4, "dropped": 1, "rejected": 1}
    assert summary.reasons == {"late": 1, "jump": 1} and summary.duration_s == pytest.approx(5.0)
    assert summary.latency_ms[0] == pytest.approx(35.0) and summary.age_ms == pytest.approx((20.0, 20.0, 20.0))
    assert dict(trace_view.rows(summary))["told: lift the green cube"] == "1"
    trace_view.plot(trace, tmp_path / "out" / "run.png")
    assert (tmp_path / "out" / "run.png").read_bytes().startswith(b"\x89PNG")
    empty = read_trace(written(tmp_path / "empty.jsonl"))
    assert trace_view.summarise(empty).outcomes == {}
    trace_view.plot(empty, tmp_path / "empty.png")

"""A comparison as a plain table; the commands and machines without a rich terminal print the same lines."""

from __future__ import annotations

from omega_qvla_core.evaluate.bench_compare import Comparison, Row
from omega_qvla_core.evaluate.bench_rows import STAGES


def table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table: p50 / p95 per stage in ms, and what is known besides."""
    head = [
        "precision",
        "runtime",
        *(f"{stage} ms" for stage in STAGES),
        "floor ms",
        "share",
        "calls",
        "peak MB",
        "diff",
    ]
    return head, [_line(row) for row in found.rows]


def title(found: Comparison) -> str:
    """What was run where."""
    one, peaks = found.options, found.peaks
    size = "" if one.model == "tabletop" else f" {one.size}"
    clock = ", processor time" if one.cpu_time else ""
    threads = f", {peaks.threads} threads" if one.device == "cpu" else ""
    return (
        f"{one.model}{size}, cameras/text/chunk/steps {one.shape}, {one.samples} samples after {one.warm_ups}{clock}; "
        f"{peaks.device}{threads}: {peaks.plain / 1e9:.0f} G/s {one.unquantized}, "
        f"{peaks.integer / 1e9:.0f} G/s integer, {peaks.bandwidth / 1e9:.1f} GB/s, as measured in this run"
    )


def text(found: Comparison) -> str:
    """Title, table, and the ratios that tell fusion from bits."""
    head, lines = table(found)
    widths = [max(len(line[index]) for line in (head, *lines)) for index in range(len(head))]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *lines)]
    return "\n".join((title(found), *shown, *ratio_lines(found), *reason_lines(found)))


def ratio_lines(found: Comparison) -> list[str]:
    """One line per ratio of p50 of the whole chunk."""
    return [f"{name}: {ratio:.2f}" for name, ratio in found.ratios().items()]


def reason_lines(found: Comparison) -> list[str]:
    """Why rows are empty."""
    return [f"{row.precision} {row.runtime} was not run: {row.reason}" for row in found.rows if row.reason]


def _line(row: Row) -> list[str]:
    stages = [_stage(row, stage) for stage in STAGES]
    floor = row.floor_ms.get("chunk")
    chunk = row.stages.get("chunk")
    share = "" if floor is None or chunk is None else f"{floor / chunk.p50_ms:.0%}"
    return [
        row.precision,
        row.runtime,
        *stages,
        "" if floor is None else f"{floor:.2f}",
        share,
        "" if row.operators is None else str(row.operators),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        "" if row.difference is None else f"{row.difference:.0e}",
    ]


def _stage(row: Row, stage: str) -> str:
    one = row.stages.get(stage)
    return "" if one is None else f"{one.p50_ms:.2f} / {one.p95_ms:.2f}"

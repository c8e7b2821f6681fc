"""Write a report into a folder: ``report.json``, ``report.md`` and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla_core.quant.auto import CHOSEN_FIELDS
from omega_qvla_core.quant.plots import draw_plots
from omega_qvla_core.strict_json import write_json

if TYPE_CHECKING:
    from omega_qvla_core.quant.report import QuantReport, SiteReport


def write_report(report: QuantReport, folder: str | Path) -> list[Path]:
    """Write everything.

    Args:
        report: From ``quantize_policy`` or ``report``.
        folder: Made if it does not exist. Files of the same names are replaced.

    Returns:
        The paths: ``report.json``, ``report.md``, then the pictures (none if nothing is quantized).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_plots(report, folder) if report.sites else []
    write_json(folder / "report.json", _without_nan(report.to_json()))
    (folder / "report.md").write_text(_markdown(report, pictures), encoding="utf-8")
    return [folder / "report.json", folder / "report.md", *pictures]


def _markdown(report: QuantReport, pictures: list[Path]) -> str:
    parts = [report.to_markdown(), _per_step(report), _parts(report), _decisions(report)]
    parts.append("\n".join(f"![{path.stem}]({path.name})" for path in pictures))
    return "\n".join(part for part in parts if part) + "\n"


def _per_step(report: QuantReport) -> str:
    steps = max((len(site.per_step) for site in report.sites), default=0)
    if steps < 2:
        return ""
    lines = ["", "Error per denoise step:", "", f"| site | {' | '.join(map(str, range(steps)))} |"]
    lines.append("|---|" + "---|" * steps)
    for site in report.sites:
        if len(site.per_step) > 1:
            cells = [f"{error:.4f}" for error in site.per_step]
            lines.append(f"| {site.name} | {' | '.join(cells + [''] * (steps - len(cells)))} |")
    return "\n".join(lines) + "\n"


def _parts(report: QuantReport) -> str:
    totals: dict[str, int] = {}
    for site in report.sites:
        for part, size in site.bytes.items():
            totals[part] = totals.get(part, 0) + size
    lines = ["", "Bytes of the quantized linears per part:", "", "| part | bytes |", "|---|---|"]
    return "\n".join([*lines, *(f"| {part} | {size} |" for part, size in sorted(totals.items()))]) + "\n"


def _decisions(report: QuantReport) -> str:
    decided = [site for site in report.sites if site.decision]
    if not decided:
        return ""
    header = ["site", *CHOSEN_FIELDS, "held-out error", "of the starting recipe", "tried"]
    lines = ["", "Decisions of the automatic choice:", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(_decision(site) for site in decided)]) + "\n"


def _decision(site: SiteReport) -> str:
    taken, start = site.decision["taken"], site.decision["start"]
    chosen = [str(taken[name]) for name in CHOSEN_FIELDS]
    errors = [f"{taken['error']:.4f}", f"{start['error']:.4f}", str(len(site.decision["tried"]))]
    return f"| {' | '.join([site.name, *chosen, *errors])} |"


def _without_nan(value: object) -> object:
    """JSON has no NaN: what is not known becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value

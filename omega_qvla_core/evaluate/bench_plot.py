"""A comparison as a picture, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.evaluate.bench_compare import Comparison
from omega_qvla_core.evaluate.bench_text import title

_PARTS = ("vision", "prefix", "denoise")
_COLORS = ("#4c78a8", "#f58518", "#54a24b")
_DPI = 120


def draw(found: Comparison, path: Path) -> None:
    """Stacked bars of the stages' p50 per row, with the roofline's floor as a mark.

    Raises:
        ConfigError: No row has figures.
    """
    # Figures without pyplot need no display and keep no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if row.stages]
    if not rows:
        raise ConfigError("no row has figures to draw")
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = [f"{row.precision} {row.runtime}" for row in rows]
    left = [0.0] * len(rows)
    for stage, color in zip(_PARTS, _COLORS):
        widths = [row.stages[stage].p50_ms if stage in row.stages else 0.0 for row in rows]
        axis.barh(names, widths, left=left, color=color, label=stage)
        left = [start + width for start, width in zip(left, widths)]
    axis.plot([row.stages["chunk"].p50_ms for row in rows], names, "k|", markersize=14, label="whole chunk")
    axis.plot([row.floor_ms["chunk"] for row in rows], names, "r|", markersize=14, label="floor by roofline")
    axis.invert_yaxis()
    axis.set_xlabel("ms, p50")
    axis.set_title(title(found).partition(";")[0], fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)

"""Pictures of a report, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from omega_qvla_core.quant.report import QuantReport

_DPI = 110
_ROW_INCHES = 0.16
_LARGEST_INCHES = 60.0
_LONGEST_NAME = 46

# Energies of dead channels are drawn here: a logarithmic axis has no zero.
_LOWEST_ENERGY = 1e-6


def draw_plots(report: QuantReport, folder: Path) -> list[Path]:
    """Write ``errors.png``, ``bytes.png`` and, for a fresh report, ``channel_energies.png`` and
    ``activation_ranges.png`` (a report of a loaded pack has no profiles).

    Args:
        report: The report; it has at least one site.
        folder: Exists.

    Returns:
        The paths written.
    """
    errors = {site.name: site.per_step for site in report.sites}
    pictures = {
        "errors": lambda: _heat_map(errors, "relative output error on the calibration sample", "{:.3f}"),
        "bytes": lambda: _bytes(report),
    }
    if report.profiles:
        ranges = {name: _over_mean(profile.q999) for name, profile in report.profiles.items()}
        pictures["channel_energies"] = lambda: _energies(report)
        pictures["activation_ranges"] = lambda: _heat_map(
            ranges, "99.9th percentile of |activation| after the transform, by its mean over the steps", "{:.2f}"
        )
    paths = []
    for name, draw in pictures.items():
        figure = draw()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI)
    return paths


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    # Figures without pyplot need no display and keep no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, min(height, _LARGEST_INCHES)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _heat_map(values: dict[str, tuple[float, ...]], title: str, form: str) -> Any:
    """Rows are sites, columns denoise steps; a site outside the loop has one value, drawn over all columns."""
    columns = max(len(row) for row in values.values())
    grid = np.array(
        [np.resize(row, columns) if len(row) in (1, columns) else _padded(row, columns) for row in values.values()]
    )
    figure, axes = _figure(5 + 0.7 * columns, 1.5 + _ROW_INCHES * len(values))
    axis = axes[0][0]
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(values)), [_short(name) for name in values], fontsize=6)
    axis.set_xticks(range(columns), range(columns))
    axis.set_xlabel("denoise step")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axis, format=lambda value, _: form.format(value))
    return figure


def _padded(row: tuple[float, ...], columns: int) -> np.ndarray:
    return np.array([*row, *[np.nan] * (columns - len(row))])


def _energies(report: QuantReport) -> Any:
    figure, axes = _figure(10, 4, 1, 2)
    for axis, kind in zip(axes[0], ("activations", "weights")):
        for when, colour in (("before", "tab:red"), ("after", "tab:blue")):
            curves = np.array([getattr(profile, f"{kind}_{when}") for profile in report.profiles.values()])
            curves = np.maximum(curves, _LOWEST_ENERGY)
            share = np.linspace(0, 1, curves.shape[1])
            axis.plot(share, curves.T, color=colour, alpha=0.15, linewidth=0.6)
            axis.plot(share, np.exp(np.log(curves).mean(axis=0)), color=colour, label=f"{when} (geometric mean)")
        axis.set_yscale("log")
        axis.set_xlabel("channels, strongest first")
        axis.set_ylabel("energy / mean energy")
        axis.set_title(f"{kind}, one thin line per site", fontsize=9)
        axis.legend(fontsize=7)
    return figure


def _bytes(report: QuantReport) -> Any:
    sides = sorted({site.side for site in report.sites})
    parts = sorted({part for site in report.sites for part in site.bytes})
    figure, axes = _figure(7, 1.5 + 0.7 * len(sides))
    axis = axes[0][0]
    left = np.zeros(len(sides))
    for part in parts:
        stored = [sum(site.bytes.get(part, 0) for site in report.sites if site.side == side) / 1e6 for side in sides]
        axis.barh(sides, stored, left=left, label=part)
        left += stored
    in_float16 = [sum(site.fp16_bytes for site in report.sites if site.side == side) / 1e6 for side in sides]
    axis.scatter(in_float16, sides, marker="|", s=400, color="black", label="float16 weights")
    axis.set_xlabel("MB")
    axis.legend(fontsize=7, markerscale=0.4)
    return figure


def _over_mean(values: tuple[float, ...]) -> tuple[float, ...]:
    mean = sum(values) / len(values)
    return tuple(value / mean if mean else 1.0 for value in values)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "..." + name[-_LONGEST_NAME:]

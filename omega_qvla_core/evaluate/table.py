"""Success tables: by task and stage, with Wilson intervals and a paired test against the first row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla_core.evaluate.rollout import EpisodeResult
from omega_qvla_core.evaluate.statistics import mcnemar, wilson_interval


@dataclass(frozen=True)
class Rate:
    """Successes of trials with their 95 % Wilson interval, all rates in [0, 1]."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """Success rate."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson_interval(self.successes, self.trials)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


OVERALL = "all"
"""Key of the test over all kinds together."""


@dataclass(frozen=True)
class RowSummary:
    """One row of a success table.

    ``p_values``: paired McNemar tests against the reference row, by kind and for ``OVERALL``; None for that row itself.
    """

    name: str
    by_kind: dict[str, Rate]
    overall: Rate
    wrong_colour: Rate
    stages: dict[str, Counter[str]]
    mean_steps: float
    p_values: dict[str, float] | None


def summarise(results: Sequence[EpisodeResult], reference: str | None = None) -> list[RowSummary]:
    """Summarise results row by row, in order of first appearance.

    Args:
        results: Episodes; every row must hold the same (kind, seed) pairs.
        reference: Row that the others are paired with; the first row if None.

    Raises:
        ValueError: A row holds other episodes than the reference, so that pairing would be wrong.
    """
    rows = list(dict.fromkeys(result.row for result in results))
    grouped = {row: {(r.kind, r.seed): r for r in results if r.row == row} for row in rows}
    reference = reference or rows[0]
    summaries = []
    for row in rows:
        episodes = grouped[row]
        if episodes.keys() != grouped[reference].keys():
            raise ValueError(f"row {row} holds other episodes than {reference}: a paired test needs the same seeds")
        p_values = None if row == reference else _paired(episodes, grouped[reference])
        summaries.append(_summarise_row(row, list(episodes.values()), p_values))
    return summaries


def _paired(
    ours: dict[tuple[str, int], EpisodeResult], theirs: dict[tuple[str, int], EpisodeResult]
) -> dict[str, float]:
    """McNemar p-values over all episodes and per kind of task."""
    keys = sorted(ours)
    groups = {OVERALL: keys} | {kind: [k for k in keys if k[0] == kind] for kind in dict.fromkeys(k[0] for k in keys)}
    return {
        name: mcnemar([ours[k].success for k in group], [theirs[k].success for k in group])
        for name, group in groups.items()
    }


def _rate(flags: Sequence[bool]) -> Rate:
    return Rate(sum(flags), len(flags))


def _summarise_row(name: str, episodes: Sequence[EpisodeResult], p_values: dict[str, float] | None) -> RowSummary:
    kinds = list(dict.fromkeys(e.kind for e in episodes))
    finished = [e.steps for e in episodes if e.success]
    return RowSummary(
        name=name,
        by_kind={kind: _rate([e.success for e in episodes if e.kind == kind]) for kind in kinds},
        overall=_rate([e.success for e in episodes]),
        wrong_colour=_rate([e.wrong_colour for e in episodes]),
        stages={kind: Counter(e.stage for e in episodes if e.kind == kind) for kind in kinds},
        mean_steps=sum(finished) / len(finished) if finished else float("nan"),
        p_values=p_values,
    )


def markdown_table(summaries: Sequence[RowSummary], extra: dict[str, dict[str, str]] | None = None) -> str:
    """Render summaries as a markdown table.

    Args:
        summaries: Rows.
        extra: Further columns, ``{column: {row name: text}}``.
    """
    extra = extra or {}
    kinds = list(summaries[0].by_kind)
    header = ["policy", *kinds, "all", "wrong colour", "mean steps", "p (McNemar)", *extra]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in summaries:
        cells = [f"`{row.name}`", *(str(row.by_kind[kind]) for kind in kinds), str(row.overall)]
        cells += [str(row.wrong_colour), f"{row.mean_steps:.0f}", _p_text(row, OVERALL)]
        cells += [column.get(row.name, "–") for column in extra.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _p_text(row: RowSummary, group: str) -> str:
    return "–" if row.p_values is None else f"{row.p_values[group]:.3g}"


def stage_table(summaries: Sequence[RowSummary]) -> str:
    """Render, per row and task kind, the paired test and how many episodes ended at which stage."""
    lines = ["| policy | task | p (McNemar) | furthest stage reached (episodes) |", "|---|---|---|---|"]
    for row in summaries:
        for kind, counts in row.stages.items():
            reached = ", ".join(f"{stage} {count}" for stage, count in counts.most_common())
            lines.append(f"| `{row.name}` | {kind} | {_p_text(row, kind)} | {reached} |")
    return "\n".join(lines)

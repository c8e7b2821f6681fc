"""Success tables pair rows by seed and count what happened."""

import pytest

from omega_qvla_core.evaluate.rollout import EpisodeResult
from omega_qvla_core.evaluate.table import markdown_table, stage_table, summarise


def episode(row, kind, seed, success, stage="placed", wrong=False):
    return EpisodeResult(row, kind, "red", seed, "touch the red cube", success, stage, wrong, 40)


def test_summary_counts_by_kind_and_pairs_with_the_first_row():
    results = [episode("fp32", "touch", s, True) for s in range(10)]
    results += [
        episode("w4a4", "touch", s, s >= 6, stage="none" if s < 6 else "touched", wrong=s == 0) for s in range(10)
    ]
    reference, quantized = summarise(results)
    assert reference.p_values is None
    assert reference.overall.successes == 10
    assert quantized.by_kind["touch"].successes == 4
    assert quantized.wrong_colour.successes == 1
    assert quantized.p_values == pytest.approx({"all": 0.03125, "touch": 0.03125})
    table = markdown_table([reference, quantized], extra={"bytes": {"w4a4": "1 MB"}})
    assert "| `w4a4` | 40.0 % [16.8, 68.7] |" in table
    assert table.splitlines()[-1].endswith("| 1 MB |")
    assert "none 6, touched 4" in stage_table([reference, quantized])


def test_rows_with_other_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds"):
        summarise([episode("a", "touch", 1, True), episode("b", "touch", 2, True)])

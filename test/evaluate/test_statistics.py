"""Wilson intervals and the McNemar test against published values and by their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla_core.evaluate.statistics import mcnemar, wilson_interval


def test_wilson_matches_the_textbook_example():
    # 8 of 10: 0.4902 .. 0.9433 (Agresti & Coull 1998, "score" interval).
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_rate_and_stays_in_the_unit_interval(case):
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(successes, trials)


def test_mcnemar_counts_discordant_pairs_only():
    agree = [True] * 50
    assert mcnemar(agree, agree) == 1.0
    # 0 against 6 discordant pairs: 2 * (1/2)^6 = 0.03125.
    assert mcnemar([True] * 6 + agree, [False] * 6 + agree) == pytest.approx(0.03125)
    assert mcnemar([True, False], [False, True]) == 1.0


def test_mcnemar_refuses_unpaired_sequences():
    with pytest.raises(ValueError, match="same seeds"):
        mcnemar([True], [True, False])

"""Normalization statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.normalization import AxisStats, NormStats

KINDS = ("quantile", "min_max", "mean_std")


def make_stats(kind: str = "min_max", horizon: int = 3) -> NormStats:
    rng = np.random.default_rng(0)
    return NormStats(
        AxisStats.from_samples(kind, rng.normal(size=(200, 4))),
        AxisStats.from_samples(kind, rng.normal(size=(200, horizon, 2)) * np.array([1.0, 0.01])),
    )


@pytest.mark.parametrize("kind", KINDS)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4))
def test_both_directions_are_inverse(kind, values):
    stats = make_stats(kind).state
    np.testing.assert_allclose(stats.unnormalize(stats.normalize(np.array(values))), values, rtol=1e-12, atol=1e-9)


def test_each_kind_maps_its_two_values_where_it_should():
    samples = np.linspace(0.0, 10.0, 1001)[:, None]
    min_max = AxisStats.from_samples("min_max", samples)
    np.testing.assert_allclose(min_max.normalize(np.array([[0.0], [5.0], [10.0]])), [[-1], [0], [1]])
    quantile = AxisStats.from_samples("quantile", samples)
    np.testing.assert_allclose(quantile.normalize(np.array([[0.1], [9.9], [10.0]])), [[-1], [1], [1 + 0.1 / 4.9]])
    mean_std = AxisStats.from_samples("mean_std", samples)
    np.testing.assert_allclose(mean_std.normalize(np.array([5.0 + samples.std()])), [1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_actions_have_a_scale_per_step_and_dimension(kind):
    stats = make_stats(kind)
    assert stats.actions.shape == (3, 2)
    assert (stats.actions.scale[:, 0] > 20 * stats.actions.scale[:, 1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_json_is_exact(kind):
    stats = make_stats(kind)
    again = NormStats.from_json(json.loads(json.dumps(stats.to_json())))
    for name in ("state", "actions"):
        one, other = getattr(stats, name), getattr(again, name)
        assert one.kind == other.kind
        np.testing.assert_array_equal(one.first, other.first)
        np.testing.assert_array_equal(one.second, other.second)


def test_masked_samples_are_left_out():
    samples = np.array([[[0.0], [1.0]], [[2.0], [np.nan]], [[4.0], [3.0]]])
    stats = AxisStats.from_samples("min_max", samples)
    np.testing.assert_array_equal(stats.first, [[0.0], [1.0]])
    np.testing.assert_array_equal(stats.second, [[4.0], [3.0]])
    with pytest.raises(ConfigError, match="no samples"):
        AxisStats.from_samples("min_max", np.full((3, 2), np.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dimension_that_does_not_move_is_refused_or_widened(kind):
    samples = np.tile([[0.5, 0.0]], (10, 1)) + np.linspace(0, 1, 10)[:, None] * np.array([0.0, 1.0])
    with pytest.raises(ConfigError, match=r"state\[0\] is degenerate"):
        AxisStats.from_samples(kind, samples, where="state")
    widened = AxisStats.from_samples(kind, samples, min_scale=0.01)
    np.testing.assert_allclose(widened.scale[0], 0.01)
    np.testing.assert_allclose(widened.centre[0], 0.5)


def _changed(change) -> dict:
    data = make_stats().to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version is 2"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("actions"), "lacks the key 'actions'"),
        (lambda d: d["state"].update(kind="zscore"), "state.kind is 'zscore'; it must be one of quantile"),
        (lambda d: d["state"].update(kind="mean_std"), "unknown key 'min'; did you mean"),
        (lambda d: d["state"]["min"].pop(), "state.max has shape (4,); min has (3,)"),
        (lambda d: d["state"]["min"].__setitem__(2, float("nan")), "state.min[2] is not finite"),
        (lambda d: d["state"]["min"].__setitem__(1, "a"), "state.min is not an array of numbers"),
        (lambda d: d["state"]["min"].__setitem__(1, 10**400), "state.min is not an array of numbers"),
        (lambda d: d["actions"]["max"].__setitem__(1, d["actions"]["min"][1]), "actions[1][0] is degenerate"),
        (lambda d: d["state"].update(min=[], max=[]), "has shape (0,)"),
    ],
)
def test_bad_statistics_are_refused_by_name(change, message):
    with pytest.raises(ConfigError) as caught:
        NormStats.from_json(_changed(change))
    assert message in str(caught.value)


def test_swapped_limits_are_refused():
    stats = make_stats().state
    with pytest.raises(ConfigError, match="degenerate"):
        AxisStats("min_max", stats.second, stats.first)


def test_widths_are_checked_against_the_policy():
    stats = make_stats()
    stats.check(("a", "b", "c", "d"), ("a", "b"), 3)
    with pytest.raises(ConfigError, match=r"norm_stats.state is of width \(4,\); the policy has 3"):
        stats.check(("a", "b", "c"), ("a", "b"), 3)
    with pytest.raises(ConfigError, match=r"norm_stats.actions has shape \(3, 2\); the policy needs \(5, 2\)"):
        stats.check(("a", "b", "c", "d"), ("a", "b"), 5)

"""The ranges of seeds for different purposes never overlap."""

from __future__ import annotations

from itertools import combinations

from omega_qvla_core.envs.tabletop import seeds


def test_ranges_are_disjoint():
    for (name, first), (other, second) in combinations(seeds.ALL_RANGES.items(), 2):
        assert max(first.start, second.start) >= min(first.stop, second.stop), f"{name} overlaps {other}"


def test_every_range_is_registered():
    ranges = [value for value in vars(seeds).values() if isinstance(value, range)]
    assert sorted(ranges, key=lambda r: r.start) == sorted(seeds.ALL_RANGES.values(), key=lambda r: r.start)
    assert all(len(r) > 0 for r in ranges)

"""Percentiles and tick monitoring."""

from __future__ import annotations

import math

import pytest

from omega_qvla_ros.stats import Percentiles, TickMonitor

MS = 1_000_000


def test_percentiles_of_the_last_samples() -> None:
    p = Percentiles(size=100)
    assert math.isnan(p.get(50))
    for k in range(200):
        p.add(float(k))
    assert p.get(0) == 100.0 and p.get(50) == pytest.approx(149.5) and len(p.values()) == 100
    p.clear()
    assert math.isnan(p.get(95))


def test_rate_and_missed_ticks() -> None:
    monitor = TickMonitor(0.05)
    assert math.isnan(monitor.rate_hz)
    late = [monitor.tick(t * MS) for t in (0, 50, 100, 150, 350, 400)]
    assert late == [False, False, False, False, True, False]
    assert monitor.missed == 3
    assert monitor.rate_hz == pytest.approx(5 / 0.4)


def test_pause_on_purpose_and_clock_jump_are_not_missed_ticks() -> None:
    monitor = TickMonitor(0.05)
    monitor.tick(0)
    monitor.restart()
    assert not monitor.tick(10_000 * MS)
    assert not monitor.tick(1 * MS)
    assert monitor.missed == 0

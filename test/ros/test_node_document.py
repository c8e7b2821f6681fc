"""docs/node.md against the code: parameters, services, topics, diagnostic keys."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

from session_rig import Rig

from omega_qvla_ros.guard import GuardCounters
from omega_qvla_ros.nodes import diagnostics
from omega_qvla_ros.nodes.policy_parameters import POLICY_NODE

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "node.md").read_text(encoding="utf-8")


def test_every_parameter_is_in_the_table_with_its_default() -> None:
    expected = [f"| `{s.name}` | `{s.default!r}` | {s.when.value} | {s.description} |" for s in POLICY_NODE]
    section = TEXT[TEXT.index("## Parameters") : TEXT.index("## Diagnostics")]
    assert [line for line in section.splitlines() if line.startswith("| `")] == expected


def test_every_service_and_private_topic_of_the_sources_is_described() -> None:
    names = set()
    for path in (Path(diagnostics.__file__).parent).glob("*.py"):
        if path.stem in ("mujoco_bridge_node", "episode_runner_node", "recorder_node"):
            continue
        names |= set(re.findall(r'"(~/[a-z_/]+)"', path.read_text(encoding="utf-8")))
    assert {"~/enable", "~/e_stop", "~/status", "~/debug/image"} <= names
    for name in names | {"~/start", "~/stop", "~/restart", "~/reset_fault"}:
        assert f"`{name}`" in TEXT, name


def test_every_diagnostic_key_is_described() -> None:
    rig = Rig()
    rig.run(10)
    counters = rig.session.guard.counters
    for counter in (counters.clamped_position, counters.clamped_velocity, counters.clamped_acceleration):
        counter["shoulder"] += 1
    counters.rejected["jump"] = counters.rejected_joints["jump.shoulder"] = 1
    section = TEXT[TEXT.index("## Diagnostics") :]
    for key in [*diagnostics.session_values(rig.session, rig.now), *diagnostics.STATUS_KEYS]:
        words = re.sub(r"^(chunks_dropped|chunks_rejected)_\w+$", r"\1_<kind>", key).split(".")[0]
        percentile = re.sub(r"_(p95|p99)_ms$", r"_p50_ms", words)
        assert f"`{words}" in section or f"`{percentile}" in section, key
    rig.session.close()


def test_every_counter_of_the_guard_is_in_the_diagnostics() -> None:
    """By joint and kind: what was clamped, slowed down or refused."""
    rig = Rig()
    counters, numbers = rig.session.guard.counters, itertools.count(1001)
    for field in fields(GuardCounters):
        counter = getattr(counters, field.name)
        if isinstance(counter, Counter):
            counter["shoulder"] = next(numbers)
        else:
            setattr(counters, field.name, next(numbers))
    shown = diagnostics.session_values(rig.session, rig.now).values()
    assert set(range(1001, next(numbers))) <= {value for value in shown if isinstance(value, int)}
    rig.session.close()

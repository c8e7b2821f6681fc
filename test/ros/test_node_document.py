"""docs/node.md against the code: parameters, services, topics, diagnostic keys."""

from __future__ import annotations

import re
from pathlib import Path

from session_rig import Rig

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
    section = TEXT[TEXT.index("## Diagnostics") :]
    for key in [*diagnostics.session_values(rig.session, rig.now), *diagnostics.STATUS_KEYS]:
        words = re.sub(r"^(chunks_dropped|chunks_rejected)_\w+$", r"\1_<kind>", key).split(".")[0]
        percentile = re.sub(r"_(p95|p99)_ms$", r"_p50_ms", words)
        assert f"`{words}" in section or f"`{percentile}" in section, key
    rig.session.close()

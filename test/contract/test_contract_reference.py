"""docs/contract.md describes every field, as the classes have them."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import yaml

from omega_qvla_ros.contract import contract_from_dict

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_contract_reference.py"))
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    _, mark, written = page.partition(script["MARK"])
    assert mark + written == script["reference"](), "run scripts/write_contract_reference.py"


def test_the_example_on_the_page_is_a_contract() -> None:
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert contract_from_dict(yaml.safe_load(example)).joint_names == ("shoulder", "finger")


def test_every_key_is_read_by_something() -> None:
    """A key that nobody reads would promise what does not happen."""
    script = runpy.run_path(str(ROOT / "scripts" / "write_contract_reference.py"))
    package = ROOT / "omega_qvla_ros"
    declaring = {package / "contract" / name for name in ("schema.py", "checks.py")}
    text = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path not in declaring)
    read_by_checks = {"format_version"}
    # Limits are read by their names as texts (contract/joints.py).
    unread = [
        f"{title}: {field.name}"
        for title, cls in script["SECTIONS"]
        for field in dataclasses.fields(cls)
        if field.name not in read_by_checks and not re.search(rf'(\.|"){field.name}\b', text)
    ]
    assert not unread

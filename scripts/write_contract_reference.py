"""Writes the reference part of docs/contract.md from the contract's classes. A test runs it and compares.

python scripts/write_contract_reference.py
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from pathlib import Path

from omega_qvla_ros.contract import schema
from omega_qvla_ros.contract.joints import EndPoints, GripperMap, JointContract

PAGE = Path(__file__).resolve().parents[1] / "docs" / "contract.md"
MARK = "<!-- Written by scripts/write_contract_reference.py from the docstrings; do not edit below. -->"
SECTIONS = (
    ("top level", schema.RobotContract),
    ("cameras[]", schema.CameraContract),
    ("joints[]", JointContract),
    ("joints[].end_points", EndPoints),
    ("joints[].gripper", GripperMap),
    ("sensors", schema.SensorContract),
    ("sensors.joint_sources[]", schema.JointSourceContract),
    ("robot_description", schema.RobotDescriptionContract),
    ("checkpoint", schema.CheckpointContract),
    ("outputs[]", schema.OutputContract),
    ("limits", schema.LimitContract),
    ("chunk", schema.ChunkContract),
    ("safety", schema.SafetyContract),
)


def described(cls: type) -> tuple[str, dict[str, str]]:
    """Text and attribute texts of a Google-style docstring; every field has to be described."""
    text, _, attributes = (cls.__doc__ or "").partition("Attributes:")
    found: dict[str, str] = {}
    name = ""
    for line in attributes.splitlines():
        start = re.fullmatch(r" {8}(\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif line.strip():
            found[name] += " " + line.strip()
    fields = [field.name for field in dataclasses.fields(cls)]
    if list(found) != fields:
        raise SystemExit(f"{cls.__name__}: the docstring describes {list(found)}, the fields are {fields}")
    return " ".join(text.split()), found


def default(field: dataclasses.Field) -> str:
    """How the default is written in YAML."""
    if field.default_factory is not dataclasses.MISSING:
        return "as below"
    if field.default is dataclasses.MISSING:
        return "**required**"
    if field.default is None:
        return "not given"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        if field.default and dataclasses.is_dataclass(field.default[0]):
            return "as below"
        return f"`{list(field.default)}`"
    return f"`{field.default}`" if field.default != "" else '`""`'


def kind(hint: object) -> str:
    """A field's type for people."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(hint) is tuple:
        inner = kind(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} x {inner}"
    if arguments:
        return kind(next(argument for argument in arguments if argument is not type(None)))
    if dataclasses.is_dataclass(hint):
        return "mapping"
    return {float: "number", int: "integer", str: "text", bool: "`true`, `false`"}[hint]  # type: ignore[index]


def reference() -> str:
    """The part of the page below the mark."""
    lines = [MARK, ""]
    for title, cls in SECTIONS:
        text, attributes = described(cls)
        hints = typing.get_type_hints(cls)
        lines += [
            f"## {title}",
            "",
            text.replace("``", "`"),
            "",
            "| key | value | default | meaning |",
            "|---|---|---|---|",
        ]
        for field in dataclasses.fields(cls):
            meaning = attributes[field.name].replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind(hints[field.name])} | {default(field)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.partition(MARK)[0] + reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

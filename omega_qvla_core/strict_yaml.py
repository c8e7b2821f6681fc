"""YAML files of ours, strictly: no key twice, no aliases, bounded, and at most one file that another one builds on."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from omega_qvla_core.errors import ConfigError

MAX_YAML_BYTES = 1024 * 1024
BASE_KEY = "base"


class _StrictLoader(yaml.SafeLoader):
    """YAML without two traps: a key that occurs twice (the last one would win), and aliases (a small file would grow
    without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read; write it out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                text = f"the key {key.value!r} occurs twice; remove one"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    A file may say ``base: other.yaml``: a file of the same folder, whose top-level keys are taken where this file has
    none of that name. The base may have no base of its own.

    Args:
        path: The file.
        what: What it should be, for messages ("robot contract").

    Raises:
        ConfigError: The file or its base is missing, too large, no YAML, or no mapping; the message names it.
    """
    data = _read(path, what)
    if BASE_KEY not in data:
        return data
    name = data.pop(BASE_KEY)
    if not isinstance(name, str) or Path(name).name != name:
        raise ConfigError(f"{path}: base is {name!r}; give the name of a file in the same folder")
    base = _read(path.with_name(name), f"{what} (the base of {path.name})")
    if BASE_KEY in base:
        raise ConfigError(f"{path}: its base {name} has a base itself; write out one of them")
    return {**base, **data}


def _read(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"the {what} {path} does not exist; give a YAML file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path} has more than {MAX_YAML_BYTES} bytes; is it a {what}?")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping, found {type(data).__name__}")
    return data

"""Contract files: YAML in, a checked ``RobotContract`` out."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import yaml

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.strict_json import dataclass_from_json
from omega_qvla_ros.contract.checks import check_contract, with_all_joints
from omega_qvla_ros.contract.schema import RobotContract

MAX_CONTRACT_BYTES = 1024 * 1024


class _StrictLoader(yaml.SafeLoader):
    """YAML without two traps: a key that occurs twice (the last one would win), and aliases (a small file would grow
    without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not read; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value]
        for key_node, _ in node.value:
            if keys.count(key_node.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} occurs twice; remove one", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_contract(path: Path | str) -> RobotContract:
    """Read and check a contract.

    Args:
        path: YAML file.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (with the nearest valid name), missing or there
            twice, or a value is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"the robot contract {path} does not exist; set the parameter 'contract' to a YAML file")
    if path.stat().st_size > MAX_CONTRACT_BYTES:
        raise ConfigError(f"{path} has more than {MAX_CONTRACT_BYTES} bytes; is it a robot contract?")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return contract_from_dict(data, str(path))


def contract_from_dict(data: object, where: str = "contract") -> RobotContract:
    """Build a contract from a decoded YAML mapping; ``where`` names it in messages.

    Raises:
        ConfigError: See ``load_contract``.
    """
    contract = with_all_joints(dataclass_from_json(RobotContract, data, where), where)
    check_contract(contract, where)
    return contract

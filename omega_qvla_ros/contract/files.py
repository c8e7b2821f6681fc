"""Contract files: YAML in, a checked ``RobotContract`` out."""

from __future__ import annotations

from pathlib import Path

from omega_qvla_core.strict_json import dataclass_from_json
from omega_qvla_core.strict_yaml import read_yaml_mapping
from omega_qvla_ros.contract.checks import check_contract, with_all_joints
from omega_qvla_ros.contract.schema import RobotContract


def load_contract(path: Path | str) -> RobotContract:
    """Read and check a contract.

    Args:
        path: YAML file. ``base: other.yaml`` takes what it does not say from another contract of the same folder.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown (with the nearest valid name), missing or there
            twice, or a value is out of range.
    """
    return contract_from_dict(read_yaml_mapping(Path(path), "robot contract"), str(path))


def contract_from_dict(data: object, where: str = "contract") -> RobotContract:
    """Build a contract from a decoded YAML mapping; ``where`` names it in messages.

    Raises:
        ConfigError: See ``load_contract``.
    """
    contract = with_all_joints(dataclass_from_json(RobotContract, data, where), where)
    check_contract(contract, where)
    return contract

"""``omega_qvla.json`` beside the weights of a public checkpoint: what its own files do not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.robot_setup import ROBOT_SETUPS, RobotSetup, robot_setup
from omega_qvla_core.strict_json import check_keys, read_json

SIDECAR_FILE = "omega_qvla.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """Content of the file.

    Attributes:
        name: Name of the checkpoint; the folder's if the file gives none.
        robot: The robot it was trained on. None if nobody has said.
        tokenizer: File or folder of the tokenizer.
        model: Sizes of the network as an object of our own configuration, for sizes that no official variant has.
    """

    name: str
    robot: RobotSetup | None
    tokenizer: Path
    model: dict[str, Any] | None = None

    def require_robot(self, folder: Path, framework: str) -> RobotSetup:
        """The setup.

        Raises:
            ConfigError: If there is none, or it is one of another framework.
        """
        known = ", ".join(name for name, setup in ROBOT_SETUPS.items() if setup.framework == framework)
        if self.robot is None:
            raise ConfigError(
                f"{folder} does not say which robot it was trained on (cameras, vectors, rates); write "
                f'{SIDECAR_FILE} beside the weights with {{"format_version": 1, "robot": ...}}, a known name ({known}) '
                "or an object"
            )
        if self.robot.framework != framework:
            raise ConfigError(
                f"{folder}: robot.framework is {self.robot.framework!r}, but the files are of {framework}; "
                f"known setups: {known}"
            )
        return self.robot


def read_sidecar(folder: Path, robot: RobotSetup | str | Path | None = None, tokenizer: Path | None = None) -> Sidecar:
    """Read the file, where there is one; arguments go before what it says.

    Args:
        folder: Of the checkpoint.
        robot: A setup, the name of a known one, or a JSON file with one.
        tokenizer: File or folder.

    Raises:
        ConfigError: If the content is not valid.
        CheckpointError: If the file is not JSON.
    """
    path, values = folder / SIDECAR_FILE, {}
    if path.is_file():
        values = check_keys(
            read_json(path, "the robot setup"), ("format_version",), ("name", "robot", "tokenizer", "model"), str(path)
        )
        if values["format_version"] != FORMAT_VERSION:
            raise ConfigError(f"{path}: format_version is {values['format_version']!r}; this release reads 1")
        for key, kind in (("name", str), ("tokenizer", str), ("model", dict)):
            if key in values and not isinstance(values[key], kind):
                raise ConfigError(f"{path}: {key} is {values[key]!r}; it must be a {kind.__name__}")
    if robot is not None:
        setup = _given_robot(robot)
    else:
        setup = RobotSetup.from_json(values["robot"], f"{path}: robot") if "robot" in values else None
    place = tokenizer or (folder / values["tokenizer"] if "tokenizer" in values else folder)
    return Sidecar(values.get("name") or folder.resolve().name, setup, Path(place).expanduser(), values.get("model"))


def _given_robot(robot: RobotSetup | str | Path) -> RobotSetup:
    if isinstance(robot, RobotSetup):
        return robot
    path = Path(robot).expanduser()
    if path.is_file():
        return RobotSetup.from_json(read_json(path, "the robot setup"), str(path))
    return robot_setup(str(robot))

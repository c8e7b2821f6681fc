"""Before any motion is possible: does this checkpoint hold what it must, and does it fit this robot?

Every check is one row of a table: what was found, what was expected, and what to do. Nothing raises for a bad
checkpoint; a row fails, and a failed check never hides the others where they can still be made.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omega_qvla_core.checkpoints import lerobot, nvidia, openpi
from omega_qvla_core.checkpoints.description import PolicyDescription, read_description
from omega_qvla_core.checkpoints.families import build_empty
from omega_qvla_core.checkpoints.foundation import FoundationDescription
from omega_qvla_core.checkpoints.layouts import FAMILY_TITLES, PACK_FILE
from omega_qvla_core.checkpoints.loading import Description, Headers, describe, read_headers
from omega_qvla_core.checkpoints.strict_loading import matching_names
from omega_qvla_core.checkpoints.tensor_names import model_names
from omega_qvla_core.checkpoints.weight_files import FLOATS, read_header
from omega_qvla_core.errors import ConfigError, OmegaQVLAError
from omega_qvla_core.policy_types import RobotRequirements
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.robot_setup import POSITION_MEANINGS, RobotSetup
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer
from omega_qvla_core.strict_yaml import read_yaml_mapping

T = TypeVar("T")

_FRAMEWORKS = {"openpi": "openpi", "lerobot": "lerobot", "nvidia": "gr00t"}


@dataclass(frozen=True)
class PreflightRow:
    """One check.

    Attributes:
        check: What was looked at.
        found: What is there.
        expected: What has to be.
        ok: Whether it fits.
        remedy: What to do; empty where it fits.
    """

    check: str
    found: str
    expected: str
    ok: bool
    remedy: str = ""


@dataclass(frozen=True)
class PreflightReport:
    """All rows."""

    rows: tuple[PreflightRow, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether there are rows and every one fits."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[PreflightRow, ...]:
        """Rows that do not fit."""
        return tuple(row for row in self.rows if not row.ok)

    def require(self) -> None:
        """Refuse to go on.

        Raises:
            ConfigError: Naming the first failed check and its remedy.
        """
        if not self.passed:
            row = self.failures[0]
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            raise ConfigError(f"preflight: {row.check}: found {row.found}, expected {row.expected}; {row.remedy}{more}")

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {"passed": self.passed, "rows": [asdict(row) for row in self.rows]}


def preflight(
    folder: Path,
    requirements: RobotRequirements | None = None,
    robot: RobotSetup | str | Path | None = None,
    tokenizer: Path | None = None,
) -> PreflightReport:
    """Check a checkpoint or pack folder; only headers and small files are read.

    Args:
        folder: Of the checkpoint.
        requirements: The robot's side; None to check the checkpoint alone.
        robot: See ``Policy.load``.
        tokenizer: See ``Policy.load``.
    """
    if (folder / PACK_FILE).is_file():
        return _pack(folder, requirements)
    rows: list[PreflightRow] = []
    headers = _attempt(rows, "files and layout", "a whole checkpoint", lambda: read_headers(folder, robot, tokenizer))
    if headers is None:
        return PreflightReport(tuple(rows))
    title = f"{FAMILY_TITLES[headers.detected.family]}, {headers.detected.layout}, {len(headers.weights.files)} file(s)"
    rows.append(PreflightRow("files and layout", title, "a whole checkpoint", True))
    rows.append(_tensors(headers))
    if headers.detected.layout in _FRAMEWORKS:
        _statistics(rows, headers)
        _tokenizer(rows, headers)
    description = _attempt(rows, "configuration", "parts that fit together", lambda: describe(headers))
    if description is not None:
        rows.append(PreflightRow("configuration", "all parts fit together", "parts that fit together", True))
        rows += requirement_rows(description, requirements)
    elif requirements is not None:
        missing = PreflightRow("robot", "not known", requirements.name, False, "mend the rows above and check again")
        rows.append(missing)
    return PreflightReport(tuple(rows))


def requirement_rows(description: Description, requirements: RobotRequirements | None) -> list[PreflightRow]:
    """What the checkpoint says about the robot, each against the contract where there is one."""
    spec, wanted = description.spec(), requirements
    rows = [
        _names("cameras", [camera.key for camera in spec.cameras], wanted and wanted.cameras, "cameras: key"),
        _names("state entries", spec.state_names, wanted and wanted.state_names, "joints: state_name"),
        _names("action entries", spec.action_names, wanted and wanted.action_names, "joints: action_name"),
        _action_modes(description, wanted),
        _number(
            "control rate",
            f"{spec.control_hz:g} Hz",
            f"{wanted.control_hz:g} Hz" if wanted else "any",
            wanted is None or abs(spec.control_hz - wanted.control_hz) <= 1e-6 * wanted.control_hz,
            f"set chunk.rate_hz (or control_rate_hz) of the contract to {spec.control_hz:g}",
        ),
        _number(
            "horizon",
            f"{spec.horizon} steps",
            f"at least {wanted.execution_horizon_steps} steps" if wanted else "any",
            wanted is None or spec.horizon >= wanted.execution_horizon_steps,
            f"set chunk.execution_horizon_steps of the contract to at most {spec.horizon}",
        ),
    ]
    if isinstance(description, FoundationDescription) and description.policy.embodiment_tag is not None:
        index = getattr(description.processor(), "embodiment_id", None)
        found = f"{description.policy.embodiment_tag} (projector {index})"
        rows.append(PreflightRow("embodiment", found, "statistics and a projector", True))
    return rows


def read_requirements(path: Path) -> RobotRequirements:
    """The robot's side from its contract (a YAML file of ``config/robots``).

    Only what a checkpoint has to fit is read here; the ROS side checks the whole contract.

    Raises:
        ConfigError: If the file is missing or no YAML, or lacks a field; the message names it.
    """
    data = read_yaml_mapping(path, "robot contract")
    joints = _entries(data, "joints", "name", path)
    rate, chunk = data.get("control_rate_hz"), data.get("chunk") or {}
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
        raise ConfigError(f"{path}: control_rate_hz is {rate!r}; it must be a positive number")
    if isinstance(chunk, dict) and chunk.get("rate_hz") is not None:
        rate = chunk["rate_hz"]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
            raise ConfigError(f"{path}: chunk.rate_hz is {rate!r}; it must be a positive number")
    steps = chunk.get("execution_horizon_steps", 4) if isinstance(chunk, dict) else None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{path}: chunk.execution_horizon_steps is {steps!r}; it must be at least 1")
    checkpoint = data.get("checkpoint") or {}
    mode = checkpoint.get("action_mode", "absolute") if isinstance(checkpoint, dict) else "absolute"
    return RobotRequirements(
        name=str(data.get("name", path.stem)),
        cameras=tuple(camera["key"] for camera in _entries(data, "cameras", "key", path)),
        state_names=tuple(
            joint.get("state_name") or joint["name"] for joint in joints if joint.get("in_state") is not False
        ),
        action_names=tuple(joint.get("action_name") or joint["name"] for joint in joints),
        control_hz=float(rate),
        execution_horizon_steps=steps,
        delta_names=tuple(
            joint.get("action_name") or joint["name"]
            for joint in joints
            if (joint.get("action_mode") or mode) == "delta"
        ),
    )


def _entries(data: dict[str, Any], field_name: str, key: str, path: Path) -> list[dict[str, Any]]:
    entries = data.get(field_name)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: {field_name} is missing or empty; list at least one")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise ConfigError(f"{path}: {field_name}[{index}].{key} is missing; it must be a text")
    return entries


def _attempt(rows: list[PreflightRow], check: str, expected: str, action: Callable[[], T]) -> T | None:
    """Run a check; what it raises becomes a failed row, split into finding and remedy at its first semicolon."""
    try:
        return action()
    except OmegaQVLAError as error:
        finding, _, remedy = str(error).partition("; ")
        rows.append(PreflightRow(check, finding, expected, False, remedy or "fetch the checkpoint again"))
        return None


def _tensors(headers: Headers) -> PreflightRow:
    """Share of the model's tensors that the files hold with the right shape and type."""
    family = headers.detected.family
    rows: list[PreflightRow] = []
    where = str(headers.folder / "config.json")
    model = _attempt(rows, "tensors", "every tensor once", lambda: build_empty(headers.model, where))
    if model is None:
        return rows[0]
    expected = model.state_dict()
    names = _attempt(
        rows,
        "tensors",
        "every tensor once",
        lambda: model_names(headers.weights.tensors, family, headers.weights.source),
    )
    if names is None:
        return rows[0]
    fitting = sum(
        headers.weights.tensors[file_name].shape == tuple(expected[name].shape)
        and headers.weights.tensors[file_name].dtype in FLOATS
        for name, file_name in names.items()
        if name in expected
    )
    share = f"{fitting} of {len(expected)} ({fitting / max(1, len(expected)):.1%})"
    wanted = f"{len(expected)} of {len(expected)} (100.0%), and no others"
    if _attempt(rows, "tensors", wanted, lambda: matching_names(expected, headers.weights, family)) is None:
        row = rows[0]
        return PreflightRow("tensors", share, wanted, False, f"{row.found}; {row.remedy}")
    return PreflightRow("tensors", share, wanted, True)


def _statistics(rows: list[PreflightRow], headers: Headers) -> None:
    """Presence, width and range of both vectors' statistics."""
    expected = "finite, as wide as the robot's vector, every entry moving"
    framework = _FRAMEWORKS[headers.detected.layout]
    setup = _attempt(
        rows,
        "robot setup",
        "cameras, vectors and rates",
        lambda: headers.sidecar.require_robot(headers.folder, framework),
    )
    if setup is None:
        return
    rows.append(PreflightRow("robot setup", setup.framework, "cameras, vectors and rates", True))
    vectors = _attempt(rows, "normalization", expected, lambda: _vectors(headers, setup))
    for kind, vector in zip(("state", "action"), vectors or ()):
        bad = vector.degenerate()
        schemes = ", ".join(sorted({part.scheme for part in vector.parts}))
        found = f"{vector.width} entries, {schemes}" + (f"; degenerate: {', '.join(bad)}" if bad else "")
        remedy = f"recompute {vector.parts[0].where} on data that moves {bad[0]}" if bad else ""
        rows.append(PreflightRow(f"{kind} normalization", found, expected, not bad, remedy))


def _vectors(headers: Headers, setup: RobotSetup) -> tuple[VectorNormalizer, VectorNormalizer]:
    if headers.detected.layout == "openpi":
        return openpi.statistics(headers.folder, setup)
    if headers.detected.layout == "lerobot":
        return lerobot.statistics(headers.folder, setup)
    metadata = nvidia.embodiment_metadata(headers.folder, setup)
    return (
        nvidia.statistics(headers.folder, metadata, "state", setup.state_parts, setup.state_names),
        nvidia.statistics(headers.folder, metadata, "action", setup.action_parts, setup.action_names),
    )


def _tokenizer(rows: list[PreflightRow], headers: Headers) -> None:
    expected = "the checkpoint's own"
    found = _attempt(
        rows, "tokenizer", expected, lambda: TextTokenizer.load(headers.sidecar.tokenizer, headers.detected.family)
    )
    if found is not None:
        rows.append(PreflightRow("tokenizer", f"{found.vocab_size} tokens", expected, True))


def _pack(folder: Path, requirements: RobotRequirements | None) -> PreflightReport:
    rows: list[PreflightRow] = []
    expected = "a whole pack"
    header = _attempt(rows, "files and layout", expected, lambda: read_header(folder / PACK_FILE))
    description = _attempt(rows, "configuration", expected, lambda: read_description(folder))
    if header is not None:
        rows.append(PreflightRow("files and layout", f"pack of {len(header)} tensors", expected, True))
    if description is not None:
        rows += requirement_rows(description, requirements)
    return PreflightReport(tuple(rows))


def _names(check: str, found: Sequence[str], wanted: Sequence[str] | None, contract_field: str) -> PreflightRow:
    shown = f"{len(found)}: {', '.join(found)}"
    if wanted is None:
        return PreflightRow(check, shown, "any", True)
    expected = f"{len(wanted)}: {', '.join(wanted)}"
    if set(found) == set(wanted) and len(found) == len(wanted):
        return PreflightRow(check, shown, expected, True)
    missing = sorted(set(found) - set(wanted)) or sorted(set(wanted) - set(found))
    near = difflib.get_close_matches(missing[0], (set(found) ^ set(wanted)) - {missing[0]}, n=1) if missing else []
    hint = f" (nearest: {near[0]!r})" if near else ""
    remedy = (
        f"{missing[0] if missing else 'a name'!r} is not on both sides{hint}; correct {contract_field} of the contract "
        "or the robot setup beside the weights"
    )
    return PreflightRow(check, shown, expected, False, remedy)


def _action_modes(description: Description, wanted: RobotRequirements | None) -> PreflightRow:
    names, modes = description.spec().action_names, description.policy.action_modes
    found = ", ".join(f"{name} {mode}" for name, mode in zip(names, modes))
    needs_positions = wanted is not None and wanted.position_targets
    deltas = wanted.delta_names if wanted is not None else ()
    # The contract adds the position to a relative entry that it calls delta, and to no other.
    bad = [name for name, mode in zip(names, modes) if (mode in POSITION_MEANINGS) == (name in deltas)]
    bad += [name for name, mode in zip(names, modes) if mode == "velocity" and name in deltas]
    bad = bad if needs_positions else []
    expected = " or ".join(POSITION_MEANINGS) if needs_positions else "any"
    if needs_positions and deltas:
        expected += f"; relative: {', '.join(deltas)}"
    if isinstance(description, PolicyDescription):
        remedy = "correct policy.action_modes of config.json"
    elif bad and bad[0] in deltas:
        remedy = f"{bad[0]} needs no position added; set its action_mode in the contract to absolute"
    else:
        remedy = f"{bad[0] if bad else ''} is no position target; use a checkpoint trained on joint positions"
    return PreflightRow("action mode", found, expected, not bad, remedy if bad else "")


def _number(check: str, found: str, expected: str, ok: bool, remedy: str) -> PreflightRow:
    return PreflightRow(check, found, expected, ok, "" if ok else remedy)

"""Dataclasses to and from JSON, strictly: a key that nobody reads or a missing one is an error that names it.

A misspelt key that is silently ignored leaves a default in its place, and on a robot that default moves an arm.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omega_qvla_core.errors import CheckpointError, ConfigError, OmegaQVLAError

T = TypeVar("T")
Reader = Callable[[Any, str], Any]

# Larger than any configuration, statistics or word list here; keeps a wrong file from filling the memory.
MAX_JSON_BYTES = 64 * 1024 * 1024


def check_keys(data: object, required: Iterable[str], optional: Iterable[str], where: str) -> Mapping[str, Any]:
    """Check that ``data`` is a JSON object with exactly the wanted keys.

    Args:
        data: A decoded JSON value.
        required: Keys that must be there.
        optional: Keys that may be there.
        where: Name of the object in messages, such as ``config.json: model``.

    Returns:
        ``data``, typed.

    Raises:
        ConfigError: For anything but an object, an unknown key (with the nearest valid name) or a missing key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a JSON object, found {type(data).__name__}")
    required, optional = list(required), list(optional)
    valid = required + optional
    for key in data:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where} has the unknown key {key!r}{hint} Valid keys: {', '.join(valid)}")
    missing = [key for key in required if key not in data]
    if missing:
        raise ConfigError(f"{where} lacks the key {missing[0]!r}; add it (missing: {', '.join(missing)})")
    return data


def dataclass_from_json(cls: type[T], data: object, where: str, readers: Mapping[str, Reader] | None = None) -> T:
    """Build a dataclass from a decoded JSON object. Fields with a default may be left out, nothing may be added.

    Args:
        cls: A dataclass whose fields are numbers, strings, booleans, tuples of those, or dataclasses.
        data: The decoded object.
        where: Name of the object in messages.
        readers: Field name -> ``reader(value, where)`` for fields that this function cannot read by their type.

    Raises:
        ConfigError: For an unknown or missing key, or a value of the wrong type.
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    with_default = {
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    names = [field.name for field in fields]
    values = check_keys(data, [name for name in names if name not in with_default], sorted(with_default), where)
    hints = typing.get_type_hints(cls)
    readers = readers or {}
    converted = {
        name: readers[name](value, f"{where}.{name}")
        if name in readers
        else _convert(hints[name], value, f"{where}.{name}")
        for name, value in values.items()
    }
    return cls(**converted)


def dataclass_to_json(value: Any) -> Any:
    """The JSON value of a dataclass; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: dataclass_to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [dataclass_to_json(item) for item in value]
    return value


def read_json(path: Path, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Decode a JSON file.

    Raises:
        CheckpointError: If the file is missing, larger than ``max_bytes``, or not JSON; the message names ``path``.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {what} is read from it")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes, more than the {max_bytes} that {what} may have")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); is the download complete?") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read and a diff can show; NaN and infinity are refused."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise OmegaQVLAError(f"{path} cannot be written: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Check ``value`` against the type hint ``kind``; lists become tuples."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(kind):
            return None
        return _convert(next(arg for arg in typing.get_args(kind) if arg is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, where)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else dataclass_from_json(kind, value, where)  # type: ignore[arg-type]
    wanted = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(kind)
    if wanted is None:
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} is {value!r}; it must be of type {kind.__name__}")
    try:
        converted = kind(value)
    except OverflowError as error:
        raise ConfigError(f"{where} is too large a number") from error
    if kind is float and not math.isfinite(converted):
        raise ConfigError(f"{where} is {value!r}; it must be a finite number")
    return converted


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is {value!r}; it must be a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where} has {len(value)} entries; it must have {len(args)}")
    return tuple(_convert(arg, item, f"{where}[{index}]") for index, (arg, item) in enumerate(zip(args, value)))

"""Named functions that a recipe chooses from: rotations, permutations, solvers, activation schemes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from omega_qvla_core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> function or description, filled by a decorator.

    Args:
        kind: What the entries are, for messages (``rotation``).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry. A name is taken once."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry.

        Raises:
            ConfigError: There is none; the message names the nearest one.
        """
        if name not in self._entries:
            raise ConfigError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def unknown_name(kind: str, name: object, valid: object) -> str:
    """Message for a name that does not exist, with the nearest one that does."""
    names = list(valid)  # type: ignore[call-overload]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{kind} {name!r} does not exist; {hint}Valid: {', '.join(names)}"

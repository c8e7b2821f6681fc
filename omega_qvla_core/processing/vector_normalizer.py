"""Normalization of a whole vector whose parts may follow different schemes (GR00T's modality keys)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.strict_json import check_keys


@dataclass(frozen=True)
class VectorNormalizer:
    """Parts in a row.

    Attributes:
        parts: In network order.
        names: Of all entries, in the same order.

    Raises:
        ConfigError: If the number of names is not that of the entries.
    """

    parts: tuple[Normalizer, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.parts or len(self.names) != self.width:
            raise ConfigError(
                f"{self.parts[0].where if self.parts else 'statistics'}: {len(self.names)} names "
                f"({', '.join(self.names)}) for {self.width} entries; give one name per entry"
            )

    @property
    def width(self) -> int:
        """Entries of the physical vector."""
        return sum(part.width for part in self.parts)

    @property
    def out_width(self) -> int:
        """Entries of the normalised vector."""
        return sum(part.out_width for part in self.parts)

    @property
    def centre(self) -> np.ndarray:
        """A harmless physical vector, float64 ``[width]``."""
        return np.concatenate([part.centre for part in self.parts])

    def degenerate(self) -> tuple[str, ...]:
        """Names of the entries whose statistics are degenerate."""
        start, bad = 0, []
        for part in self.parts:
            bad += [self.names[start + index] for index in part.degenerate()]
            start += part.width
        return tuple(bad)

    def require_moving(self) -> None:
        """Refuse degenerate statistics.

        Raises:
            ConfigError: Naming file, field and entry.
        """
        start = 0
        for part in self.parts:
            part.require_moving(self.names[start : start + part.width])
            start += part.width

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Physical ``[..., width]`` -> normalised ``[..., out_width]``."""
        pieces = np.split(np.asarray(values), np.cumsum([part.width for part in self.parts])[:-1], axis=-1)
        return np.concatenate([part.normalize(piece) for part, piece in zip(self.parts, pieces)], axis=-1)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Normalised ``[..., width]`` -> physical. Not clipped."""
        pieces = np.split(np.asarray(values), np.cumsum([part.width for part in self.parts])[:-1], axis=-1)
        return np.concatenate([part.unnormalize(piece) for part, piece in zip(self.parts, pieces)], axis=-1)

    def to_json(self) -> list[dict[str, Any]]:
        """What ``from_json`` reads back exactly."""
        return [
            {
                "scheme": part.scheme,
                "width": part.width,
                "stats": {key: value.tolist() for key, value in part.stats.items()},
            }
            for part in self.parts
        ]

    @classmethod
    def from_json(cls, data: object, names: Sequence[str], where: str) -> VectorNormalizer:
        """Read what ``to_json`` gave; ConfigError names what is wrong."""
        if not isinstance(data, list):
            raise ConfigError(f"{where} must be a list of parts, found {type(data).__name__}")
        parts = []
        for index, item in enumerate(data):
            place = f"{where}[{index}]"
            values = check_keys(item, ("scheme", "width", "stats"), (), place)
            if not isinstance(values["width"], int) or values["width"] < 1:
                raise ConfigError(f"{place}.width is {values['width']!r}; it must be a positive number")
            stats = read_stats(values["stats"], f"{place}.stats")
            parts.append(Normalizer(str(values["scheme"]), values["width"], stats, place))
        return cls(tuple(parts), tuple(names))

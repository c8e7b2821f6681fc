"""Normalization statistics of proprioception and actions, with both directions.

Proprioception is normalised per dimension, actions per (chunk step, dimension): a delta to the measured joint grows
along the chunk, and one scale for all steps would leave the first ones, which are executed, with few levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.strict_json import check_keys

SCHEMA_VERSION = 1

StatsKind = Literal["quantile", "min_max", "mean_std"]

# kind -> names of the two stored arrays. For the first two the pair is mapped to -1 and 1.
_FIELDS: dict[str, tuple[str, str]] = {
    "quantile": ("q01", "q99"),
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
}

# Below this, dividing by the scale turns sensor noise (1e-6 rad is finer than any encoder) into full-range input.
MIN_SCALE = 1e-6


@dataclass(frozen=True, eq=False)
class AxisStats:
    """Statistics of one array.

    Attributes:
        kind: ``quantile`` (1 % and 99 %), ``min_max`` or ``mean_std``.
        first: float64, the lower value or the mean; shape ``[dims]`` or ``[steps, dims]``.
        second: float64, the upper value or the standard deviation; same shape.
        where: Name in messages.
    """

    kind: StatsKind
    first: np.ndarray
    second: np.ndarray
    where: str = "statistics"

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS:
            raise ConfigError(f"{self.where}.kind is {self.kind!r}; it must be one of {', '.join(_FIELDS)}")
        names = _FIELDS[self.kind]
        for name, value in zip(names, (self.first, self.second), strict=True):
            if value.shape != self.first.shape or value.ndim not in (1, 2) or value.size == 0:
                raise ConfigError(f"{self.where}.{name} has shape {value.shape}; {names[0]} has {self.first.shape}")
            if not np.isfinite(value).all():
                raise ConfigError(
                    f"{self.where}.{name}{_index(~np.isfinite(value))} is not finite; recompute the statistics"
                )
        if (self.scale < MIN_SCALE).any():
            index = _index(self.scale < MIN_SCALE)
            raise ConfigError(
                f"{self.where}{index} is degenerate: {names[0]} and {names[1]} span less than {MIN_SCALE:g}, so the "
                "dimension cannot be normalised; recompute the statistics on data that moves it"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(dims,)`` or ``(steps, dims)``."""
        return self.first.shape

    @property
    def centre(self) -> np.ndarray:
        """What normalises to 0."""
        return self.first if self.kind == "mean_std" else (self.first + self.second) / 2

    @property
    def scale(self) -> np.ndarray:
        """What 1 stands for in physical units."""
        return self.second if self.kind == "mean_std" else (self.second - self.first) / 2

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Physical ``[..., *shape]`` -> normalised, float64. Not clipped."""
        return (np.asarray(values, dtype=np.float64) - self.centre) / self.scale

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Normalised ``[..., *shape]`` -> physical, float64."""
        return np.asarray(values, dtype=np.float64) * self.scale + self.centre

    @classmethod
    def from_samples(
        cls, kind: StatsKind, samples: np.ndarray, min_scale: float = 0.0, where: str = "statistics"
    ) -> AxisStats:
        """Compute statistics.

        Args:
            kind: See the class.
            samples: ``[N, dims]`` or ``[N, steps, dims]``; NaN entries (masked steps) are left out.
            min_scale: Dimensions that move less than this (physical units) are widened to it around their centre.
            where: Name in messages.

        Raises:
            ConfigError: If a dimension does not move and ``min_scale`` is too small to widen it, or has no samples.
        """
        samples = np.asarray(samples, dtype=np.float64)
        if samples.ndim < 2 or np.isnan(samples).all(axis=0).any():
            raise ConfigError(f"{where}: no samples for some dimension (shape {samples.shape})")
        if kind == "mean_std":
            first, second = np.nanmean(samples, axis=0), np.nanstd(samples, axis=0)
            return cls(kind, first, np.maximum(second, min_scale), where)
        if kind == "quantile":
            first, second = np.nanquantile(samples, (0.01, 0.99), axis=0)
        else:
            first, second = np.nanmin(samples, axis=0), np.nanmax(samples, axis=0)
        widen = np.maximum(min_scale - (second - first) / 2, 0.0)
        return cls(kind, first - widen, second + widen, where)

    @classmethod
    def from_json(cls, data: object, where: str) -> AxisStats:
        """Read ``{"kind": ..., and its two arrays}``; ConfigError names what is wrong."""
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind not in _FIELDS:
            raise ConfigError(f"{where}.kind is {kind!r}; it must be one of {', '.join(_FIELDS)}")
        values = check_keys(data, ("kind", *_FIELDS[kind]), (), where)
        first, second = (_array(values[name], f"{where}.{name}") for name in _FIELDS[kind])
        return cls(kind, first, second, where)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads back exactly."""
        names = _FIELDS[self.kind]
        return {"kind": self.kind, names[0]: self.first.tolist(), names[1]: self.second.tolist()}


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of a policy.

    Attributes:
        state: Per dimension of the proprioception, shape ``[state]``.
        actions: Per chunk step and action, shape ``[horizon, actions]``, of what the model predicts (deltas where the
            action's mode is delta).
    """

    state: AxisStats
    actions: AxisStats

    def check(self, state_names: tuple[str, ...], action_names: tuple[str, ...], horizon: int) -> None:
        """Check the widths against the policy.

        Raises:
            ConfigError: If a width differs.
        """
        if self.state.shape != (len(state_names),):
            raise ConfigError(
                f"norm_stats.state is of width {self.state.shape}; the policy has {len(state_names)} state_names "
                f"({', '.join(state_names)})"
            )
        if self.actions.shape != (horizon, len(action_names)):
            raise ConfigError(
                f"norm_stats.actions has shape {self.actions.shape}; the policy needs {(horizon, len(action_names))} "
                f"(horizon, action_names {', '.join(action_names)})"
            )

    @classmethod
    def from_json(cls, data: object, where: str = "norm_stats.json") -> NormStats:
        """Read ``norm_stats.json``.

        Raises:
            ConfigError: For another schema version, unknown or missing keys, values that are not finite, or a
                dimension without a range.
        """
        values = check_keys(data, ("schema_version", "state", "actions"), (), where)
        if values["schema_version"] != SCHEMA_VERSION:
            raise ConfigError(
                f"{where}: schema_version is {values['schema_version']!r}; this release reads {SCHEMA_VERSION}"
            )
        return cls(
            AxisStats.from_json(values["state"], f"{where}: state"),
            AxisStats.from_json(values["actions"], f"{where}: actions"),
        )

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads back exactly."""
        return {
            "schema_version": SCHEMA_VERSION,
            "state": self.state.to_json(),
            "actions": self.actions.to_json(),
        }


def _array(value: object, where: str) -> np.ndarray:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where} is not an array of numbers ({error})") from error


def _index(bad: np.ndarray) -> str:
    """First True of ``bad`` as ``[step][dim]``."""
    return "".join(f"[{index}]" for index in np.argwhere(bad)[0])

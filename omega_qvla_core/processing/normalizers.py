"""Normalization exactly as each reference framework does it, both directions, with its own epsilon and precision.

The differences are small for ordinary statistics and decide everything where a dimension did not move in training:
openpi divides by 1e-6, LeRobot by 1e-8, GR00T gives 0 or passes the value on. openpi computes in float64, LeRobot in
float32, GR00T in the type of its input (float64 for the state, float32 for actions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omega_qvla_core.errors import ConfigError

Stats = Mapping[str, np.ndarray]

OPENPI_EPS = 1e-6
LEROBOT_EPS = 1e-8


@dataclass(frozen=True)
class _Scheme:
    """One way to normalise.

    Attributes:
        fields: Statistics that it reads. Where there are two, their difference (or the second one, ``scale_field``)
            is what degenerates.
        forward: Physical -> normalised.
        inverse: Normalised -> physical. None if the framework has none.
        dtype: Type to compute in; None for the input's.
        divides: Whether a scale of zero makes the result explode.
    """

    fields: tuple[str, ...]
    forward: Callable[[np.ndarray, Stats], np.ndarray]
    inverse: Callable[[np.ndarray, Stats], np.ndarray] | None
    dtype: Any = None
    divides: bool = True


def _openpi_quantile(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x - s["q01"]) / (s["q99"] - s["q01"] + OPENPI_EPS) * 2.0 - 1.0


def _openpi_quantile_inverse(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x + 1.0) / 2.0 * (s["q99"] - s["q01"] + OPENPI_EPS) + s["q01"]


def _openpi_zscore(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x - s["mean"]) / (s["std"] + OPENPI_EPS)


def _openpi_zscore_inverse(x: np.ndarray, s: Stats) -> np.ndarray:
    return x * (s["std"] + OPENPI_EPS) + s["mean"]


def _lerobot_mean_std(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x - s["mean"]) / (s["std"] + np.float32(LEROBOT_EPS))


def _mean_std_inverse(x: np.ndarray, s: Stats) -> np.ndarray:
    return x * s["std"] + s["mean"]


def _lerobot_range(low: str, high: str, halves_first: bool) -> tuple[Callable, Callable]:
    """LeRobot's two range maps; their inverses multiply in another order, which shows in the last bit."""

    def span(s: Stats) -> np.ndarray:
        span = s[high] - s[low]
        return np.where(span == 0, np.float32(LEROBOT_EPS), span)

    def forward(x: np.ndarray, s: Stats) -> np.ndarray:
        return 2 * (x - s[low]) / span(s) - 1

    def inverse(x: np.ndarray, s: Stats) -> np.ndarray:
        return ((x + 1) / 2 * span(s) if halves_first else (x + 1) * span(s) / 2) + s[low]

    return forward, inverse


def _gr00t_min_max(x: np.ndarray, s: Stats) -> np.ndarray:
    span = s["max"] - s["min"]
    moving = span != 0
    return np.where(moving, 2 * (x - s["min"]) / np.where(moving, span, 1) - 1, 0).astype(x.dtype)


def _gr00t_min_max_inverse(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x + 1) / 2 * (s["max"] - s["min"]) + s["min"]


def _gr00t_q99(x: np.ndarray, s: Stats) -> np.ndarray:
    span = s["q99"] - s["q01"]
    moving = span != 0
    scaled = np.where(moving, 2 * (x - s["q01"]) / np.where(moving, span, 1) - 1, x)
    return np.clip(scaled, -1, 1).astype(x.dtype)


def _gr00t_q99_inverse(x: np.ndarray, s: Stats) -> np.ndarray:
    return (x + 1) / 2 * (s["q99"] - s["q01"]) + s["q01"]


def _gr00t_mean_std(x: np.ndarray, s: Stats) -> np.ndarray:
    moving = s["std"] != 0
    return np.where(moving, (x - s["mean"]) / np.where(moving, s["std"], 1), x).astype(x.dtype)


def _binary(x: np.ndarray, _: Stats) -> np.ndarray:
    # A value that is no number is no decision: the robot's guard has to see it.
    return np.where(np.isnan(x), x, x > 0.5).astype(x.dtype)


def _sin_cos(x: np.ndarray, _: Stats) -> np.ndarray:
    return np.concatenate([np.sin(x), np.cos(x)], axis=-1)


def _identity(x: np.ndarray, _: Stats) -> np.ndarray:
    return x


_SCHEMES: dict[str, _Scheme] = {
    "openpi_quantile": _Scheme(("q01", "q99"), _openpi_quantile, _openpi_quantile_inverse, np.float64),
    "openpi_zscore": _Scheme(("mean", "std"), _openpi_zscore, _openpi_zscore_inverse, np.float64),
    "lerobot_mean_std": _Scheme(("mean", "std"), _lerobot_mean_std, _mean_std_inverse, np.float32),
    "lerobot_quantiles": _Scheme(("q01", "q99"), *_lerobot_range("q01", "q99", False), np.float32),
    "lerobot_quantile10": _Scheme(("q10", "q90"), *_lerobot_range("q10", "q90", False), np.float32),
    "lerobot_min_max": _Scheme(("min", "max"), *_lerobot_range("min", "max", True), np.float32),
    "lerobot_identity": _Scheme((), _identity, _identity, np.float32),
    "gr00t_min_max": _Scheme(("min", "max"), _gr00t_min_max, _gr00t_min_max_inverse, divides=False),
    "gr00t_q99": _Scheme(("q01", "q99"), _gr00t_q99, _gr00t_q99_inverse, divides=False),
    "gr00t_mean_std": _Scheme(("mean", "std"), _gr00t_mean_std, _mean_std_inverse, divides=False),
    "gr00t_binary": _Scheme((), _binary, _binary, divides=False),
    "gr00t_sin_cos": _Scheme((), _sin_cos, None, divides=False),
}
SCHEMES = tuple(_SCHEMES)
"""Names: framework, then the mode as that framework calls it."""

# As for our own statistics: dividing by less turns sensor noise into full-range input.
MIN_SPAN = 2e-6


@dataclass(frozen=True, eq=False)
class Normalizer:
    """One vector's normalization.

    Attributes:
        scheme: One of ``SCHEMES``.
        width: Entries of the vector.
        stats: The scheme's statistics, float64 ``[width]`` each.
        where: Name in messages, such as ``norm_stats.json: state``.

    Raises:
        ConfigError: For an unknown scheme, a statistic that is missing, of another width or not finite.
    """

    scheme: str
    width: int
    stats: Stats
    where: str

    def __post_init__(self) -> None:
        if self.scheme not in _SCHEMES:
            raise ConfigError(f"{self.where}: normalization {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        for field in _SCHEMES[self.scheme].fields:
            if field not in self.stats:
                raise ConfigError(
                    f"{self.where} lacks {field!r}, which {self.scheme} needs (there are "
                    f"{', '.join(self.stats) or 'none'}); recompute the statistics with it"
                )
            value = self.stats[field]
            if value.shape != (self.width,):
                raise ConfigError(f"{self.where}.{field} has shape {value.shape}; the robot has {self.width} entries")
            if not np.isfinite(value).all():
                index = int(np.flatnonzero(~np.isfinite(value))[0])
                raise ConfigError(f"{self.where}.{field}[{index}] is {value[index]}; recompute the statistics")

    @property
    def out_width(self) -> int:
        """Entries of the normalised vector."""
        return 2 * self.width if self.scheme == "gr00t_sin_cos" else self.width

    @property
    def centre(self) -> np.ndarray:
        """A harmless value in the middle of the statistics, float64 ``[width]``."""
        fields = _SCHEMES[self.scheme].fields
        if not fields:
            return np.zeros(self.width)
        first, second = (self.stats[field] for field in fields)
        return first if fields[0] == "mean" else (first + second) / 2

    def degenerate(self) -> tuple[int, ...]:
        """Entries that did not move in training, so that normalising divides by next to nothing.

        Entries whose scale is negative (a lower bound above the upper one) are degenerate under every scheme.
        """
        scheme = _SCHEMES[self.scheme]
        if not scheme.fields:
            return ()
        first, second = (self.stats[field] for field in scheme.fields)
        span = 2 * second if scheme.fields[0] == "mean" else second - first
        bad = span < MIN_SPAN if scheme.divides else span < 0
        return tuple(int(index) for index in np.flatnonzero(bad))

    def require_moving(self, names: tuple[str, ...]) -> None:
        """Refuse degenerate statistics.

        Raises:
            ConfigError: Naming the first such entry.
        """
        for index in self.degenerate():
            first, second = _SCHEMES[self.scheme].fields
            raise ConfigError(
                f"{self.where}.{second}[{index}] ({names[index]}) is degenerate: {first} {self.stats[first][index]:g}, "
                f"{second} {self.stats[second][index]:g}; recompute the statistics on data that moves it"
            )

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Physical ``[..., width]`` -> normalised ``[..., out_width]``."""
        return self._apply(_SCHEMES[self.scheme].forward, values)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Normalised ``[..., width]`` -> physical. Not clipped.

        Raises:
            ConfigError: If the scheme has no inverse.
        """
        inverse = _SCHEMES[self.scheme].inverse
        if inverse is None:
            raise ConfigError(f"{self.where}: {self.scheme} has no inverse; actions cannot use it")
        return self._apply(inverse, values)

    def _apply(self, function: Callable[[np.ndarray, Stats], np.ndarray], values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        dtype = _SCHEMES[self.scheme].dtype or (values.dtype if values.dtype.kind == "f" else np.float64)
        stats = {name: value.astype(dtype) for name, value in self.stats.items()}
        return function(values.astype(dtype), stats)


def read_stats(data: object, where: str, width: int | None = None) -> dict[str, np.ndarray]:
    """Statistics of one vector from a JSON object; null entries are left out.

    Args:
        data: ``{"mean": [...], "std": [...], ...}``.
        where: Name in messages.
        width: Cut longer arrays to this many entries, as openpi does with padded statistics.

    Raises:
        ConfigError: If it is no object of one-dimensional arrays of numbers.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object of arrays, found {type(data).__name__}")
    stats = {}
    for name, value in data.items():
        if value is None:
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}.{name} is not an array of numbers ({error})") from error
        if array.ndim != 1:
            raise ConfigError(f"{where}.{name} has shape {array.shape}; it must be a list of numbers")
        stats[name] = array if width is None else array[:width]
    return stats

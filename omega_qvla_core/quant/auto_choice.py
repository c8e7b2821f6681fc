"""What ``auto`` recipes choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant.activation import CLIPS
from omega_qvla_core.quant.permute import PERMUTATIONS
from omega_qvla_core.quant.registry import unknown_name
from omega_qvla_core.quant.rotation import ROTATIONS


@dataclass(frozen=True)
class AutoChoice:
    """The fields of ``SideRecipe`` that are chosen per input site, by error on held-out calibration tokens.

    Attributes:
        rotations: Tried with every smoothing.
        smoothings: Exponents, None for no smoothing.
        permutations: Tried with the best rotation and smoothing.
        clips: Tried last. Values that the activation scheme does not take are left out.
        low_ranks: Ranks of the float16 branch that a byte budget may pay for.
        eight_bits: Whether a byte budget may pay for 8-bit weights and activations.
        byte_budget: Largest share of the float16 bytes of the linears in scope that the result may take, every table
            counted, such as 0.3. None: 4 bits everywhere, and nothing is paid for.
        folds: Parts into which the calibration tokens are split. A candidate is made without a part and measured on it,
            for each part in turn.
        margin: How much smaller than the starting recipe's the error must be, as a fraction, to move away from it.
        tokens: Tokens per fold and denoise step in the search of clips and in the measurement.
        seed: Of the split.
    """

    rotations: tuple[str, ...] = ("none", "hadamard", "svd_hadamard")
    smoothings: tuple[float | None, ...] = (None, 0.35, 0.5, 0.65)
    permutations: tuple[str, ...] = ("none", "serpentine", "interleave")
    clips: tuple[str, ...] = ("absmax", "mse", "output")
    low_ranks: tuple[int, ...] = (16,)
    eight_bits: bool = True
    byte_budget: float | None = None
    folds: int = 2
    margin: float = 0.01
    tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, values, valid in (
            ("rotation", self.rotations, ROTATIONS),
            ("permutation", self.permutations, PERMUTATIONS),
            ("clip", self.clips, CLIPS),
        ):
            _check_all(kind, values, valid)
        for alpha in self.smoothings:
            if alpha is not None and not 0.0 <= alpha <= 1.0:
                raise ConfigError(f"auto smoothing is {alpha}; it must be between 0 and 1, or null for none")
        if any(rank < 1 for rank in self.low_ranks):
            raise ConfigError(f"auto low_ranks are {self.low_ranks}; every rank must be at least 1")
        if self.byte_budget is not None and not 0.0 < self.byte_budget <= 1.0:
            raise ConfigError(
                f"auto byte_budget is {self.byte_budget}; it is a share of the float16 bytes, above 0 and at most 1"
            )
        if self.folds < 2:
            raise ConfigError(f"auto folds is {self.folds}; at least 2 are needed to measure on what was held out")
        if self.tokens < 1:
            raise ConfigError(f"auto tokens is {self.tokens}; it must be at least 1")
        if not 0.0 <= self.margin < 1.0:
            raise ConfigError(f"auto margin is {self.margin}; it must be at least 0 and below 1")


def _check_all(kind: str, values: Sequence[str], valid: object) -> None:
    for value in values:
        if value not in valid:  # type: ignore[operator]
            raise ConfigError(unknown_name(f"auto {kind}", value, valid))

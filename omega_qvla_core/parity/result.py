"""What a comparison found, and the rule by which one tensor passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far a floating-point value may be off; whole numbers and booleans must be equal.

    Attributes:
        atol: Absolute part.
        rtol: Part that grows with the expected value.
        by_tensor: Whether ``rtol`` counts for the largest expected value of the tensor, not for each value itself. In a
            transformer the rounding of float32 follows the largest values: the recorded DiT blocks (up to 110 in size)
            are themselves 2e-4 away from the same computation in float64, at values near zero too.
    """

    atol: float
    rtol: float = 0.0
    by_tensor: bool = False

    def allowed(self, expected: Tensor) -> Tensor:
        """Allowed difference per value of ``expected``, float64."""
        size = expected.double().abs()
        if self.by_tensor and size.numel():
            size = size.max().expand_as(size)
        return self.atol + self.rtol * size

    def __str__(self) -> str:
        size = "max|x|" if self.by_tensor else "|x|"
        return f"{self.atol:g}" + (f" + {self.rtol:g} {size}" if self.rtol else "")


@dataclass(frozen=True)
class TensorResult:
    """One compared tensor.

    Attributes:
        name: As in the file, without the case.
        error: Largest absolute difference; None if there was nothing to compare, or it is not finite.
        tolerance: Text, such as ``0.0001 + 1e-05 |x|``.
        passed: Whether every compared value is within the tolerance.
        reason: Why it was not compared; empty if it was.
    """

    name: str
    error: float | None
    tolerance: str
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class CaseResult:
    """All tensors of one case."""

    name: str
    tensors: tuple[TensorResult, ...]

    @property
    def compared(self) -> int:
        """Tensors that were compared."""
        return sum(not result.reason for result in self.tensors)

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing failed."""
        return self.compared > 0 and all(result.passed for result in self.tensors)


@dataclass(frozen=True)
class ParityReport:
    """A whole folder.

    Attributes:
        family: ``pi05`` or ``gr00t_n15``.
        cases: By name.
        skipped: Names of expected tensors of attention kernels that this package does not have.
    """

    family: str
    cases: tuple[CaseResult, ...]
    skipped: tuple[str, ...] = ()

    @property
    def compared(self) -> int:
        """Tensors that were compared."""
        return sum(case.compared for case in self.cases)

    @property
    def passed(self) -> bool:
        """Whether there is a case and all pass."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "family": self.family,
            "passed": self.passed,
            "compared": self.compared,
            "cases": {
                case.name: {
                    result.name: {
                        "error": result.error,
                        "tolerance": result.tolerance,
                        "passed": result.passed,
                        **({"reason": result.reason} if result.reason else {}),
                    }
                    for result in case.tensors
                }
                for case in self.cases
            },
            "not_compared": list(self.skipped),
        }


def compare(
    name: str, found: Tensor, expected: Tensor, tolerance: Tolerance, valid: Tensor | None = None
) -> TensorResult:
    """Compare one tensor.

    Args:
        name: For the result.
        found: What our model gave.
        expected: What the reference gave.
        tolerance: For floating-point values.
        valid: bool, broadcastable to the tensors; only True values count. None if all do.
    """
    exact = not expected.is_floating_point()
    text = "equal" if exact else str(tolerance)
    if found.shape != expected.shape:
        reason = f"our model gives the shape {list(found.shape)}, the file holds {list(expected.shape)}"
        return TensorResult(name, None, text, False, reason)
    error = (found.double() - expected.double()).abs()
    allowed = torch.zeros_like(error) if exact else tolerance.allowed(expected)
    if valid is not None:
        error, allowed = error[valid.expand_as(error)], allowed[valid.expand_as(error)]
    if error.numel() == 0:
        return TensorResult(name, None, text, False, "no value of it counts")
    # Not "error > allowed": NaN must fail.
    passed = bool((error <= allowed).all())
    largest = float(error.max())
    return TensorResult(name, largest if math.isfinite(largest) else None, text, passed)


def not_produced(name: str, reason: str) -> TensorResult:
    """An expected tensor that our model did not give."""
    return TensorResult(name, None, "-", False, reason)

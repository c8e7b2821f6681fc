"""From a float weight to integer codes: round to nearest, exact GPTQ, and the published blockwise variant.

All in float64 on the weight's device. METHOD A.5 and A.13.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.kernels import code_range
from omega_qvla_core.quant.registry import Registry
from omega_qvla_core.quant.scales import spread_scales

_log = logging.getLogger(__name__)

# Columns whose updates are applied to the rest of the matrix in one product (A.13).
LAZY_BLOCK = 128

# Columns per independent block of the published variant (A.5).
PUBLISHED_BLOCK = 128

# Columns per block of the triangular inverse, and rows that are moved at a time.
_INVERSE_BLOCK = 256
_ROWS = 1024

# Damping grows tenfold until the Cholesky factorization succeeds, up to this multiple of the mean diagonal.
_MOST_DAMPING = 1e3


@dataclass(frozen=True)
class WeightProblem:
    """One weight to quantize.

    Attributes:
        name: Of the layer, for messages.
        weight: float64 ``[O, I]``, smoothed, permuted and rotated.
        scales: ``[O, G]`` from ``search_scales``.
        group: Columns per scale, 0 for the whole row.
        bits: Bits of the codes.
        hessian: float64 ``[I, I]``, ``sum x_r x_r^T`` in the same basis. None for solvers that need none.
        damping: Fraction of the mean diagonal that is added to the Hessian's diagonal.
        act_order: Quantize the columns of the largest Hessian diagonal first.
    """

    name: str
    weight: Tensor
    scales: Tensor
    group: int
    bits: int
    hessian: Tensor | None = None
    damping: float = 0.05
    act_order: bool = True


@dataclass
class Solution:
    """Codes of a weight.

    Attributes:
        codes: int8 ``[O, I]``.
        notes: What was done other than asked (raised damping, dead columns); goes into the report.
    """

    codes: Tensor
    notes: list[str] = field(default_factory=list)


SolverFunction = Callable[[WeightProblem], Solution]
SOLVERS: Registry[SolverFunction] = Registry("solver")
SOLVERS_WITH_HESSIAN = frozenset({"gptq", "blockwise_gptq"})


@SOLVERS.register("rtn")
def rtn(problem: WeightProblem) -> Solution:
    """Round every weight to the nearest code."""
    low, high = code_range(problem.bits)
    scales = _column_scales(problem)
    return Solution((problem.weight / scales).round().clamp(low, high).to(torch.int8))


@SOLVERS.register("gptq")
def gptq(problem: WeightProblem) -> Solution:
    """Exact GPTQ (A.13): every rounding error is spread over all columns that are still free.

    ``Uc`` is the upper Cholesky factor of the inverse Hessian; row ``c`` of it holds what the error of column ``c``
    does to the columns after it. Scales are those found on the unmodified weight (static groups), so that the order of
    columns is free.
    """
    dead, notes = _dead_columns(problem)
    order = _column_order(problem, dead)
    upper, more = _inverse_factor(problem, order, dead)
    weight = problem.weight.double()[:, order]
    weight[:, dead[order]] = 0
    scales = spread_scales(problem.scales.double(), problem.group, problem.weight.shape[1])[:, order]
    codes = _sequential(weight, scales, upper, problem.bits)
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return Solution(unordered, notes + more)


@SOLVERS.register("blockwise_gptq")
def blockwise_gptq(problem: WeightProblem) -> Solution:
    """The published variant (A.5), for parity.

    Every 128-column diagonal block on its own, with the full inverse ``K`` of the block held fixed (columns that are
    already quantized are not eliminated), no propagation across blocks, no column order.
    """
    dead, notes = _dead_columns(problem)
    diagonal, weight, scales = _live_diagonal(problem, dead), problem.weight.double().clone(), _column_scales(problem)
    weight[:, dead] = 0
    parts = []
    for start in range(0, weight.shape[1], PUBLISHED_BLOCK):
        span = slice(start, min(start + PUBLISHED_BLOCK, weight.shape[1]))
        columns = torch.arange(span.start, span.stop, device=weight.device)
        block = _gathered(problem.hessian, columns, dead, diagonal)
        inverse, more = _damped_inverse(problem, (block + block.T) / 2)
        notes += more
        parts.append(_fixed_inverse(weight[:, span], scales[:, span], inverse, problem.bits))
    return Solution(torch.cat(parts, dim=1), notes)


def solve(solver: str, problem: WeightProblem) -> Solution:
    """Run a solver by name after checking that the problem is finite and complete.

    Raises:
        QuantizationError: NaN or Inf in weight or Hessian, or no Hessian for a solver that needs one.
    """
    if not torch.isfinite(problem.weight).all():
        raise QuantizationError(f"{problem.name}: the weight holds NaN or Inf; check the checkpoint")
    if solver in SOLVERS_WITH_HESSIAN:
        if problem.hessian is None:
            raise QuantizationError(f"{problem.name}: solver {solver!r} needs calibration; calibrate or use 'rtn'")
        if not torch.isfinite(problem.hessian).all():
            raise QuantizationError(f"{problem.name}: calibration saw NaN or Inf; check the observations")
    solution = SOLVERS[solver](problem)
    for note in solution.notes:
        _log.info("%s: %s", problem.name, note)
    return solution


def _column_scales(problem: WeightProblem) -> Tensor:
    return spread_scales(problem.scales.double(), problem.group, problem.weight.shape[1])


def _dead_columns(problem: WeightProblem) -> tuple[Tensor, list[str]]:
    """bool ``[I]``: input channels that never carried anything. Their weights become zero."""
    dead = problem.hessian.diagonal() <= 0
    return dead, [f"{int(dead.sum())} dead input channels: their weights are zero"] if dead.any() else []


def _live_diagonal(problem: WeightProblem, dead: Tensor) -> Tensor:
    """The Hessian's diagonal, float64 ``[I]``; a dead channel's becomes the mean of the others'.

    Any positive value would do; this one leaves the damping alone.
    """
    diagonal = problem.hessian.diagonal().double().clone()
    if dead.any():
        diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].sum() / dead.numel()
    return diagonal


def _column_order(problem: WeightProblem, dead: Tensor) -> Tensor:
    if not problem.act_order:
        return torch.arange(dead.shape[0], device=dead.device)
    return torch.argsort(_live_diagonal(problem, dead), descending=True, stable=True)


def _damped_inverse(problem: WeightProblem, block: Tensor) -> tuple[Tensor, list[str]]:
    """Inverse of a damped block of the Hessian."""
    identity = torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
    for damping, notes in _dampings(problem):
        factor, failed = torch.linalg.cholesky_ex(block + damping * block.diagonal().mean() * identity)
        if not failed:
            return torch.cholesky_inverse(factor), notes
    raise AssertionError("the dampings end with an error")


def _dampings(problem: WeightProblem) -> Iterator[tuple[float, list[str]]]:
    """Fractions of the mean diagonal to try, each with the note that goes with it."""
    damping = problem.damping
    while damping <= _MOST_DAMPING:
        changed = damping != problem.damping
        yield damping, [f"damping raised from {problem.damping} to {damping}"] if changed else []
        damping = max(damping * 10, 1e-4)
    raise QuantizationError(
        f"{problem.name}: the Hessian is not positive definite even with damping {damping / 10}; "
        "calibrate on more observations or use solver 'rtn'"
    )


def _inverse_factor(problem: WeightProblem, order: Tensor, dead: Tensor) -> tuple[Tensor, list[str]]:
    """Upper Cholesky factor of the inverse of the damped Hessian, columns in ``order``; float64 ``[I, I]``.

    With ``J`` the reversal and ``J H J = L L^T`` it is ``(J L J)^-1``: one factorization and one triangular inverse,
    both in place, so that beside the Hessian itself there is one matrix (2.1 GB at 16384 channels).
    """
    diagonal = _live_diagonal(problem, dead)
    for damping, notes in _dampings(problem):
        matrix = _gathered(problem.hessian, order.flip(0), dead, diagonal)
        matrix.diagonal().add_(damping * diagonal.mean())
        # The transposed view of a symmetric matrix has the layout of LAPACK, which then works in place.
        lower = matrix.mT
        _, failed = torch.linalg.cholesky_ex(
            lower, out=(lower, torch.empty((), dtype=torch.int32, device=lower.device))
        )
        if failed:
            continue
        # In memory this is L^T. Its inverse is (J U J)^T, and reversing both axes of that gives U^T.
        invert_upper(matrix)
        if torch.isfinite(matrix.diagonal()).all():
            return _reversed(matrix).mT, notes
    raise AssertionError("the dampings end with an error")


def _gathered(hessian: Tensor, order: Tensor, dead: Tensor, diagonal: Tensor) -> Tensor:
    """``hessian[order][:, order]`` in float64, a few rows at a time, dead channels decoupled."""
    matrix = torch.empty(order.shape[0], order.shape[0], dtype=torch.float64, device=hessian.device)
    for start in range(0, order.shape[0], _ROWS):
        rows = order[start : start + _ROWS]
        matrix[start : start + _ROWS] = hessian[rows][:, order]
    if dead.any():
        gone = dead[order]
        matrix[gone, :] = 0
        matrix[:, gone] = 0
    matrix.diagonal().copy_(diagonal[order])
    return matrix


def invert_upper(matrix: Tensor) -> None:
    """Replace an upper triangular matrix ``[n, n]`` by its inverse, block column by block column; zeros below stay."""
    for start in range(0, matrix.shape[0], _INVERSE_BLOCK):
        span = slice(start, start + _INVERSE_BLOCK)
        block = matrix[span, span]
        identity = torch.eye(block.shape[0], dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(block, identity, upper=True)
        if start:
            matrix[:start, span] = matrix[:start, :start] @ matrix[:start, span] @ -inverse
        matrix[span, span] = inverse


def _reversed(matrix: Tensor) -> Tensor:
    """``J matrix J`` in place: both axes reversed."""
    rows = matrix.shape[0]
    for start in range(0, rows // 2, _ROWS):
        end = min(start + _ROWS, rows // 2)
        upper = matrix[start:end].flip(0, 1)
        matrix[start:end] = matrix[rows - end : rows - start].flip(0, 1)
        matrix[rows - end : rows - start] = upper
    if rows % 2:
        matrix[rows // 2] = matrix[rows // 2].flip(0)
    return matrix


def _sequential(weight: Tensor, scales: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Columns left to right, with lazy updates of everything right of a block. ``weight`` is consumed."""
    low, high = code_range(bits)
    columns = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, columns, LAZY_BLOCK):
        end = min(start + LAZY_BLOCK, columns)
        errors = torch.empty(weight.shape[0], end - start, dtype=weight.dtype, device=weight.device)
        for column in range(start, end):
            code = (weight[:, column] / scales[:, column]).round().clamp(low, high)
            codes[:, column] = code.to(torch.int8)
            error = (weight[:, column] - code * scales[:, column]) / upper[column, column]
            weight[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _fixed_inverse(weight: Tensor, scales: Tensor, inverse: Tensor, bits: int) -> Tensor:
    """One block of the published variant: ``w_after -= (w_c - q_c) / K_cc * K_c,after`` with ``K`` held fixed."""
    low, high = code_range(bits)
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for column in range(weight.shape[1]):
        code = (weight[:, column] / scales[:, column]).round().clamp(low, high)
        codes[:, column] = code.to(torch.int8)
        error = (weight[:, column] - code * scales[:, column]) / inverse[column, column]
        weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
    return codes

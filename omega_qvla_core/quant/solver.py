"""From a float weight to integer codes: round to nearest, exact GPTQ, and the published blockwise variant.

All in float64 on the weight's device. METHOD A.5 and A.13.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
    hessian, weight, notes = _alive(problem)
    order = _column_order(problem, hessian)
    weight, scales = weight[:, order], _column_scales(problem)[:, order]
    upper, more = _inverse_factor(problem, hessian[order][:, order])
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
    hessian, weight, notes = _alive(problem)
    scales = _column_scales(problem)
    parts = []
    for start in range(0, weight.shape[1], PUBLISHED_BLOCK):
        span = slice(start, min(start + PUBLISHED_BLOCK, weight.shape[1]))
        block = hessian[span, span]
        factor, more = _cholesky(problem, (block + block.T) / 2)
        notes += more
        inverse = torch.cholesky_inverse(factor)
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


def _alive(problem: WeightProblem) -> tuple[Tensor, Tensor, list[str]]:
    """Copies of Hessian and weight in which input channels that never carried anything have weight 0.

    Their diagonal becomes the mean of the others' (any positive value would do; this one leaves the damping alone).
    """
    hessian, weight = problem.hessian.double().clone(), problem.weight.double().clone()
    dead = hessian.diagonal() <= 0
    notes = []
    if dead.any():
        hessian[dead, :] = 0
        hessian[:, dead] = 0
        hessian[dead, dead] = hessian.diagonal()[~dead].mean() if not dead.all() else 1.0
        weight[:, dead] = 0
        notes.append(f"{int(dead.sum())} dead input channels: their weights are zero")
    return hessian, weight, notes


def _column_order(problem: WeightProblem, hessian: Tensor) -> Tensor:
    if not problem.act_order:
        return torch.arange(hessian.shape[0], device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _cholesky(problem: WeightProblem, hessian: Tensor) -> tuple[Tensor, list[str]]:
    """Lower Cholesky factor of the damped Hessian. Damping is raised until there is one, and that is noted."""
    damping = problem.damping
    mean = hessian.diagonal().mean()
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while damping <= _MOST_DAMPING:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            changed = damping != problem.damping
            return factor, [f"damping raised from {problem.damping} to {damping}"] if changed else []
        damping = max(damping * 10, 1e-4)
    raise QuantizationError(
        f"{problem.name}: the Hessian is not positive definite even with damping {damping / 10}; "
        "calibrate on more observations or use solver 'rtn'"
    )


def _inverse_factor(problem: WeightProblem, hessian: Tensor) -> tuple[Tensor, list[str]]:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    factor, notes = _cholesky(problem, hessian)
    inverse = torch.cholesky_inverse(factor)
    upper, failed = torch.linalg.cholesky_ex((inverse + inverse.T) / 2, upper=True)
    if not failed:
        return upper, notes
    if problem.damping * 10 > _MOST_DAMPING:
        raise QuantizationError(f"{problem.name}: the inverse Hessian is not positive definite; calibrate on more data")
    raised = replace(problem, damping=max(problem.damping * 10, 1e-4))
    upper, more = _inverse_factor(raised, hessian)
    return upper, [f"damping raised from {problem.damping} to {raised.damping}", *more]


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

"""Weight scales and solvers: METHOD A.5 and A.13."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omega_qvla_core.errors import ConfigError, QuantizationError
from omega_qvla_core.quant.scales import SCALE_GRIDS, search_scales, spread_scales
from omega_qvla_core.quant.solver import SOLVERS, WeightProblem, invert_upper, solve


def problem_of(seed=0, rows=48, columns=200, tokens=600, group=64, bits=4, grid="fine", **changes):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    scales = search_scales(weight, group, bits, grid)
    return replace(WeightProblem("layer", weight, scales, group, bits, x.T @ x), **changes)


def output_error(problem, codes):
    scales = spread_scales(problem.scales.double(), problem.group, problem.weight.shape[1])
    difference = codes.double() * scales - problem.weight
    return float(((difference @ problem.hessian) * difference).sum())


@pytest.mark.parametrize("solver", ["gptq", "blockwise_gptq"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_rounding_in_the_mean_over_seeds(solver, act_order):
    ratios = []
    for seed in range(6):
        problem = problem_of(seed, act_order=act_order)
        codes = [solve(name, problem).codes for name in (solver, "rtn")]
        ratios.append(output_error(problem, codes[0]) / output_error(problem, codes[1]))
    assert sum(ratios) / len(ratios) < 0.95


def test_exact_gptq_beats_the_published_variant_in_the_mean():
    pairs = []
    for seed in range(6):
        problem = problem_of(seed)
        pairs.append([output_error(problem, solve(name, problem).codes) for name in ("gptq", "blockwise_gptq")])
    assert sum(a / b for a, b in pairs) / len(pairs) < 0.95


def test_gptq_equals_the_textbook_loop_that_eliminates_one_column_at_a_time():
    """The inverse of the remaining sub-matrix, recomputed for every column: what the Cholesky factor encodes."""
    problem = problem_of(columns=20, rows=5, act_order=False, damping=0.05)
    weight, scales = problem.weight.clone(), spread_scales(problem.scales.double(), 64, 20)
    hessian = problem.hessian + 0.05 * problem.hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    expected = torch.empty(5, 20, dtype=torch.int8)
    for column in range(20):
        inverse = torch.linalg.inv(hessian[column:, column:])
        code = (weight[:, column] / scales[:, column]).round().clamp(-8, 7)
        expected[:, column] = code.to(torch.int8)
        error = (weight[:, column] - code * scales[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    assert torch.equal(solve("gptq", problem).codes, expected)


def test_lazy_blocks_change_nothing(monkeypatch):
    problem = problem_of()
    whole = solve("gptq", problem).codes
    monkeypatch.setattr("omega_qvla_core.quant.solver.LAZY_BLOCK", 7)
    assert torch.equal(solve("gptq", problem).codes, whole)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize(
    "rows,columns,group", [(1, 1, 64), (1, 40, 64), (6, 1, 0), (5, 150, 64), (5, 64, 0), (3, 10, 3)]
)
def test_any_size_and_group(solver, rows, columns, group):
    problem = problem_of(rows=rows, columns=columns, group=group, tokens=300)
    codes = solve(solver, problem).codes
    assert codes.shape == (rows, columns) and codes.dtype == torch.int8
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7


def test_dead_columns_get_zero_weight_and_a_note():
    problem = problem_of()
    hessian = problem.hessian.clone()
    hessian[[3, 70], :] = 0
    hessian[:, [3, 70]] = 0
    solution = solve("gptq", replace(problem, hessian=hessian))
    assert not solution.codes[:, [3, 70]].any()
    assert any("2 dead input channels" in note for note in solution.notes)


def test_all_columns_dead():
    problem = problem_of()
    assert not solve("gptq", replace(problem, hessian=torch.zeros_like(problem.hessian))).codes.any()


@pytest.mark.parametrize("solver", ["gptq", "blockwise_gptq"])
def test_a_hessian_that_is_not_positive_definite_raises_the_damping_and_says_so(solver):
    problem = problem_of()
    hessian = problem.hessian - 0.3 * problem.hessian.diagonal().mean() * torch.eye(200, dtype=torch.float64)
    solution = solve(solver, replace(problem, hessian=hessian, damping=0.001))
    assert any("damping raised from 0.001" in note for note in solution.notes)


def test_fewer_tokens_than_columns_work_with_damping():
    problem = problem_of(tokens=20)
    assert output_error(problem, solve("gptq", problem).codes) < output_error(problem, solve("rtn", problem).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    problem = problem_of()
    for field in ("weight", "hessian"):
        values = getattr(problem, field).clone()
        values[0, 0] = bad
        with pytest.raises(QuantizationError, match="layer"):
            solve("gptq", replace(problem, **{field: values}))


def test_gptq_without_calibration_is_refused():
    with pytest.raises(QuantizationError, match="needs calibration"):
        solve("gptq", problem_of(hessian=None))


def test_unknown_solver_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gptq'"):
        solve("gtpq", problem_of())


def test_the_scale_is_the_best_of_its_grid():
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = search_scales(weight, 64, 4, "paper").double()
    errors = []
    for multiple in SCALE_GRIDS["paper"]:
        scale = (weight.abs().amax(dim=1, keepdim=True) / 7 * multiple).half().double()
        errors.append((weight - (weight / scale).round().clamp(-8, 7) * scale).square().sum(dim=1))
    best = (weight - (weight / chosen).round().clamp(-8, 7) * chosen).square().sum(dim=1)
    assert torch.allclose(best, torch.stack(errors).min(dim=0).values)


def test_finer_grids_and_groups_round_better():
    weight = torch.randn(20, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for group, grid in ((0, "absmax"), (0, "fine"), (64, "fine")):
        scale = spread_scales(search_scales(weight, group, 4, grid).double(), group, 256)
        errors.append(float((weight - (weight / scale).round().clamp(-8, 7) * scale).square().sum()))
    assert errors[0] > errors[1] > errors[2]


def test_scales_are_what_the_pack_stores():
    weight = torch.randn(4, 64, dtype=torch.float64)
    assert search_scales(weight, 64, 4, "fine").dtype == torch.float16
    assert search_scales(weight * 1e-7, 64, 4, "fine").dtype == torch.float32
    assert search_scales(weight * 1e7, 64, 4, "fine").dtype == torch.float32


def test_groups_of_zeros_get_a_usable_scale():
    weight = torch.randn(4, 128, dtype=torch.float64)
    weight[:, :64] = 0
    weight[2] = 0
    scales = search_scales(weight, 64, 4, "fine")
    assert scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("columns", [1, 255, 256, 601])
def test_triangles_are_inverted_in_place_block_by_block(columns):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(columns, columns, dtype=torch.float64, generator=generator).triu() / columns
    matrix.diagonal().copy_(1 + torch.rand(columns, dtype=torch.float64, generator=generator))
    inverse = matrix.clone()
    invert_upper(inverse)
    identity = torch.eye(columns, dtype=torch.float64)
    assert torch.allclose(inverse @ matrix, identity, atol=1e-10) and torch.equal(inverse, inverse.triu())


def test_the_form_in_one_matrix_gives_the_codes_of_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 601, dtype=torch.float64, generator=generator)
    tokens = torch.randn(900, 601, dtype=torch.float64, generator=generator)
    hessian, scales = tokens.T @ tokens, search_scales(weight, 64, 4, "fine")
    found = solve("gptq", WeightProblem("layer", weight, scales, 64, 4, hessian)).codes
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian[order][:, order] + 0.05 * hessian.diagonal().mean() * torch.eye(601, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, spread = weight[:, order], spread_scales(scales.double(), 64, 601)[:, order]
    plain = torch.empty(24, 601)
    for column in range(601):
        code = (left[:, column] / spread[:, column]).round().clamp(-8, 7)
        error = (left[:, column] - code * spread[:, column]) / upper[column, column]
        left = left - error[:, None] * torch.nn.functional.pad(upper[column, column:], (column, 0))
        plain[:, order[column]] = code.float()
    assert torch.equal(found.float(), plain)
    assert torch.equal(hessian, tokens.T @ tokens)

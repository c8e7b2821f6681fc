"""``check_parity``: run our model on every case of a folder and compare all that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.strict_loading import load_model
from omega_qvla_core.checkpoints.weight_files import find_weights
from omega_qvla_core.parity import gr00t_case, pi05_case
from omega_qvla_core.parity.fixture import INPUTS_FILE, OUTPUTS_FILE, Fixture, read_fixture
from omega_qvla_core.parity.produced import Produced
from omega_qvla_core.parity.result import CaseResult, ParityReport, TensorResult, compare, not_produced

_FAMILIES: dict[str, ModuleType] = {"pi05": pi05_case, "gr00t_n15": gr00t_case}

Progress = Callable[[int, int, str], None]


@torch.inference_mode()
def check_parity(folder: Path, progress: Progress | None = None) -> ParityReport:
    """Compare our model with a folder of recorded tensors, in float32 on the CPU.

    Args:
        folder: Holds ``config.json``, ``model.safetensors``, ``inputs.safetensors`` and ``outputs.safetensors``.
        progress: Called with (done, total, case).

    Returns:
        Every expected tensor with its largest error. One that our model does not give is a failure.

    Raises:
        CheckpointError: A file is missing or damaged, an input or weight is missing or does not fit the sizes.
        ConfigError: The family is not known, or a size is missing or wrong.
    """
    fixture = read_fixture(folder)
    weights = find_weights(folder)
    with torch.inference_mode(False):
        # Ordinary tensors, so that the model keeps its step tables as it does in use.
        model = load_model(lambda: build_model(fixture.config), weights, fixture.family, torch.float32)
    expected, skipped = _expected(fixture)
    names = sorted(set(expected) | set(fixture.inputs))
    cases = []
    for index, case in enumerate(names):
        if progress is not None:
            progress(index, len(names), case)
        cases.append(_check_case(model, fixture, case, expected.get(case, {})))
    return ParityReport(fixture.family, tuple(cases), tuple(skipped))


def _expected(fixture: Fixture) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Expected tensors by case, without the attention kernel in their names, and the names of other kernels."""
    if fixture.family == "pi05":
        return {case: dict(tensors) for case, tensors in fixture.outputs.items()}, []
    skipped: list[str] = []
    expected: dict[str, dict[str, Tensor]] = {case: {} for case in fixture.outputs}
    for case, tensors in fixture.outputs.items():
        for name, value in tensors.items():
            if name.startswith(gr00t_case.OTHER_VARIANTS):
                skipped.append(f"{case}/{name}")
            else:
                expected[case][name.removeprefix(gr00t_case.VARIANT)] = value
    return expected, skipped


def _check_case(model: nn.Module, fixture: Fixture, case: str, expected: Mapping[str, Tensor]) -> CaseResult:
    family = _FAMILIES[fixture.family]
    is_train = fixture.family == "gr00t_n15" and case == gr00t_case.TRAIN
    if not expected:
        return CaseResult(case, (not_produced("*", f"{OUTPUTS_FILE} holds nothing to compare for this case"),))
    if case not in fixture.inputs:
        reason = f"{INPUTS_FILE} has no such case"
        return CaseResult(case, tuple(not_produced(name, reason) for name in sorted(expected)))
    counts = family.step_counts(expected)
    try:
        if is_train:
            produced = gr00t_case.produce_loss(model, fixture.inputs, fixture.meta)
        else:
            produced = family.produce(model, fixture.inputs[case], case, counts)
    except (ValueError, RuntimeError, IndexError) as error:
        reason = f"our model cannot compute this case: {str(error).splitlines()[0]}"
        return CaseResult(case, tuple(not_produced(name, reason) for name in sorted(expected)))
    results = _compare_all(produced, expected, family)
    if not is_train:
        results += _missing_actions(expected, counts, family)
    return CaseResult(case, tuple(results))


def _compare_all(produced: Produced, expected: Mapping[str, Tensor], family: ModuleType) -> list[TensorResult]:
    results = []
    for name in sorted(expected):
        if name not in produced.tensors:
            results.append(not_produced(name, "our model gives no tensor of this name"))
            continue
        valid, limit = produced.valid.get(name), family.tolerance(name)
        results.append(compare(name, produced.tensors[name], expected[name], limit, valid))
        if name in produced.in_use:
            results.append(compare(f"{name} (masked tokens dropped)", produced.in_use[name], expected[name], limit))
    return results


def _missing_actions(expected: Mapping[str, Tensor], counts: list[int], family: ModuleType) -> list[TensorResult]:
    """A case without final actions proves nothing about actions, whatever else it compares."""
    reason = f"{OUTPUTS_FILE} lacks the final actions"
    wanted = [family.final_name(count) for count in counts]
    missing = [not_produced(name, reason) for name in wanted if name not in expected]
    return missing if wanted else [not_produced("final actions", reason)]

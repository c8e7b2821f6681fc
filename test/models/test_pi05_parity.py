"""Pi 0.5 against recorded tensors of the openpi reference (tiny sizes, float32, CPU)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.models.pi05_prefix import euler_times
from omega_qvla_core.parity import check_parity

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "pi05" / "tiny"
# Half of what the fixture's authors allow, for every tensor of every case.
LIMIT = 5e-5


@pytest.fixture(scope="module")
def report():
    return check_parity(GOLDEN)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_every_recorded_tensor_is_reproduced(case, report):
    results = {result.name: result for one in report.cases if one.name == case for result in one.tensors}
    recorded = {name.partition(".")[2] for name in load_file(GOLDEN / "outputs.safetensors") if name.startswith(case)}
    assert recorded == {name for name in results if "(" not in name}
    assert {"n5.actions (masked tokens dropped)", "n10.actions (masked tokens dropped)"} < results.keys()
    for result in results.values():
        assert result.passed and result.error is not None and result.error <= LIMIT, result


def test_the_files_key_list_loads_strictly_and_nothing_unused_is_allocated():
    model = Pi05(Pi05Config.from_reference_json(json.loads((GOLDEN / "config.json").read_text())))
    stored = {name: tuple(value.shape) for name, value in load_file(GOLDEN / "model.safetensors").items()}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unused = "paligemma_with_expert.gemma_expert.lm_head.weight"
    assert stored.keys() - own.keys() == {unused}
    assert own == {name: shape for name, shape in stored.items() if name != unused}


def test_times_are_accumulated_in_float32():
    # Exact multiples would be 0.8 and 0.7; the reference's fourth time is two float32 steps below.
    assert euler_times(10)[:4] == [float(np.float32(time)) for time in (1.0, 0.9, 0.79999995, 0.69999993)]
    assert [len(euler_times(steps)) for steps in (1, 4, 5, 10, 100)] == [1, 4, 5, 10, 100]

"""Every Triton kernel compiles for GPUs that are not there, within what they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from omega_qvla_core.kernels.triton_kernels.tuning import SHARED_BYTES, tuning

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# A100, RTX 4090, H100 (Triton takes sm_90a for it), RTX 5090.
CAPABILITIES = (80, 89, 90, 120)
# A few spilled registers cost less than smaller blocks.
MOST_STACK_BYTES = 32


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Capability -> future of its process; as many at a time as there are processors."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {capability: pool.submit(compile_for, capability, cache / str(capability)) for capability in CAPABILITIES}


def compile_for(capability: int, cache: Path) -> subprocess.CompletedProcess[str]:
    # A process of its own: in this one the kernels may belong to the interpreter.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        capture_output=True,
        text=True,
        env=kept | {"TRITON_CACHE_DIR": str(cache)},
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_kernels_compile_ahead_of_time(capability, compilations):
    done = compilations[capability].result()
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    # An H100 has one more way for int8 products, with and without a residual, and one for floating ones.
    assert len(kernels) == (46 if capability == 90 else 43)
    for name, one in kernels.items():
        assert one["shared"] <= SHARED_BYTES[divmod(capability, 10)], name
        # More than a few words of stack mean registers that were spilled to memory again and again.
        assert (one["stack"] or 0) <= MOST_STACK_BYTES, name
        if "int4" in name or "int8" in name:
            assert one["int8"], f"{name} does not multiply int8 on the tensor cores"
            assert one["wgmma"] == (capability == 90), name


def test_triton_blocks_of_an_unknown_gpu_fit_everywhere():
    assert tuning((9, 9)) == tuning((8, 9))
    assert tuning((9, 0)) != tuning((8, 9))


def test_triton_blocks_on_an_h100_are_those_that_were_fastest_there():
    """Sizes of Pi 0.5's prefix with three cameras and two, and of SigLIP with a residual."""
    tuned = tuning((9, 0))
    few, more, many = (one.blocks for one in tuned.plain)
    assert tuned.int8(968, 2048) == few and tuned.int8(968, 2560) == more and tuned.int8(968, 16384) == many
    assert tuned.gated(968, grouped=False) == tuned.wide_gated
    assert tuned.gated(536, grouped=False) == tuned.narrow_gated == tuned.gated(968, grouped=True)
    assert tuned.added(768, 1152, 4352) == tuned.added(512, 1152, 1152) == tuned.floats_added
    # cuBLAS is faster.
    assert tuned.added(512, 1152, 4352) is None and tuned.added(968, 2048, 2048) is None
    assert tuning((8, 0)).added(768, 1152, 1152) is None

"""What comes with the package: small, complete, made from each other, on seeds that nothing else uses."""

import re
from pathlib import Path

import omega_qvla_core
from omega_qvla_core.checkpoints.folder import shipped_policies
from omega_qvla_core.commands.quantize import SHIPPED_CALIBRATION
from omega_qvla_core.envs.tabletop.seeds import CALIBRATION
from omega_qvla_core.quant.report import in_scope_bytes
from omega_qvla_core.runtime import Policy
from omega_qvla_core.runtime.observation_file import load_observations

ASSETS = Path(omega_qvla_core.__file__).parent / "assets"
CEILING_BYTES = 12_000_000


def test_everything_together_is_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= CEILING_BYTES


def test_shipped_policies_load_and_have_the_promised_size():
    assert set(shipped_policies()) == {"tabletop", "tabletop_w4a4"}
    policy, pack = Policy.load("tabletop"), Policy.load("tabletop_w4a4")
    assert 1_000_000 <= sum(p.numel() for p in policy.model.parameters()) <= 3_000_000
    assert pack.spec.quantization == "executable_w4a4"
    assert in_scope_bytes(pack) < 0.3 * in_scope_bytes(policy)


def test_calibration_observations_come_from_calibration_seeds_and_every_kind_of_task():
    sources = load_observations(SHIPPED_CALIBRATION).sources
    seeds = {int(re.search(r"seed (\d+)", source)[1]) for source in sources}
    assert all(seed in CALIBRATION for seed in seeds)
    assert {source.split(":")[0] for source in sources} == {"touch", "lift", "place"}

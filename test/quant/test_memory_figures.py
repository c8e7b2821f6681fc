"""Bytes: the published accounting, ours in scope, whole models, and arithmetic against packs on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.quant import Recipe, quantize_policy, save_pack
from omega_qvla_core.quant.memory import meta_model, scope_accounting, whole_accounting
from omega_qvla_core.quant.memory_table import full_size_gr00t, full_size_pi05, full_size_rows, pack_rows
from omega_qvla_core.quant.recipe import Override, WholeRecipe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MIB = 2**20


@pytest.fixture(scope="module")
def rows():
    return {(row.model, row.scope, row.recipe): row.bytes for row in full_size_rows()}


def test_the_full_sizes_are_those_of_the_official_checkpoints():
    released = json.loads((GOLDEN / "gr00t" / "full_keys.json").read_text())["released_config"]
    assert full_size_gr00t() == Gr00tConfig.from_official_json(released)
    assert sum(p.numel() for p in meta_model(full_size_pi05()).parameters()) == 3_353_433_872
    # 2 413 522 880 in the file, of which SigLIP's pooling head is never read.
    assert sum(p.numel() for p in meta_model(full_size_gr00t()).parameters()) == 2_413_522_880 - 15_238_352


@pytest.mark.parametrize(("model", "saved", "mib"), [("Pi 0.5", 0.720, 1222.0), ("GR00T N1.5", 0.713, 586.2)])
def test_the_published_accounting(rows, model, saved, mib):
    found = rows[model, "paper", "published accounting"]
    assert found.saved == pytest.approx(saved, abs=0.001)
    assert found.stored / MIB == pytest.approx(mib, abs=0.05)


@pytest.mark.parametrize("model", ["Pi 0.5", "GR00T N1.5"])
def test_ours_in_scope_with_every_table_counted(rows, model):
    assert rows[model, "paper", "executable_w4a4, hadamard"].saved >= 0.732
    assert rows[model, "paper", "executable_w4a4, svd_hadamard"].saved >= 0.713


@pytest.mark.parametrize(
    ("model", "recipe", "least"),
    [
        ("Pi 0.5", "4-bit embeddings, 8-bit vision", 0.713),
        ("Pi 0.5", "both 4-bit", 0.742),
        ("Pi 0.5", "both 8-bit", 0.675),
        ("GR00T N1.5", "all 32 embodiments", 0.67),
        ("GR00T N1.5", "contract's embodiment", 0.713),
        ("GR00T N1.5", "contract's embodiment, 4-bit vision, on both sides", 0.713),
    ],
)
def test_the_whole_model(rows, model, recipe, least):
    assert rows[model, "whole", recipe].saved >= least


def test_the_base_of_the_whole_model_is_all_that_inference_reads(rows):
    assert rows["Pi 0.5", "whole", "both 4-bit"].fp16 == 2 * 3_353_433_872
    assert rows["GR00T N1.5", "whole", "all 32 embodiments"].fp16 == 2 * 2_398_284_528


VARIANTS = {
    "executable": Recipe.preset("executable_w4a4"),
    "svd": Recipe.preset("executable_w4a4").replace_sides(rotation="svd_hadamard", permutation="serpentine"),
    "static": Recipe.preset("rtn_static_absmax").replace_sides(activation="static_channel", per_step=True),
    "centred": Recipe.preset("executable_w4a4").replace_sides(centring=True, clip="absmax"),
    "mixed": replace(Recipe.preset("w4a16"), overrides=(Override("*.v_proj", {"weight_bits": 8}),)),
    "whole": replace(Recipe.preset("rtn_static_absmax"), whole=WholeRecipe()),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_arithmetic_is_what_a_pack_holds(name, policy, calibration_observations, tmp_path):
    recipe = VARIANTS[name]
    quantized, result = quantize_policy(policy, recipe, calibration_observations)
    model, steps = meta_model(policy.description.model), policy.spec.num_steps
    scoped, whole = scope_accounting(model, recipe, steps), whole_accounting(model, recipe, steps)
    assert (scoped.fp16, scoped.stored) == (result.fp16_bytes, result.quantized_bytes)
    assert whole.stored == result.quantized_bytes + result.parts_bytes + result.other_bytes
    save_pack(quantized, tmp_path)
    row = pack_rows([tmp_path])[0]
    assert row.bytes == whole and 0 < row.file_bytes - whole.stored < 64 * 1024

"""Pi 0.5 processing against what openpi and LeRobot computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from safetensors import safe_open

from omega_qvla_core.processing import robots
from omega_qvla_core.processing.image_tensors import image_tensor
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.processing.prompt.pi05_prompt import prompt_parts, state_bins
from omega_qvla_core.processing.resize_with_pad import content_size, interpolate_with_pad, resize_with_pad

PILLOW_MAJOR = int(PIL.__version__.split(".")[0])
FOLDER = Path(__file__).parents[1] / "data" / "golden" / "pi05"
GOLDEN = json.loads((FOLDER / "preprocess.json").read_text())
IMAGES = {case["name"]: case for case in GOLDEN["images"]["cases"]}
EXAMPLES = GOLDEN["robots"]["examples"]


def test_pattern(case: dict) -> np.ndarray:
    """The fixture's test image, by its formula."""
    height, width = case["input_hw"]
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    triangle = 3 * x + 2 * y + 60 * c + case["s"]
    wave = np.abs(triangle % 314 - 157) * 191 // 157
    return (wave + (31 * x + 17 * y + 101 * c + (x * y) % 53) % 64).astype(np.uint8)


test_pattern.__test__ = False


def expected(name: str) -> np.ndarray | None:
    with safe_open(FOLDER / "preprocess.safetensors", "np") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a dict


@pytest.fixture(params=list(IMAGES))
def case(request) -> dict:
    found = dict(IMAGES[request.param])
    found["image"] = test_pattern(found)
    assert hashlib.sha256(found["image"].tobytes()).hexdigest() == found["input_sha256"]
    return found


def test_openpi_images_are_bit_equal(case):
    result = resize_with_pad(case["image"], case["out"], case["out"])
    assert content_size(*case["input_hw"], case["out"], case["out"]) == tuple(case["content_hw"])
    if PILLOW_MAJOR < 13:
        # Older releases (Python 3.10 has no newer one) round enlarged images differently, by one level at most.
        recorded = expected(f"{case['name']}.openpi_pil_u8_hwc")
        assert np.abs(result.astype(int) - recorded.astype(int)).max() <= 1
        return
    assert hashlib.sha256(result.tobytes()).hexdigest() == case["openpi_pil_sha256_u8_hwc"]
    np.testing.assert_array_equal(result, expected(f"{case['name']}.openpi_pil_u8_hwc"))
    floats = expected(f"{case['name']}.openpi_pil_f32_chw")
    if floats is not None:
        np.testing.assert_array_equal(image_tensor(result).numpy(), floats)


def test_interpolated_images_of_lerobot_and_of_openpis_model(case):
    out, image = case["out"], torch.from_numpy(case["image"]).permute(2, 0, 1)
    lerobot = interpolate_with_pad(image.float() / 255, out, out, 0.0, 1.0) * 2 - 1
    openpi = interpolate_with_pad(image.float() / 255 * 2 - 1, out, out, -1.0, 1.0)
    rounded = interpolate_with_pad(image, out, out, 0, 255)
    for found, name in ((lerobot, "lerobot_f32_chw"), (openpi, "openpi_torch_f32_chw")):
        wanted = expected(f"{case['name']}.{name}")
        if wanted is not None:
            # Floats: the order of additions in the interpolation differs between builds in the last bits.
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6, err_msg=name)
    wanted = expected(f"{case['name']}.openpi_torch_u8_chw")
    if wanted is not None:
        np.testing.assert_array_equal(rounded.numpy(), wanted)


@pytest.mark.parametrize("case", GOLDEN["prompts"]["cases"], ids=lambda case: case["task"].strip()[:20])
def test_prompts_and_state_bins(case):
    for dtype in (np.float32, np.float64) if case["text_float64_state_same"] else (np.float32,):
        state = np.array(case["state"], dtype=dtype)
        assert state_bins(state).tolist() == case["bins_float32"]
        assert prompt_parts(case["task"], state) == (case["text_float32"],)
    assert list(prompt_parts(case["task"], None)) == case["text_no_state_openpi_pi05_libero"]


@pytest.mark.parametrize("example", GOLDEN["normalization"]["examples"], ids=lambda example: str(example["x"]))
@pytest.mark.parametrize("scheme", ["openpi_zscore", "openpi_quantile", "lerobot_mean_std", "lerobot_quantiles"])
def test_normalization_is_exact_in_both_directions(scheme, example):
    stats = read_stats(GOLDEN["normalization"]["stats"], "stats")
    normalizer = Normalizer(scheme, 3, stats, "stats")
    normalized = normalizer.normalize(np.array(example["x"]))
    assert normalized.tolist() == example[scheme]["normalized"]
    assert normalizer.unnormalize(normalized).tolist() == example[scheme]["back"]
    assert normalizer.degenerate() == (2,)


@pytest.mark.parametrize("kind", ["quantile", "zscore"])
def test_padded_model_output_is_cut_before_it_is_unnormalized(kind):
    case = GOLDEN["normalization"]["openpi_unnormalize_padded_model_output"]
    normalizer = Normalizer(f"openpi_{kind}", 3, read_stats(GOLDEN["normalization"]["stats"], "stats"), "stats")
    found = normalizer.unnormalize(np.array(case["x"])[:3])
    assert found.tolist() == case[kind][:3]


def test_aloha_space_in_both_directions():
    case = EXAMPLES["aloha_adapt_to_pi"]
    np.testing.assert_allclose(robots.aloha_state_to_model(case["state_in"]), case["state_out"], rtol=1e-15, atol=1e-15)
    actions = np.array(case["actions_model"])
    commands = robots.aloha_actions_to_robot(actions)
    np.testing.assert_allclose(commands, case["actions_env"], rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(
        robots.aloha_actions_to_model(commands), case["actions_env_back"], rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("case", EXAMPLES["libero_quat_xyzw_to_axisangle"], ids=lambda case: str(case["quat"]))
def test_quaternions_of_libero(case):
    np.testing.assert_allclose(robots.quaternion_to_axis_angle(case["quat"]), case["axisangle"], rtol=1e-12, atol=1e-12)

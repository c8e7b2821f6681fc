"""GR00T N1.5 processing against what NVIDIA's transforms computed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from omega_qvla_core.processing import robots
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.processing.prompt.eagle_prompt import IMAGE_TOKEN, chat_text, expanded_chat, instruction_text
from omega_qvla_core.processing.resize_with_pad import centre_crop_resize, eagle_pixels

FOLDER = Path(__file__).parents[1] / "data" / "golden" / "gr00t" / "preprocess"
GOLDEN = json.loads((FOLDER / "preprocess.json").read_text())
TENSORS = load_file(FOLDER / "preprocess.safetensors")
NORMALIZERS = GOLDEN["normalizers"]
SCHEMES = ["min_max", "q99", "mean_std", "binary"]


def pattern(height: int, width: int, k: int) -> np.ndarray:
    """The fixture's test image, by its formula."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    mixed = (x * (7 + k) + y * 13 + c * 29) ^ ((x * y) >> (3 + k))
    return ((mixed + 90 * ((x // 16 + y // 16) % 2)) & 255).astype(np.uint8)


def checked_pattern(case: dict) -> np.ndarray:
    image = pattern(*case["formula_args"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == case["sha256"]
    return image


def normalizer(scheme: str) -> Normalizer:
    return Normalizer(f"gr00t_{scheme}", 5, read_stats(NORMALIZERS["statistics"], "statistics"), "statistics")


@pytest.mark.parametrize("case", GOLDEN["video"], ids=lambda case: str(case["input"]["formula_args"]))
def test_crops_and_resizes_are_bit_equal(case):
    found = centre_crop_resize(checked_pattern(case["input"]), 224)
    assert list(found.shape) == case["output_shape"]
    assert found[:2, :2].tolist() == case["output_corner"]
    assert hashlib.sha256(found.tobytes()).hexdigest() == case["output_sha256"]


def test_every_stored_image_of_the_fixture():
    stored = {name: value for name, value in TENSORS.items() if name.startswith("video/")}
    assert len(stored) == len(GOLDEN["video"])
    for name, wanted in stored.items():
        size, k = name.split("/")[1].split("_k")
        height, width = map(int, size.split("x"))
        np.testing.assert_array_equal(centre_crop_resize(pattern(height, width, int(k)), 224), wanted, err_msg=name)


def test_pixel_values_of_the_libero_observation():
    images = GOLDEN["libero"]["images"]
    views = [eagle_pixels(centre_crop_resize(checked_pattern(images[key]), 224)).numpy() for key in images]
    np.testing.assert_array_equal(views[0], TENSORS["libero/pixel_values_view0"])
    np.testing.assert_array_equal(views[1][:, :32, :32], TENSORS["libero/pixel_values_view1_top_left_32"])
    sums = [float(view.astype(np.float64).sum()) for view in views]
    np.testing.assert_allclose(sums, GOLDEN["libero"]["result"]["pixel_values_sum_per_view"], rtol=1e-6)


def test_example_pixels():
    case = GOLDEN["eagle_image_processor"]["example_pixels"]
    image = pattern(*case["formula_args"])
    assert image[0, 0:4].tolist() == case["u8[0,0:4,:]"]
    assert eagle_pixels(image)[:, 0, 0:4].tolist() == case["pixel_values[0,:,0,0:4]"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normalizers_are_exact_in_both_directions(scheme):
    x = np.array(NORMALIZERS["x"])
    one = normalizer(scheme)
    forward = one.normalize(x)
    assert forward.tolist() == NORMALIZERS["forward"][scheme]
    assert one.unnormalize(forward).tolist() == NORMALIZERS["inverse_of_forward"][scheme]
    assert one.unnormalize(x).tolist() == NORMALIZERS["inverse_of_x"][scheme]


def test_sine_and_cosine():
    case = GOLDEN["sin_cos"]
    one = Normalizer("gr00t_sin_cos", 3, {}, "state.arm")
    assert one.out_width == 6
    np.testing.assert_allclose(one.normalize(np.array(case["x"])), case["out"], rtol=1e-15)


@pytest.mark.parametrize("case", GOLDEN["prompt"]["cases"], ids=lambda case: case["name"][:40])
def test_chat_texts(case):
    expanded = [text.replace("{256 x <IMG_CONTEXT>}", IMAGE_TOKEN * 256) for text in case["expanded_text"]]
    for row, (instruction, images) in enumerate(zip(case["instruction"], case["n_images"])):
        bracketed = isinstance(instruction, dict)
        plain = instruction["numpy_array"] if bracketed else instruction
        text = instruction_text(plain if isinstance(plain, str) else plain[0], bracketed)
        assert chat_text(text, images) == case["chat_text"][row]
        if row < len(expanded):
            assert expanded_chat(text, images, 256) == expanded[row]


def test_gripper_of_libero():
    case = GOLDEN["libero"]["gripper_cases"]
    assert robots.gripper_command(np.array(case["unnormalized"]), "libero_sign").tolist() == case["env"]
    assert np.isnan(robots.gripper_command(np.array([np.nan]), "libero_sign")).all()
    assert np.isnan(robots.gripper_command(np.array([np.nan]), "binary")).all()


@pytest.mark.parametrize("case", GOLDEN["libero"]["quat_xyzw_to_axis_angle"], ids=lambda case: str(case["quat"]))
def test_quaternions(case):
    np.testing.assert_allclose(
        robots.quaternion_to_axis_angle(case["quat"]), case["axis_angle"], rtol=1e-12, atol=1e-12
    )

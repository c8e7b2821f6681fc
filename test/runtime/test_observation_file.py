"""Observation files come back as they were written, and damaged ones are refused."""

import numpy as np
import pytest

from omega_qvla_core.errors import ObservationError
from omega_qvla_core.runtime import Observation
from omega_qvla_core.runtime.observation_file import load_observations, save_observations


def observation(k, size=8):
    rng = np.random.default_rng(k)
    images = {
        "front": rng.integers(0, 255, (size, size, 3), np.uint8),
        "wrist": rng.integers(0, 255, (4, 6, 3), np.uint8),
    }
    return Observation(images, rng.normal(size=3), f"touch number {k}")


def test_round_trip(tmp_path):
    path = tmp_path / "observations.safetensors"
    written = [observation(k) for k in range(3)]
    save_observations(path, written, ["a", "b", "c"])
    read = load_observations(path)
    assert read.sources == ("a", "b", "c")
    for before, after in zip(written, read.observations, strict=True):
        assert before.instruction == after.instruction
        np.testing.assert_array_equal(before.state, after.state)
        for key in before.images:
            np.testing.assert_array_equal(before.images[key], after.images[key])


def test_observations_of_different_sizes_are_refused(tmp_path):
    with pytest.raises(ObservationError, match="differ"):
        save_observations(tmp_path / "o.safetensors", [observation(0), observation(1, size=9)], ["a", "b"])
    with pytest.raises(ObservationError, match="need as many"):
        save_observations(tmp_path / "o.safetensors", [observation(0)], [])


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ObservationError, match="is not an observation file"):
        load_observations(tmp_path / "missing.safetensors")
    path = tmp_path / "o.safetensors"
    save_observations(path, [observation(0)], ["a"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ObservationError, match="is not an observation file"):
        load_observations(path)

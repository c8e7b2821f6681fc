"""What one account writes, another may read where the umask lets it: a node is often not run by who quantized."""

import os
import stat

import pytest
from test_observation_file import observation

from omega_qvla_core.runtime.observation_file import save_observations
from omega_qvla_core.runtime.random_policy import random_policy
from omega_qvla_core.whole_file import write_whole


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}


def test_weights_and_observations_have_the_mode_of_other_new_files(umask, tmp_path):
    random_policy().save(tmp_path)
    save_observations(tmp_path / "observations.safetensors", [observation(0)], ["a"])
    found = modes(tmp_path)
    assert {"model.safetensors", "observations.safetensors", "config.json"} <= found.keys()
    assert set(found.values()) == {0o666 & ~umask}


def test_a_failed_write_leaves_the_former_file_and_the_next_one_replaces_it(tmp_path):
    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    path = tmp_path / "pack.safetensors"
    path.write_bytes(b"former")
    with pytest.raises(OSError, match="no space"):
        write_whole(path, fail)
    assert path.read_bytes() == b"former"
    write_whole(path, lambda partial: partial.write_bytes(b"newer"))
    assert path.read_bytes() == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

"""A handful of real demonstrations, recorded once per session."""

import pytest

from omega_qvla_core.envs.tabletop.demonstrations import generate
from omega_qvla_core.envs.tabletop.seeds import VALIDATION


@pytest.fixture(scope="session")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    generate(folder, episodes=9, processes=1, seeds=VALIDATION)
    return folder

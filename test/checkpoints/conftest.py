"""Public checkpoint folders, built once and copied for tests that change them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from foundation_folders import BUILDERS


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("foundation")
    return {layout: build(base / layout) for layout, build in BUILDERS.items()}


@pytest.fixture
def copy_of(pristine, tmp_path):
    return lambda layout: Path(shutil.copytree(pristine[layout], tmp_path / layout))

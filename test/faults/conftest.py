"""Environment of the fault suite, set on import (Fast DDS reads its profile once), and the shared processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from omega_qvla_ros.process_environment import enter_ros_environment, free_domain_id

enter_ros_environment(free_domain_id())

from stage import Stage  # noqa: E402 - needs the environment above

from omega_qvla_core.runtime.random_policy import random_policy  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A real checkpoint folder; the scripted policy takes its description only."""
    folder = tmp_path_factory.mktemp("policy") / "random"
    random_policy().save(folder)
    return folder


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory, checkpoint: Path) -> Iterator[Stage]:
    """One robot and one policy process for every row of a module that does not end or replace the process.

    Not for the whole session: it would go on controlling, beside all the tests that follow.
    """
    made = Stage(tmp_path_factory.mktemp("stage"), checkpoint)
    try:
        made.start_policy()
        yield made
    finally:
        made.close()


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    """The shared processes, moving and without a fault."""
    shared_stage.recover()
    return shared_stage


@pytest.fixture
def make_stage(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., Stage]]:
    """Graphs of the test's own, without a policy process."""
    with ExitStack() as stack:

        def make(**options: object) -> Stage:
            # A copy, because the script lies beside it, and the shared process goes on with its own.
            made = Stage(tmp_path, Path(shutil.copytree(checkpoint, tmp_path / "policy" / "random")), **options)
            stack.callback(made.close)
            return made

        yield make

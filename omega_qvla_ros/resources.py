"""Where the package's configuration files are: in a source checkout, a pip install or a colcon install."""

from __future__ import annotations

import difflib
from pathlib import Path

from omega_qvla_core.errors import ConfigError

PACKAGE = "omega_qvla_ros"


def share_directory() -> Path:
    """The folder that holds ``config/`` and ``launch/``.

    An install has it as ``<prefix>/share/omega_qvla_ros`` above this file, a source checkout has it beside the
    package; neither needs an environment variable.

    Raises:
        ConfigError: Neither is there, so the installation is broken.
    """
    here = Path(__file__).resolve()
    for parent in here.parents:
        if parent == here.parents[1] and (parent / "config" / "robots").is_dir():
            return parent
        if (parent / "share" / PACKAGE / "config").is_dir():
            return parent / "share" / PACKAGE
    raise ConfigError(f"no config folder of {PACKAGE} was found above {here}; install the package again")


def config_file(name: str) -> Path:
    """A file of ``config/``, such as ``robots/tabletop.yaml``.

    Raises:
        ConfigError: There is no such file; the message lists those that are there.
    """
    folder = share_directory() / "config"
    path = folder / name
    if not path.is_file():
        found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        raise ConfigError(f"{path} does not exist; {folder} has {', '.join(found)}")
    return path


def resolve_contract(name_or_path: str) -> Path:
    """A contract by path, or by the name of a shipped one (``tabletop``).

    Raises:
        ConfigError: Neither a file nor a shipped name; the message lists the shipped ones.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    robots = share_directory() / "config" / "robots"
    shipped = robots / f"{name_or_path}.yaml"
    if name_or_path and "/" not in name_or_path and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in robots.glob("*.yaml"))
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"contract {name_or_path!r} is neither a file nor a shipped robot; shipped: {', '.join(names)}{hint}"
    )

"""Who may import whom: evaluation, training and commands -> runtime -> quantizer -> kernels and models; never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = "omega_qvla_core"
ROS = "omega_qvla_ros"

# From the bottom up. A package imports from its own line and from those above it here, wherever the import stands.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "strict_json", "strict_yaml", "policy_types", "noise", "whole_file"),
    ("kernels", "models", "processing"),
    ("checkpoints",),
    ("parity",),
    ("quant",),
    ("runtime",),
    ("envs",),
    ("evaluate", "train"),
    ("commands",),
    ("cli",),
)
_RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions and for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import; write the full name")
    return found


def core_files() -> list[Path]:
    return sorted((ROOT / CORE).rglob("*.py"))


def test_layers_name_every_package_of_the_core():
    found = {path.stem for path in (ROOT / CORE).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(_RANK)


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT / CORE)))
def test_core_imports_point_downwards(path: Path):
    own = path.relative_to(ROOT / CORE).with_suffix("").parts[0]
    modules = imported_modules(path)
    assert not [name for name in modules if name.split(".")[0] in (ROS, "rclpy")]
    parts = {name.split(".")[1] for name in modules if name.startswith(f"{CORE}.")}
    upwards = sorted(part for part in parts & _RANK.keys() if own in _RANK and _RANK[part] > _RANK[own])
    assert not upwards, f"{path} imports {', '.join(upwards)}, which build on {own}"


def test_simulator_recorder_and_bags_do_not_import_torch():
    """They run beside the policy on the robot's processor; torch costs each seconds of its start and 200 MB."""
    modules = [f"{ROS}.nodes.mujoco_bridge_node", f"{ROS}.nodes.recorder_node", f"{ROS}.bags.playback", f"{ROS}.demo"]
    script = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stdout + done.stderr

"""What colcon, pip and rosdep see: metadata that agrees, imports that are declared, files that are installed."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import setuptools  # provides distutils, which Python 3.12 no longer has
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# isort: split
from distutils.core import run_setup

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "omega_qvla_ros"
OWN = {"omega_qvla_core", PACKAGE}

# What a module is called where it is not called as it is imported: (name in setup.py or None, key in package.xml).
# None in the first place: comes with ROS only. None in the second: no rosdep key exists, package.xml says so.
THIRD_PARTY = {
    "PIL": ("pillow", "python3-pil"),
    "ament_index_python": ("ros-ament-index-python", "ament_index_python"),
    "apsw": ("apsw", None),
    "control_msgs": (None, "control_msgs"),
    "cv2": ("opencv-python-headless", "python3-opencv"),
    "cv_bridge": ("cv-bridge", "cv_bridge"),
    "imageio": ("imageio", "python3-imageio"),
    "imageio_ffmpeg": ("imageio-ffmpeg", None),
    "launch": (None, "launch"),
    "launch_ros": (None, "launch_ros"),
    "matplotlib": ("matplotlib", "python3-matplotlib"),
    "mujoco": ("mujoco", "python3-mujoco-pip"),
    "numpy": ("numpy", "python3-numpy"),
    "pydantic": ("pydantic", "python3-pydantic"),
    "rich": ("rich", "python3-rich"),
    "rosbags": ("rosbags", None),
    "safetensors": ("safetensors", None),
    "tokenizers": ("tokenizers", None),
    "torch": ("torch", "python3-torch"),
    "triton": ("triton", None),
    "transformers": ("transformers", "python3-transformers-pip"),
    "typer": ("typer", "python3-typer"),
    "yaml": ("pyyaml", "python3-yaml"),
}
# Imported only where the library asks for it by name; an extra of setup.py has it.
OPTIONAL = {"triton"}
ROS_ONLY = re.compile(r"^(rclpy|rcl_interfaces|cv_bridge|launch(_ros)?|ament_index_python|\w+_(msgs|srvs))$")


@pytest.fixture(scope="module")
def distribution():
    """setup.py as a wheel build reads it."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return run_setup("setup.py", script_args=["bdist_wheel"], stop_after="commandline")
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def requirements(distribution) -> dict[str, list[Requirement]]:
    """Every requirement of setup.py and its extras, by canonical name."""
    lines = [
        *distribution.install_requires,
        *(line for extra in distribution.extras_require.values() for line in extra),
    ]
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def third_party(*folders: str) -> set[str]:
    return {name for path in sources(*folders) for name in imports(path)} - set(sys.stdlib_module_names) - OWN


def test_version_and_mail_agree_everywhere(distribution, manifest):
    core = (ROOT / "omega_qvla_core" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "([\d.]+)"$', core, re.MULTILINE).group(1)
    assert distribution.get_version() == manifest.findtext("version") == version
    assert manifest.get("format") == "3"
    # colcon builds a package with a mail address that it calls invalid as plain Python, without ament's hooks.
    mail = manifest.find("maintainer").get("email")
    assert mail == distribution.get_maintainer_email()
    assert re.fullmatch(r"[-a-zA-Z0-9_%+.]+@[-a-zA-Z0-9.]+\.[a-zA-Z]{2,}", mail)


def test_every_import_is_declared_for_pip_and_for_rosdep(distribution, manifest):
    declared = requirements(distribution)
    keys = {element.text for element in manifest if element.tag.endswith("depend")}
    for module in sorted(third_party("omega_qvla_core", PACKAGE, "launch")):
        distribution_name, key = THIRD_PARTY.get(module, ("ros-" + module.replace("_", "-"), module))
        assert distribution_name is None or distribution_name in declared, f"setup.py lacks {module}"
        assert key is None or key in keys, f"package.xml lacks {module}"


def test_the_library_alone_needs_no_extra(distribution):
    installed = {canonicalize_name(Requirement(line).name) for line in distribution.install_requires}
    for module in sorted(third_party("omega_qvla_core") - OPTIONAL):
        distribution_name, _ = THIRD_PARTY.get(module, (module, None))
        assert distribution_name is None or distribution_name in installed, f"install_requires lacks {module}"


def test_core_does_not_import_ros():
    for path in sources("omega_qvla_core"):
        ros = {name for name in imports(path) if ROS_ONLY.match(name)} | (imports(path) & {PACKAGE})
        assert not ros, f"{path.relative_to(ROOT)} imports {', '.join(sorted(ros))}"


def test_rclpy_and_messages_stay_in_nodes_and_msgs():
    for path in sources(PACKAGE):
        relative = path.relative_to(ROOT / PACKAGE)
        if relative.parts[0] == "nodes" or relative.name == "msgs.py":
            continue
        # What launch files share; nothing else imports it, so that nothing else needs launch.
        own = {"launch", "launch_ros", "lifecycle_msgs"} if relative.parts[0] == "bringup" else set()
        ros = {name for name in imports(path) if ROS_ONLY.match(name)} - {"ament_index_python"} - own
        assert not ros, f"{path.relative_to(ROOT)} imports {', '.join(sorted(ros))}"
        if relative.parts[0] != "bringup":
            assert f"{PACKAGE}.bringup" not in path.read_text(encoding="utf-8"), path.relative_to(ROOT)


def test_every_requirement_has_a_pin_within_its_range(distribution, pins):
    by_name: dict[str, list[Requirement]] = {}
    for pin in pins:
        by_name.setdefault(canonicalize_name(pin.name), []).append(pin)
    for name, ranges in requirements(distribution).items():
        if name == "torch":  # pinned by the Makefile, see there
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            by_name[name] = [Requirement(re.search(r"^TORCH \?= (.*)$", makefile, re.MULTILINE).group(1))]
        assert name in by_name, f"constraints.txt lacks {name}"
        for pin in by_name[name]:
            version = Version(str(pin.specifier).removeprefix("=="))
            for requirement in ranges:
                assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_each_python_has_one_pin_for_each_name(pins):
    for python in ("3.10", "3.11", "3.12"):
        environment = {"python_version": python}
        names = [canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_exactly_one_opencv_wheel_and_it_is_headless(distribution, pins):
    names = {canonicalize_name(pin.name) for pin in pins} | set(requirements(distribution))
    assert {name for name in names if name.startswith("opencv")} == {"opencv-python-headless"}


def test_console_scripts_have_their_function(distribution):
    for script in distribution.entry_points["console_scripts"]:
        module, function = script.split("=")[1].strip().split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{script}: {path.relative_to(ROOT)} does not exist"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        assigned = {target.id for target in targets if isinstance(target, ast.Name)}
        assert function in defined | assigned, f"{script}: no {function} in {path.relative_to(ROOT)}"


def test_each_console_script_has_an_executable_for_wheels(distribution):
    names = {script.split("=")[0].strip() for script in distribution.entry_points["console_scripts"]}
    executables = list((ROOT / "scripts" / "executables").iterdir())
    assert {path.name for path in executables} == names
    assert all(path.stat().st_mode & stat.S_IXUSR for path in executables)


def test_wheel_holds_share_executables_and_core_data(tmp_path):
    """The very files: a wheel without the MJCF, a config or the executable bit works in the checkout only."""
    if Version(setuptools.__version__) < Version("70.1") and importlib.util.find_spec("wheel") is None:
        pytest.skip("neither setuptools 70.1 or later nor wheel is installed")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
        + ["build", "--build-base", tmp_path / "build", "bdist_wheel", "--dist-dir", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        mode = {info.filename: info.external_attr >> 16 for info in wheel.infolist()}
    data = next(name.split("/")[0] for name in mode if ".data/data/" in name) + "/data"

    def expected(folder: str, suffixes: set[str] | None = None) -> list[Path]:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return [path.relative_to(ROOT) for path in files if suffixes is None or path.suffix in suffixes]

    for path in [*expected("config"), *expected("launch"), Path("package.xml")]:
        assert f"{data}/share/{PACKAGE}/{path.as_posix()}" in mode
    assert f"{data}/share/ament_index/resource_index/packages/{PACKAGE}" in mode
    for path in [*expected("omega_qvla_core"), *expected(PACKAGE, {".py"})]:
        assert path.as_posix() in mode
    executables = [name for name in mode if name.startswith(f"{data}/lib/{PACKAGE}/")]
    assert f"{data}/lib/{PACKAGE}/policy_node" in executables
    assert all(mode[name] & stat.S_IXUSR for name in executables)
    assert not [name for name in mode if name.startswith(("test/", "launch/", "config/", "scripts/"))]


def test_installed_package_is_found_by_the_ament_index():
    """`make test` and `colcon test` set AMENT_PREFIX_PATH; a bare pytest may not."""
    index = pytest.importorskip("ament_index_python", reason="ament_index_python is not installed")
    try:
        prefix = Path(index.get_package_prefix(PACKAGE))
    except (OSError, LookupError) as error:
        pytest.skip(f"{PACKAGE} is not on AMENT_PREFIX_PATH: {error}")
    share = Path(index.get_package_share_directory(PACKAGE))
    assert (share / "package.xml").is_file()
    for folder in ("launch", "config"):
        wanted = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert wanted and all((share / path).is_file() for path in wanted)
    for executable in (ROOT / "scripts" / "executables").iterdir():
        assert os.access(prefix / "lib" / PACKAGE / executable.name, os.X_OK)
    shown = subprocess.run(
        [prefix / "lib" / PACKAGE / "omega-qvla", "--help"], check=True, capture_output=True, text=True, timeout=60
    )
    assert "quantize" in shown.stdout

"""openpi's PyTorch folders: ``model.safetensors``, ``config.json``, ``assets/<asset_id>/norm_stats.json``."""

from __future__ import annotations

from pathlib import Path

from omega_qvla_core.checkpoints.foundation import FoundationDescription, with_steps
from omega_qvla_core.checkpoints.pi05_sizes import DEFAULT_STEPS
from omega_qvla_core.checkpoints.sidecar import Sidecar
from omega_qvla_core.errors import CheckpointError, ConfigError
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.robot_setup import RobotSetup
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer
from omega_qvla_core.strict_json import read_json

STATS_FILE = "norm_stats.json"


def describe(folder: Path, sidecar: Sidecar, model: Pi05Config) -> FoundationDescription:
    """Everything but the weights.

    Raises:
        CheckpointError: If statistics or tokenizer are missing.
        ConfigError: If the robot is not known, or the parts do not fit together.
    """
    setup = with_steps(sidecar.require_robot(folder, "openpi"), DEFAULT_STEPS)
    state, actions = statistics(folder, setup)
    return FoundationDescription(
        name=sidecar.name,
        family="pi05",
        model=model,
        policy=setup,
        state=state,
        actions=actions,
        tokenizer=TextTokenizer.load(sidecar.tokenizer, "pi05"),
    )


def statistics(folder: Path, setup: RobotSetup) -> tuple[VectorNormalizer, VectorNormalizer]:
    """Normalization of state and actions.

    Raises:
        CheckpointError: If there is no file, or several and the setup does not say which.
        ConfigError: If a field is missing, of the wrong width or not finite.
    """
    path = stats_path(folder, setup.asset_id)
    data = read_json(path, "the normalization")
    groups = data.get("norm_stats") if isinstance(data, dict) else None
    if not isinstance(groups, dict):
        raise ConfigError(f"{path}: norm_stats is missing; is it openpi's file?")
    scheme = f"openpi_{setup.openpi_normalization}"
    found = []
    for key, names in (("state", setup.state_names), ("actions", setup.action_names)):
        where = f"{path}: norm_stats.{key}"
        if key not in groups:
            raise ConfigError(f"{where} is missing; recompute the statistics")
        # openpi cuts statistics that were taken of padded vectors.
        stats = read_stats(groups[key], where, width=len(names))
        found.append(VectorNormalizer((Normalizer(scheme, len(names), stats, where),), names))
    return found[0], found[1]


def stats_path(folder: Path, asset_id: str | None) -> Path:
    """The statistics' file below ``assets``, or beside the weights.

    Raises:
        CheckpointError: If there is none, or several and ``asset_id`` does not say which.
    """
    assets = folder / "assets"
    if asset_id is not None:
        path = assets / asset_id / STATS_FILE
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: robot.asset_id is {asset_id!r}; fetch it, or name another one")
        return path
    found = sorted(assets.rglob(STATS_FILE)) if assets.is_dir() else []
    if len(found) > 1:
        ids = ", ".join(path.parent.relative_to(assets).as_posix() for path in found)
        raise CheckpointError(f"{assets} holds statistics of several robots ({ids}); set robot.asset_id to one of them")
    if found:
        return found[0]
    if (folder / STATS_FILE).is_file():
        return folder / STATS_FILE
    raise CheckpointError(f"{assets}/*/{STATS_FILE} is missing: the normalization is read from it; fetch the assets")

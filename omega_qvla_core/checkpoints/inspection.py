"""What a checkpoint holds, read from its headers and small files: no weight is read, so any machine can do it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omega_qvla_core.checkpoints import lerobot, nvidia
from omega_qvla_core.checkpoints.description import read_description
from omega_qvla_core.checkpoints.layouts import PACK_FILE, detect
from omega_qvla_core.checkpoints.loading import Headers, describe, read_headers
from omega_qvla_core.checkpoints.pi05_sizes import DEFAULT_STEPS, number
from omega_qvla_core.checkpoints.tensor_names import model_names
from omega_qvla_core.checkpoints.weight_files import WeightFiles, read_header
from omega_qvla_core.errors import OmegaQVLAError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.processing.robot_setup import RobotSetup

UNUSED = "stored, never read"

# First match counts.
_PARTS = {
    "pi05": (
        (re.compile(r"\.vision_tower\."), "vision tower"),
        (re.compile(r"\.multi_modal_projector\."), "projector"),
        (re.compile(r"\.language_model\."), "language tower"),
        (re.compile(r"paligemma\.lm_head\."), "token table"),
        (re.compile(r"\.gemma_expert\.model\."), "action expert"),
        (re.compile(r"^(action|time)_"), "action and time projections"),
    ),
    "gr00t_n15": (
        (re.compile(r"\.eagle_model\.vision_model\."), "vision tower"),
        (re.compile(r"\.mlp1\.|\.eagle_linear\."), "projector"),
        (re.compile(r"\.embed_tokens\."), "token table"),
        (re.compile(r"\.eagle_model\.language_model\."), "language tower"),
        (re.compile(r"^action_head\.(vlln|vl_self_attention)\."), "adapter"),
        (re.compile(r"^action_head\.model\."), "diffusion transformer"),
        (re.compile(r"^action_head\."), "state and action encoders"),
    ),
}

_LINEARS = r"\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)\.weight$"
_DIT_LINEARS = r"(?:attn1\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2))\.weight$"
# Linears that are quantized, by side (METHOD A.9).
_SCOPE = {
    "pi05": {
        "language": re.compile(rf"\.paligemma\.model\.language_model\.layers\.\d+{_LINEARS}"),
        "action_head": re.compile(rf"\.gemma_expert\.model\.layers\.\d+{_LINEARS}"),
    },
    "gr00t_n15": {
        "language": re.compile(rf"^backbone\.eagle_model\.language_model\..*layers\.\d+{_LINEARS}"),
        "action_head": re.compile(rf"^action_head\.model\.transformer_blocks\.\d+\.{_DIT_LINEARS}"),
    },
}


@dataclass(frozen=True)
class PartSize:
    """Elements of one part, and their bytes in the files."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class ScopedLinear:
    """One linear that is quantized.

    Attributes:
        name: Module name.
        side: ``language`` or ``action_head``.
        out_features: Rows O.
        in_features: Columns I.
        bias: Whether it has one.
    """

    name: str
    side: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        folder: The checkpoint.
        name: Of the checkpoint.
        family: ``pi05`` or ``gr00t_n15``.
        layout: See ``layouts``.
        files: File name -> bytes.
        parts: Part -> size, in the order of the computation.
        linears: In scope of the quantizer.
        cameras: Camera keys of the robot, or the checkpoint's own names where no robot is known.
        dimensions: Name -> number, such as ``action_dim``.
        num_steps: Denoise steps.
        notes: What the files do not say, as one-line texts.
    """

    folder: Path
    name: str
    family: str
    layout: str
    files: Mapping[str, int]
    parts: Mapping[str, PartSize]
    linears: tuple[ScopedLinear, ...]
    cameras: tuple[str, ...]
    dimensions: Mapping[str, int]
    num_steps: int
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        """Elements of all tensors in the files."""
        return sum(part.parameters for part in self.parts.values())


def inspect_checkpoint(folder: Path, robot: RobotSetup | str | Path | None = None) -> Inspection:
    """Read headers and small files of any checkpoint or pack.

    Raises:
        CheckpointError: If the folder holds no whole checkpoint.
        ConfigError: If a configuration is not valid.
    """
    if (folder / PACK_FILE).is_file():
        return _inspect_pack(folder)
    headers = read_headers(folder, robot)
    family = headers.detected.family
    cameras, steps, extra, notes = _robot_side(headers)
    return Inspection(
        folder=folder,
        name=headers.sidecar.name,
        family=family,
        layout=headers.detected.layout,
        files={path.name: path.stat().st_size for path in headers.weights.files},
        parts=part_sizes(headers.weights, family),
        linears=scoped_linears(headers.weights, family),
        cameras=cameras,
        dimensions={**_model_dimensions(headers), **extra},
        num_steps=steps,
        notes=notes,
    )


def part_sizes(weights: WeightFiles, family: str) -> dict[str, PartSize]:
    """Size of every part of a model, unused tensors on their own."""
    owners = {file_name: name for name, file_name in model_names(weights.tensors, family, weights.source).items()}
    order = [part for _, part in _PARTS[family]] + ["other", UNUSED]
    sizes = {part: [0, 0] for part in order}
    for file_name, stored in weights.tensors.items():
        name = owners.get(file_name)
        size = sizes[UNUSED if name is None else part_of(name, family)]
        size[0] += stored.elements
        size[1] += stored.bytes
    return {part: PartSize(*size) for part, size in sizes.items() if size[0]}


def part_of(name: str, family: str) -> str:
    """Part of a model that one of its tensors belongs to."""
    return next((part for pattern, part in _PARTS[family] if pattern.search(name)), "other")


def scoped_linears(weights: WeightFiles, family: str) -> tuple[ScopedLinear, ...]:
    """Linears in scope of the quantizer: 252 in Pi 0.5 and 180 in GR00T N1.5 at full size."""
    names = model_names(weights.tensors, family, weights.source)
    found = []
    for name, file_name in names.items():
        side = next((side for side, pattern in _SCOPE[family].items() if pattern.search(name)), None)
        shape = weights.tensors[file_name].shape
        if side is not None and len(shape) == 2:
            module = name.removesuffix(".weight")
            found.append(ScopedLinear(module, side, shape[0], shape[1], f"{module}.bias" in names))
    return tuple(found)


def _inspect_pack(folder: Path) -> Inspection:
    """A pack: what is quantized and what is not; its linears are gone."""
    detected = detect(folder)
    description = read_description(folder)
    path = folder / PACK_FILE
    sizes: dict[str, list[int]] = {}
    for name, stored in read_header(path).items():
        kind, _, rest = name.partition(".")
        part = f"quantized {name.rpartition('.')[2]}" if kind == "quantized" else part_of(rest, detected.family)
        size = sizes.setdefault(part, [0, 0])
        size[0] += stored.elements
        size[1] += stored.bytes
    spec = description.spec()
    return Inspection(
        folder=folder,
        name=description.name,
        family=detected.family,
        layout="pack",
        files={path.name: path.stat().st_size},
        parts={part: PartSize(*size) for part, size in sorted(sizes.items())},
        linears=(),
        cameras=tuple(camera.key for camera in spec.cameras),
        dimensions={
            "state": len(spec.state_names),
            "actions": len(spec.action_names),
            "horizon": spec.horizon,
            "max_tokens": spec.max_tokens,
        },
        num_steps=spec.num_steps,
        notes=("a pack is quantized already; parts count stored elements, two 4-bit codes in one byte",),
    )


def _model_dimensions(headers: Headers) -> dict[str, int]:
    model = headers.model
    found = {
        "horizon": model.action_horizon,
        "action_dim": model.action_dim,
        "image_size": model.vision.image_size,
    }
    if isinstance(model, Gr00tConfig):
        return {**found, "state_dim": model.state_dim, "embodiments": model.num_embodiments}
    return {**found, "max_tokens": model.max_token_len}


def _robot_side(headers: Headers) -> tuple[tuple[str, ...], int, dict[str, int], tuple[str, ...]]:
    """Cameras, denoise steps, dimensions and notes; what cannot be known without a robot setup is a note."""
    try:
        spec = describe(headers).spec()
    except OmegaQVLAError as error:
        return _stated_cameras(headers), _stated_steps(headers), {}, (f"not ready to run: {error}",)
    vectors = {"state": len(spec.state_names), "actions": len(spec.action_names)}
    return tuple(camera.key for camera in spec.cameras), spec.num_steps, vectors, ()


def _stated_cameras(headers: Headers) -> tuple[str, ...]:
    if headers.sidecar.robot is not None:
        return tuple(camera.key for camera in headers.sidecar.robot.cameras)
    if headers.detected.layout == "lerobot":
        return lerobot.camera_features(headers.detected.config, str(headers.folder / "config.json"))
    return ()


def _stated_steps(headers: Headers) -> int:
    config, robot = headers.detected.config, headers.sidecar.robot
    if robot is not None and robot.num_steps is not None:
        return robot.num_steps
    where = str(headers.folder / "config.json")
    if headers.detected.layout == "nvidia":
        found = config["action_head_cfg"].get("num_inference_timesteps", nvidia.DEFAULT_STEPS)
        return number(found, "num_inference_timesteps", where)
    return number(config.get("num_inference_steps", DEFAULT_STEPS), "num_inference_steps", where)

"""Calibrate a Pi 0.5 that does not fit into memory: layer after layer from disk, activations in files between layers.

The language tower runs one layer at a time over all observations; keys and values of every layer go to disk. Then the
denoise loop runs once with the action expert in memory (a tenth of the model), and what goes into each step is kept.
With that, the steps no longer wait for each other: every expert layer runs over all steps before the next one. So only
the statistics of one layer are in memory at a time.

Everything comes out as ``calibrate`` gives it in memory, bit for bit. What a layer left in its file is found again
after a kill; nothing is computed twice but the layer that was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla_core.checkpoints.loading import Description
from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_layers import expert_input, expert_layer, language_layer
from omega_qvla_core.models.pi05_prefix import Prefix, PrefixCache
from omega_qvla_core.models.prefix_masks import host_all
from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.calibrate import RESERVOIR_TOKENS, Calibration, calibrate
from omega_qvla_core.quant.pack import model_without_weights
from omega_qvla_core.quant.part_files import read_info, write_unit
from omega_qvla_core.quant.policy import BATCH, MIN_OBSERVATIONS, calibration_manifest
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import SIDES, InputSite
from omega_qvla_core.quant.statistics import SiteStatistics
from omega_qvla_core.quant.streaming_source import CheckpointSource

_VISION = "paligemma_with_expert.paligemma.model"
_TABLE = "paligemma_with_expert.paligemma.lm_head"
_LANGUAGE = f"{_VISION}.language_model.layers"
_EXPERT = "paligemma_with_expert.gemma_expert.model"


@dataclass(frozen=True)
class _Stage:
    """One layer of one tower.

    Attributes:
        tower: ``language`` or ``expert``.
        index: Of the layer.
        sites: Input sites of the layer.
        first: Number of sites in the stages before; seeds of the token samples follow from it.
    """

    tower: str
    index: int
    sites: tuple[InputSite, ...]
    first: int


class LayerwiseCalibration:
    """Statistics by site name, made when they are asked for; sites must be asked for in model order.

    Args:
        description: Of the policy.
        source: Its tensors.
        recipe: Says which tensors stay, and in which type they are stored: calibration sees them rounded to it.
        sites: In model order.
        observations: At least ``MIN_OBSERVATIONS``.
        folder: For activations between layers; belongs to this calibration alone.
        device: Where layers run.
        seed: As in ``quantize_policy``.
        reservoir_tokens: As in ``calibrate``.

    Raises:
        QuantizationError: Too few observations, another model than Pi 0.5, or scope ``whole``.
    """

    def __init__(
        self,
        description: Description,
        source: CheckpointSource,
        recipe: Recipe,
        sites: Sequence[InputSite],
        observations: Sequence[Observation],
        folder: Path,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        reservoir_tokens: int = RESERVOIR_TOKENS,
    ) -> None:
        if len(observations) < MIN_OBSERVATIONS:
            raise QuantizationError(
                f"{len(observations)} calibration observations; at least {MIN_OBSERVATIONS} are needed, 128 are better"
            )
        if recipe.whole is not None:
            raise QuantizationError(
                f"recipe {recipe.name!r} has scope 'whole', which is calibrated in memory only; use "
                "`omega-qvla quantize`, a recipe of scope 'paper', or 'rtn_whole', which needs no calibration"
            )
        self.reservoir_tokens, self.seed = reservoir_tokens, seed
        self._recipe, self._source, self._folder, self._device = recipe, source, folder, torch.device(device)
        model = model_without_weights(description.model)
        if not isinstance(model, Pi05):
            raise QuantizationError(
                f"{description.name} is no Pi 0.5; only that is calibrated layer by layer: quantize it in memory"
            )
        self._model = model.requires_grad_(False).eval()
        self._spec, self._processor = description.spec(), description.processor()
        self._noise_shape = (description.model.action_horizon, description.model.action_dim)
        self._sides = {reader: site.side for site in sites for reader in site.readers}
        size = BATCH[self._spec.family]
        self._batches = [observations[start : start + size] for start in range(0, len(observations), size)]
        self._stages = _stages(sites, len(model.language_model.layers))
        self._expert_filled = False
        self._current: tuple[_Stage, Calibration] | None = None
        self.manifest = calibration_manifest(observations, seed, reservoir_tokens)
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> SiteStatistics:
        """Statistics of a site; its layer runs if it has not just run."""
        if self._current is None or name not in self._current[1]:
            stage = next(stage for stage in self._stages if any(site.name == name for site in stage.sites))
            self._current = None
            with torch.no_grad():
                self._current = stage, self._calibrated(stage)
        return self._current[1][name]

    def _calibrated(self, stage: _Stage) -> Calibration:
        position = self._stages.index(stage)
        for index in self._missing(position):
            self._run(self._stages[index], watched=False)
        calibration = self._run(stage, watched=True)
        if position > 1:
            # The layer before this one has its units on disk by now, so that its input is not needed any more.
            self._path(self._stages[position - 2], "x").unlink(missing_ok=True)
        return calibration

    def _missing(self, position: int) -> range:
        """Stages before ``position`` whose outputs are not on disk."""
        start = position
        while start and read_info(self._path(self._stages[start - 1], "x")) is None:
            start -= 1
        return range(start, position)

    def _run(self, stage: _Stage, watched: bool) -> Calibration:
        self._prepare(stage)
        sites = stage.sites if watched else ()
        with calibrate(
            self._model, sites, reservoir_tokens=self.reservoir_tokens, seed=self.seed + stage.first
        ) as calibration:
            run = self._language if stage.tower == "language" else self._expert
            run(stage, calibration)
        if stage.tower == "language":
            self._model.language_model.layers[stage.index].to("meta")
        return calibration

    def _prepare(self, stage: _Stage) -> None:
        if read_info(self._folder / "prefix.safetensors") is None:
            self._embed()
        if stage.tower == "language":
            self._fill(f"{_LANGUAGE}.{stage.index}")
            return
        if not self._expert_filled:
            for name in (_EXPERT, "action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
                self._fill(name)
            self._expert_filled = True
        if read_info(self._folder / "steps.safetensors") is None:
            self._denoise()

    def _embed(self) -> None:
        """Vision and token table run over all observations; then they are let go."""
        names = [f"{_VISION}.vision_tower", _TABLE]
        names += (
            [f"{_VISION}.multi_modal_projector"]
            if self._model.paligemma_with_expert.paligemma.model.multi_modal_projector
            else []
        )
        for name in names:
            self._fill(name)
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(self._batches):
            prefix = self._processor.prepare(batch, self._device).embed(self._model)
            tensors[f"x.{number}"], tensors[f"mask.{number}"] = prefix.embeddings, prefix.pad_mask
        self._write(self._folder / "prefix.safetensors", tensors)
        for name in names:
            self._model.get_submodule(name).to("meta")

    def _language(self, stage: _Stage, calibration: Calibration) -> None:
        source = self._input_of(stage)
        outputs: dict[str, Tensor] = {}
        past: dict[str, Tensor] = {}
        for number in range(len(self._batches)):
            prefix = self._prefix(number)
            with calibration.token_mask(prefix.pad_mask):
                x, key, value = language_layer(self._model, stage.index, self._read(source, f"x.{number}"), prefix)
            outputs[f"x.{number}"], past[f"k.{number}"], past[f"v.{number}"] = x.cpu(), key.cpu(), value.cpu()
        self._write(self._path(stage, "kv"), past)
        self._write(self._path(stage, "x"), outputs)

    def _denoise(self) -> None:
        """The whole loop once, to learn what goes into every step."""
        steps: dict[str, Tensor] = {}
        language = [stage for stage in self._stages if stage.tower == "language"]
        for number, batch in enumerate(self._batches):
            prefix = self._prefix(number)
            keys, values = (
                tuple(self._read(self._path(stage, "kv"), f"{kind}.{number}") for stage in language) for kind in "kv"
            )
            cache = PrefixCache(keys, values, prefix.pad_mask, None, prefix.complete)
            x_t = self._noise(number, len(batch))
            for step in self._model.denoise(cache, x_t, self._spec.num_steps):
                steps[f"x_t.{number}.{step.index}"], x_t = x_t.cpu(), step.actions
        self._write(self._folder / "steps.safetensors", steps)

    def _expert(self, stage: _Stage, calibration: Calibration) -> None:
        source, total = self._input_of(stage), self._spec.num_steps
        conditions = self._model.step_conditions(total)
        past = self._path(_Stage("language", stage.index, (), 0), "kv")
        outputs: dict[str, Tensor] = {}
        for number in range(len(self._batches)):
            prefix = self._prefix(number)
            keys_values = (self._read(past, f"k.{number}"), self._read(past, f"v.{number}"))
            for step in range(total):
                with denoise_step(step, total):
                    x = self._read(source, f"x_t.{number}.{step}" if stage.index == 0 else f"x.{number}.{step}")
                    if stage.index == 0:
                        x = expert_input(self._model, x, keys_values[0].dtype)
                    x = expert_layer(self._model, stage.index, x, conditions[step], keys_values, prefix)
                outputs[f"x.{number}.{step}"] = x.cpu()
        self._write(self._path(stage, "x"), outputs)

    def _input_of(self, stage: _Stage) -> Path:
        if stage.index:
            return self._path(_Stage(stage.tower, stage.index - 1, (), 0), "x")
        return self._folder / ("prefix.safetensors" if stage.tower == "language" else "steps.safetensors")

    def _path(self, stage: _Stage, what: str) -> Path:
        return self._folder / f"{stage.tower}_{stage.index:03d}_{what}.safetensors"

    def _prefix(self, number: int) -> Prefix:
        mask = self._read(self._folder / "prefix.safetensors", f"mask.{number}")
        # Positions and masks are all that a layer reads of it.
        return Prefix(mask.new_empty(0), mask, complete=host_all(mask))

    def _noise(self, number: int, count: int) -> Tensor:
        first = self.seed + number * len(self._batches[0])
        rows = [
            torch.randn(self._noise_shape, generator=torch.Generator().manual_seed(first + index))
            for index in range(count)
        ]
        return torch.stack(rows).to(self._device)

    def _fill(self, prefix: str) -> None:
        """Read the tensors of a module, rounded as ``round_unquantized`` rounds those that stay."""
        module = self._model.get_submodule(prefix)
        for key in module.state_dict():
            name = f"{prefix}.{key}"
            tensor = self._source.get(name)
            if tensor.is_floating_point():
                tensor = self._rounded(name, tensor.float())
                if not torch.isfinite(tensor).all():
                    raise QuantizationError(f"{name} holds NaN, Inf or values beyond its type; check the checkpoint")
            path, _, leaf = key.rpartition(".")
            owner, tensor = module.get_submodule(path), tensor.to(self._device)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        owner = name.rpartition(".")[0]
        side = self._sides.get(owner)
        if side is not None and self._recipe.resolve(owner, side).quantized:
            return tensor
        return tensor.to(torch.float16 if side in SIDES else getattr(torch, self._recipe.unquantized_dtype)).float()

    def _read(self, path: Path, name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_tensor(name).to(self._device, copy=True)
        except (SafetensorError, OSError) as error:
            raise QuantizationError(f"{path} is damaged ({error}); delete its folder and run again") from error

    @staticmethod
    def _write(path: Path, tensors: dict[str, Tensor]) -> None:
        write_unit(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {})


def _stages(sites: Sequence[InputSite], depth: int) -> tuple[_Stage, ...]:
    return tuple(_with_sites(sites, depth))


def _with_sites(sites: Sequence[InputSite], depth: int) -> Iterator[_Stage]:
    first = 0
    for tower, layers in (("language", _LANGUAGE), ("expert", f"{_EXPERT}.layers")):
        for index in range(depth):
            own = tuple(site for site in sites if site.name.startswith(f"{layers}.{index}."))
            yield _Stage(tower, index, own, first)
            first += len(own)

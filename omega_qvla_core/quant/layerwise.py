"""Calibrate a model that does not fit into memory: layer after layer from disk, activations in files between layers.

A family's stages (``layerwise_pi05``, ``layerwise_gr00t``) run one after the other, each over all observations and with
its own weights alone; the denoise loop runs once with the action head in memory, and what goes into each step is kept.
With that, the steps no longer wait for each other: every layer of the head runs over all steps before the next one. So
only the statistics of one layer are in memory at a time.

Everything comes out as ``calibrate`` gives it in memory, bit for bit. What a stage left in its files is found again
after a kill; nothing is computed twice but the stage that was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from omega_qvla_core.checkpoints.loading import Description
from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.calibrate import RESERVOIR_TOKENS, Calibration, calibrate
from omega_qvla_core.quant.layerwise_files import ActivationFiles, Parts, StageWeights
from omega_qvla_core.quant.layerwise_gr00t import Gr00tStages
from omega_qvla_core.quant.layerwise_pi05 import Pi05Stages
from omega_qvla_core.quant.layerwise_stages import Work
from omega_qvla_core.quant.pack import model_without_weights
from omega_qvla_core.quant.policy import BATCH, MIN_OBSERVATIONS, calibration_manifest
from omega_qvla_core.quant.recipe import Recipe
from omega_qvla_core.quant.scope import InputSite
from omega_qvla_core.quant.statistics import SiteStatistics
from omega_qvla_core.quant.streaming_source import CheckpointSource


class LayerwiseCalibration:
    """Statistics by site name, made when they are asked for; sites must be asked for by rising ``stage_of``.

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
        parts: What scope ``whole`` puts in the place of modules (needed for it alone); asked for when a stage runs.

    Attributes:
        manifest: What the calibration sees: observations, hashes, seeds.
        reservoir_tokens: As given.

    Raises:
        QuantizationError: Too few observations.
        ObservationError: An observation does not fit the policy.
        InstructionError: An instruction does not.
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
        parts: Parts | None = None,
    ) -> None:
        if len(observations) < MIN_OBSERVATIONS:
            raise QuantizationError(
                f"{len(observations)} calibration observations; at least {MIN_OBSERVATIONS} are needed, 128 are better"
            )
        self.reservoir_tokens, self._seed = reservoir_tokens, seed
        spec, processor = description.spec(), description.processor()
        size, device = BATCH[spec.family], torch.device(device)
        batches = [observations[start : start + size] for start in range(0, len(observations), size)]
        for batch in batches:
            # Before hours of work, not when their turn comes.
            processor.prepare(batch)
        self._model = model_without_weights(description.model).requires_grad_(False).eval()
        self._weights = StageWeights(
            self._model, source, recipe, sites, None if recipe.whole is None else parts, device
        )
        self._files = ActivationFiles(folder, device)
        work = Work(self._model, processor, batches, spec.num_steps, seed, device, self._files, tuple(sites))
        family = Pi05Stages if isinstance(self._model, Pi05) else Gr00tStages
        self._stages = tuple(family(work).stages())
        self._stage_of = {site.name: index for index, stage in enumerate(self._stages) for site in stage.sites}
        self._writer = {file: index for index, stage in enumerate(self._stages) for file in stage.writes}
        self._last_reader = {file: index for index, stage in enumerate(self._stages) for file in stage.reads}
        self._numbers = self._in_order_of_sight()
        self._current: tuple[int, Calibration] | None = None
        self.manifest = calibration_manifest(observations, seed, reservoir_tokens)

    def __getitem__(self, name: str) -> SiteStatistics:
        """Statistics of a site; its stage runs if it has not just run."""
        stage = self._stage_of[name]
        if self._current is None or self._current[0] != stage:
            self._current = None
            with torch.no_grad():
                self._current = stage, self._run(stage, watched=True)
        return self._current[1][name]

    def stage_of(self, name: str) -> int:
        """Number of the stage that sees a site."""
        return self._stage_of[name]

    def _run(self, index: int, watched: bool) -> Calibration:
        """Run a stage, after those whose files it misses."""
        stage = self._stages[index]
        for file in stage.reads:
            if not self._files.has(file):
                self._run(self._writer[file], watched=False)
        self._weights.fill(stage.modules)
        with calibrate(
            self._model,
            stage.sites if watched else (),
            reservoir_tokens=self.reservoir_tokens,
            seed=self._seed,
            numbers=self._numbers,
        ) as calibration:
            written = stage.run(calibration)
        self._weights.empty(stage.modules)
        for file, tensors in written.items():
            if file in self._last_reader:
                self._files.write(file, tensors)
        # The sites of a watched stage are not on disk yet: cut off now, it has to run again and reads its files again.
        self._forget(index - 1 if watched else index)
        return calibration

    def _forget(self, index: int) -> None:
        """Remove the files that no stage after ``index`` reads."""
        for file, last in self._last_reader.items():
            if last <= index:
                self._files.remove(file)

    def _in_order_of_sight(self) -> dict[str, int]:
        """Number of every site in the order in which a model in memory comes to them in its first batch."""
        outside = [site.name for stage in self._stages for site in stage.outside]
        inside = [site.name for stage in self._stages for site in stage.inside]
        return {name: number for number, name in enumerate([*outside, *inside])}

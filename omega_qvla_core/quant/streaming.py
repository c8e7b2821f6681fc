"""Quantize a checkpoint that need not fit into memory: unit by unit from disk, finished units are kept.

A unit is an input site, a part of scope ``whole``, or a handful of tensors that stay. For each one only its own tensors
are read, and its own file is written; at the end the files become one pack, the same as ``save_pack`` writes. After a
kill the same call goes on where it was.

Recipes without calibration (``rtn``, ``rtn_whole``) need nothing else. Others take observations, and the model is
calibrated layer by layer too (see ``layerwise``), or a ``Calibration`` of the same model, which somebody with enough
memory has made.
"""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from omega_qvla_core.checkpoints.description import write_description
from omega_qvla_core.checkpoints.families import family_of_config
from omega_qvla_core.checkpoints.folder import PACK_FILE
from omega_qvla_core.checkpoints.loading import Description, Headers, describe, read_headers
from omega_qvla_core.checkpoints.strict_loading import matching_names
from omega_qvla_core.errors import QuantizationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.processing.robot_setup import RobotSetup
from omega_qvla_core.quant.auto import choose
from omega_qvla_core.quant.build import build_site
from omega_qvla_core.quant.calibrate import Calibration
from omega_qvla_core.quant.layerwise import LayerwiseCalibration
from omega_qvla_core.quant.memory import meta_model
from omega_qvla_core.quant.pack import PACK_FORMAT, description_hash, model_hash
from omega_qvla_core.quant.part_files import claim_folder, merge_units, read_info, remove_folder, write_unit
from omega_qvla_core.quant.parts import StoredPart, replace_module
from omega_qvla_core.quant.quantize import Progress, check_overrides, split_site
from omega_qvla_core.quant.recipe import FLOAT_BITS, Recipe, SideRecipe
from omega_qvla_core.quant.record import QuantizationRecord
from omega_qvla_core.quant.scope import SIDES, InputSite, find_sites
from omega_qvla_core.quant.solver import SOLVERS_WITH_HESSIAN
from omega_qvla_core.quant.streaming_source import CheckpointSource, Probe
from omega_qvla_core.quant.streaming_units import (
    FLOATS,
    TABLES,
    Unit,
    own_tensors,
    part_tensors,
    read_part,
    units_of,
)
from omega_qvla_core.quant.whole import (
    build_whole_part,
    contract_embodiment,
    kept_embodiments,
    modulation_rows,
    step_device_names,
    table_names,
    unread_names,
)
from omega_qvla_core.strict_json import dataclass_to_json

UNITS_FOLDER = "units"
_ACTIVATIONS_FOLDER = "activations"

_PROBE_NOTE = "no calibration: the error is on random normal inputs"


@dataclass(frozen=True)
class StreamResult:
    """What a run did.

    Attributes:
        pack: The pack.
        units: Units of the model.
        resumed: Units that an earlier run had finished.
        seconds: Of this run.
        peak_bytes: Largest resident memory of this process so far.
        file_bytes: Size of the pack.
        worst: Site of the largest error, and that error.
    """

    pack: Path
    units: int
    resumed: int
    seconds: float
    peak_bytes: int
    file_bytes: int
    worst: tuple[str, float]


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything in a recipe is chosen by what the model sees."""
    sides = [recipe.language, recipe.action_head]
    if recipe.whole is not None:
        sides += [recipe.whole.vision, recipe.whole.adapter]
    return recipe.auto is not None or any(_side_needs_calibration(side) for side in sides)


def _side_needs_calibration(side: SideRecipe) -> bool:
    if not side.quantized:
        return False
    by_activation = side.permutation != "none" and side.permutation_score != "weight"
    fitted = side.activation_bits != FLOAT_BITS and (
        side.activation.startswith("static") or side.clip != "absmax" or side.per_step
    )
    return bool(
        side.smoothing is not None or side.solver in SOLVERS_WITH_HESSIAN or side.centring or by_activation or fitted
    )


def quantize_checkpoint(
    folder: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    robot: RobotSetup | str | Path | None = None,
    tokenizer: Path | None = None,
    calibration: Calibration | None = None,
    manifest: dict[str, Any] | None = None,
    observations: Sequence[Observation] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> StreamResult:
    """Quantize an unquantized checkpoint folder of any layout into a pack.

    Args:
        folder: The checkpoint; its files are read tensor by tensor.
        recipe: How. Without ``calibration`` one that needs none.
        out: Folder of the pack. ``units`` in it holds what is finished until the pack is whole.
        robot: As in ``Policy.load``.
        tokenizer: As in ``Policy.load``.
        calibration: Statistics over the sites of the same model.
        manifest: What the calibration saw (observations, hashes, seeds); goes into the pack as it is.
        observations: To calibrate on, layer by layer, instead of ``calibration``.
        device: Where layers are calibrated and quantized; only what one layer needs is there.
        progress: Called with (done, total, what is next).

    Raises:
        QuantizationError: The recipe needs a calibration, or a layer cannot be done as it asks.
        PackError: ``out`` holds units of another recipe, checkpoint, robot setup or calibration.
        CheckpointError: The checkpoint is damaged or of another model than its configuration says.
        ConfigError: A configuration is not valid.
        ObservationError: An observation to calibrate on does not fit the policy; InstructionError: its text does not.
    """
    started = time.monotonic()
    if calibration is not None and observations is not None:
        raise QuantizationError("observations and a calibration were given; give one of them")
    if recipe.auto is not None and recipe.auto.byte_budget is not None:
        raise QuantizationError(
            f"recipe {recipe.name!r} has a byte budget, which is spent over all layers at once; quantize in memory, or "
            "leave the budget out"
        )
    if calibration is None and observations is None and needs_calibration(recipe):
        raise QuantizationError(
            f"recipe {recipe.name!r} is fitted to what the model sees; give a calibration, use 'rtn' or 'rtn_whole', "
            "or quantize in memory"
        )
    job = _Job(read_headers(Path(folder), robot, tokenizer), recipe, calibration, manifest, Path(out), device)
    if observations is not None:
        job.calibrate_on(observations)
    resumed = job.run(progress)
    job.finish()
    return StreamResult(
        pack=job.pack,
        units=len(job.units),
        resumed=resumed,
        seconds=time.monotonic() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        file_bytes=job.pack.stat().st_size,
        worst=job.worst,
    )


class _Job:
    """One checkpoint on its way into a pack."""

    def __init__(
        self,
        headers: Headers,
        recipe: Recipe,
        calibration: Calibration | LayerwiseCalibration | None,
        manifest: dict[str, Any] | None,
        out: Path,
        device: str | torch.device,
    ) -> None:
        self.device = torch.device(device)
        self.recipe, self.calibration, self.manifest = recipe, calibration, manifest
        self.description: Description = describe(headers)
        self.model = meta_model(headers.model).requires_grad_(False)
        family = family_of_config(headers.model)
        self.source = CheckpointSource(
            headers.weights, matching_names(self.model.state_dict(), headers.weights, family)
        )
        self.sites = find_sites(self.model, whole=recipe.whole is not None)
        check_overrides(recipe, self.sites)
        self.num_steps = self.description.spec().num_steps
        self.kept: tuple[int, ...] = ()
        if recipe.whole is not None:
            contract = contract_embodiment(self.description)
            self.kept = kept_embodiments(self.model, recipe.whole, contract)
        self.units = tuple(units_of(self.model, self.sites, recipe))
        self.pack = out / PACK_FILE
        self.folder = out / UNITS_FOLDER
        self.worst = ("", 0.0)

    def calibrate_on(self, observations: Sequence[Observation]) -> None:
        """Calibrate layer by layer while the units are made."""
        self.calibration = LayerwiseCalibration(
            self.description,
            self.source,
            self.recipe,
            self.sites,
            observations,
            self.folder / _ACTIVATIONS_FOLDER,
            device=self.device,
            parts=self._finished_part,
        )
        self.manifest = self.calibration.manifest

    def run(self, progress: Progress | None) -> int:
        """Do what is not done yet; returns how many units were."""
        claim_folder(self.folder, self._state())
        resumed = 0
        for done, index in enumerate(sorted(range(len(self.units)), key=self._turn)):
            path, unit = self._path(index), self.units[index]
            if (read_info(path) or {}).get("unit") == unit.name:
                resumed += 1
                continue
            if progress is not None:
                progress(done, len(self.units), unit.name)
            with torch.no_grad():
                tensors, info = self._do(unit)
            write_unit(path, tensors, {"unit": unit.name, "source_sha256": self.source.digest(unit.tensors), **info})
        if progress is not None:
            progress(len(self.units), len(self.units), "")
        return resumed

    def finish(self) -> None:
        """Merge the units into the pack and remove them."""
        paths = [self._path(index) for index in range(len(self.units))]
        infos = [read_info(path) or {} for path in paths]
        specs = [spec for info in infos for spec in info.get("sites", [])]
        results = {name: one for info in infos for name, one in info.get("results", {}).items()}
        parts = {name: spec for info in infos for name, spec in info.get("parts", {}).items()}
        metadata = {
            "format": PACK_FORMAT,
            "model_sha256": model_hash(self.description),
            "record": json.dumps(self._record(infos, results).to_json()),
            "sites": json.dumps(specs),
        }
        if parts:
            metadata["parts"] = json.dumps(parts)
        merge_units(paths, self.pack, metadata)
        write_description(self.description, self.pack.parent)
        remove_folder(self.folder)
        if results:
            self.worst = max(((name, one["error"]) for name, one in results.items()), key=lambda pair: pair[1])

    def _state(self) -> dict[str, Any]:
        """All that decides what the units hold."""
        return {
            "recipe": self.recipe.to_json(),
            "description": description_hash(self.description),
            "num_steps": self.num_steps,
            "embodiments": list(self.kept),
            "source": self.source.identity(),
            "calibration": self.manifest or self._statistics_hash(),
        }

    def _statistics_hash(self) -> str | None:
        """Of statistics that were handed over without saying what they are of."""
        if self.calibration is None:
            return None
        digest = hashlib.sha256()
        for site in self.sites:
            if site.name in self.calibration:
                statistics = self.calibration[site.name]
                digest.update(f"{site.name} {statistics.counts}".encode())
                for values in (statistics.absmax(), statistics.mean()):
                    digest.update(values.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _turn(self, index: int) -> tuple[int, int]:
        """When a unit is done: parts before sites, which are calibrated with the parts in place, by their stages."""
        unit = self.units[index]
        if unit.site is None:
            return (2 if unit.kind == FLOATS else 0), index
        staged = isinstance(self.calibration, LayerwiseCalibration)
        return 1, self.calibration.stage_of(unit.site.name) if staged else index

    def _finished_part(self, name: str) -> StoredPart:
        """A part of scope ``whole`` from its unit."""
        index = next(index for index, unit in enumerate(self.units) if name in unit.parts)
        return read_part(self._path(index), name)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _do(self, unit: Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if unit.site is not None:
            return self._site(unit.site)
        if unit.kind == FLOATS:
            return {f"float.{name}": self._rounded(name) for name in unit.tensors}, {}
        if unit.kind == TABLES:
            return self._tables()
        part = self._part(unit.name, {})
        return part_tensors(unit.name, part), {"parts": {unit.name: part.spec}}

    def _site(self, site: InputSite) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        specs, results = [], {}
        for name, readers, chosen in split_site(site, self.recipe):
            if not chosen.quantized:
                tensors.update({f"float.{one}": self._rounded(one) for one in own_tensors(self.model, readers)})
                continue
            linears = [(reader, self._filled(reader)) for reader in readers]
            columns = linears[0][1].in_features
            statistics = Probe(columns) if self.calibration is None else self.calibration[site.name]
            decision = {}
            if self.recipe.auto is not None:
                on_device = [(reader, copy.deepcopy(linear).to(self.device)) for reader, linear in linears]
                found = choose(name, site.side, on_device, statistics, chosen, self.recipe.auto)  # type: ignore[arg-type]
                chosen, decision = found.best.recipe, {"decision": found.taking(found.best)}
            result = build_site(name, site.side, linears, statistics, chosen, device=self.device)  # type: ignore[arg-type]
            specs.append(dataclass_to_json(result.site.spec))
            notes = [*result.notes, _PROBE_NOTE] if self.calibration is None else result.notes
            results[name] = {"error": result.error, "per_step": result.per_step, "notes": notes, **decision}
            tensors.update({f"quantized.{name}.{key}": value for key, value in result.site.tensors().items()})
        return tensors, {"sites": specs, "results": results}

    def _tables(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every modulation layer and what feeds them: they are computed together."""
        needed = (*table_names(self.model), *unread_names(self.model), *step_device_names(self.model))
        for name in needed:
            self._filled(name)
        rows = modulation_rows(self.model, self.num_steps)
        self.model.forget_step_tables()
        tensors, specs = {}, {}
        for name in (*table_names(self.model), *unread_names(self.model)):
            part = self._part(name, rows)
            tensors.update(part_tensors(name, part))
            specs[name] = part.spec
        for name in needed:
            self.model.get_submodule(name).to("meta")
        return tensors, {"parts": specs}

    def _part(self, name: str, rows: dict[str, Tensor]) -> StoredPart:
        module = self.model.get_submodule(name) if rows else self._filled(name)
        part = build_whole_part(name, module, rows, self.recipe.whole, self.kept)  # type: ignore[arg-type]
        if not rows:
            module.to("meta")
        return part

    def _filled(self, name: str) -> Any:
        """A module of the model with its tensors in float32; linears as copies, so that the model stays without."""
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Linear) and name not in table_names(self.model) + unread_names(self.model):
            module = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            if name in step_device_names(self.model):
                replace_module(self.model, name, module)
        for key, parameter in list(module.named_parameters()):
            owner, _, leaf = key.rpartition(".")
            tensor = self.source.get(f"{name}.{key}").to(parameter.dtype)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return module

    def _rounded(self, name: str) -> Tensor:
        """A tensor that stays, in the type that a pack stores it in."""
        side = next((s.side for s in self.sites if name.rpartition(".")[0] in s.readers), None)
        dtype = torch.float16 if side in SIDES else getattr(torch, self.recipe.unquantized_dtype)
        tensor = self.source.get(name)
        stored = tensor.to(dtype)
        if not torch.isfinite(tensor).all() or not torch.isfinite(stored).all():
            raise QuantizationError(f"{name} holds NaN, Inf or values beyond {dtype}; check the checkpoint")
        return stored

    def _record(self, infos: Sequence[dict[str, Any]], results: dict[str, Any]) -> QuantizationRecord:
        digest = hashlib.sha256("".join(str(info.get("source_sha256")) for info in infos).encode()).hexdigest()
        manifest: dict[str, Any] = {"observations": 0, "sha256": [], "noise_seeds": [], "reservoir_tokens": 0}
        if self.calibration is not None:
            manifest = self.manifest or {"note": "statistics were handed over; their observations are not known"}
            manifest = {**manifest, "reservoir_tokens": self.calibration.reservoir_tokens}
        return QuantizationRecord(
            recipe=self.recipe,
            num_steps=self.num_steps,
            source={"name": self.description.name, "sha256": digest},
            calibration=manifest,
            sites=results,
            libraries={"torch": torch.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__},
        )

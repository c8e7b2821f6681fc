"""The stages of a layer-by-layer calibration that all families share.

A stage is a stretch of the model, mostly one layer, that runs over all observations before the next one. It reads
files of earlier stages and writes its own: ``x.N`` is what batch N hands on (``x.N.S`` at denoise step S).

    vision (layer by layer if it is quantized) -> embedded, prefix -> language -> what the head reads
    denoise (once, action head in memory) -> steps, modulations -> every block of the head over all steps

What goes into each step is known after ``denoise``: with that the steps no longer wait for each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core.models.step_context import denoise_step
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.quant.calibrate import Calibration
from omega_qvla_core.quant.layerwise_files import ActivationFiles
from omega_qvla_core.quant.scope import VISION, InputSite

Tensors = dict[str, Tensor]

EMBEDDED, PREFIX, STEPS, MODULATIONS = "embedded", "prefix", "steps", "modulations"
"""Files: input of the language tower, the rest of the prefix, input of the first block, modulations of every block."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        modules: Names of the modules whose weights it needs.
        reads: Files that it reads.
        writes: Files that it may give; one that no later stage reads is not written.
        run: Gives the contents of its files, and lets a calibration see its sites.
        outside: Its sites that run outside the denoise loop, in the order in which they run.
        inside: Its sites that run in the loop.
    """

    modules: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Calibration], dict[str, Tensors]]
    outside: tuple[InputSite, ...] = ()
    inside: tuple[InputSite, ...] = ()

    @property
    def sites(self) -> tuple[InputSite, ...]:
        """All its sites."""
        return self.outside + self.inside


@dataclass(frozen=True)
class Work:
    """What stages work on.

    Attributes:
        model: Weights are there for the modules of the stage that runs.
        processor: Observations to the model's inputs.
        batches: Observations that run together.
        num_steps: Of the denoise loop.
        seed: Noise of observation i is drawn from ``seed + i``.
        device: Where layers run.
        files: Between stages.
        sites: All of the model, in model order.
    """

    model: Any
    processor: Any
    batches: Sequence[Sequence[Observation]]
    num_steps: int
    seed: int
    device: torch.device
    files: ActivationFiles
    sites: tuple[InputSite, ...]

    def sites_of(self, modules: Sequence[str]) -> tuple[InputSite, ...]:
        """Sites that lie in some modules."""
        starts = tuple(f"{module}." for module in modules)
        return tuple(site for site in self.sites if f"{site.readers[0]}.".startswith(starts))

    def noise(self, number: int) -> Tensor:
        """Start noise of a batch, float32 ``[B, H, A]``."""
        config, first = self.model.config, self.seed + number * len(self.batches[0])
        shape = (config.action_horizon, config.action_dim)
        seeds = range(first, first + len(self.batches[number]))
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)


Layer = Callable[[int, int, Tensor], tuple[Tensor, Tensors]]
"""``layer(index, batch, x)``: output of one layer of a chain, and what else of it is kept for later stages."""


class FamilyStages(ABC):
    """The stages of one family's models: ``stages`` of a subclass strings the builders below together.

    Attributes:
        vision: Name of the vision encoder.
        head: Names of the modules that the denoise loop needs.
        blocks: Name of the list of the denoising network's blocks.
    """

    vision: str
    head: tuple[str, ...]
    blocks: str

    def __init__(self, work: Work) -> None:
        self.work = work

    @abstractmethod
    def stages(self) -> Iterator[Stage]:
        """All stages, in order."""

    @abstractmethod
    def beside_vision(self) -> tuple[str, ...]:
        """Names of what else embeds a prefix: projector and token table."""

    @abstractmethod
    def prefix_tensors(self, prefix: Any) -> Tensors:
        """What later stages read of a prefix beside its embeddings; ``mask`` is among it."""

    @abstractmethod
    def cache(self, number: int) -> Any:
        """The model's cache of a batch, with the weights of ``head`` there."""

    @abstractmethod
    def first_input(self, x_t: Tensor, condition: Any, cache: Any) -> Tensor:
        """What the first block reads of a noisy chunk."""

    @abstractmethod
    def modulations(self, condition: Any, index: int) -> tuple[Tensor, ...]:
        """What a block reads of a step's condition; tensors of one shape."""

    @abstractmethod
    def context(self, index: int, number: int, calibration: Calibration) -> Any:
        """What a block reads of a batch at every step. Sites that this runs are seen by the calibration."""

    @abstractmethod
    def block(self, index: int, x: Tensor, modulation: tuple[Tensor, ...], context: Any) -> Tensor:
        """Output of one block at one step."""

    def read(self, name: str, number: int, file: str = PREFIX) -> Tensor:
        """A tensor of one batch."""
        return self.work.files.read(file, f"{name}.{number}")

    def embedding(self) -> Iterator[Stage]:
        """From observations to ``embedded`` and ``prefix``, with the vision encoder's layers apart if it has sites."""
        work, beside = self.work, self.beside_vision()
        if not any(site.side == VISION for site in work.sites):
            modules = (self.vision, *beside)
            yield Stage(modules, (), (EMBEDDED, PREFIX), partial(self._embed, None), work.sites_of(modules))
            return
        tower = f"{self.vision}.vision_model"
        ends = (f"{tower}.embeddings", f"{tower}.post_layernorm", *beside)
        layers = [(f"{tower}.encoder.layers.{index}",) for index in range(len(self._encoder().layers))]
        yield Stage(ends, (), ("patches",), self._patches)
        yield from self.chain("vision", layers, "patches", self._vision_layer, masked=False)
        last = chain_file("vision", len(layers) - 1)
        yield Stage(ends, (last,), (EMBEDDED, PREFIX), partial(self._embed, last), work.sites_of(ends))

    def chain(
        self,
        name: str,
        layers: Sequence[tuple[str, ...]],
        source: str,
        layer: Layer,
        masked: bool = True,
        kept: str = "",
    ) -> Iterator[Stage]:
        """Layers of a tower that runs once per observation.

        Args:
            name: Of the tower, for its files.
            layers: Names of the modules of every layer.
            source: File that the first one reads.
            layer: Runs one of them.
            masked: Whether padding stays out of the statistics.
            kept: What else of a layer goes to a file of its own; empty for nothing.
        """
        for index, modules in enumerate(layers):
            target = chain_file(name, index)
            link = _Link(index, source, target, chain_file(name, index, kept) if kept else "", layer, masked)
            reads = (source, PREFIX) if masked else (source,)
            writes = (target, link.kept) if kept else (target,)
            yield Stage(modules, reads, writes, partial(self._through, link), self.work.sites_of(modules))
            source = target

    def denoising(self, reads: tuple[str, ...]) -> Stage:
        """The whole loop once, to learn what goes into every step."""
        return Stage(self.head, (PREFIX, *reads), (STEPS, MODULATIONS), self._denoise)

    def head_blocks(self, reads: Callable[[int], tuple[str, ...]]) -> Iterator[Stage]:
        """Every block over all steps; ``reads`` names what block i reads of the prefix."""
        source = STEPS
        for index in range(len(self.work.model.get_submodule(self.blocks))):
            modules, target = (f"{self.blocks}.{index}",), chain_file("block", index)
            sites = self.work.sites_of(modules)
            outside = tuple(site for site in sites if site.name.endswith(".kv"))
            yield Stage(
                modules,
                (source, MODULATIONS, PREFIX, *reads(index)),
                (target,),
                partial(self._block, index, source, target),
                outside,
                tuple(site for site in sites if site not in outside),
            )
            source = target

    def _embed(self, seen: str | None, calibration: Calibration) -> dict[str, Tensors]:
        embedded: Tensors = {}
        kept: Tensors = {}
        for number, batch in enumerate(self.work.batches):
            given = None if seen is None else self.read("x", number, seen)
            with nullcontext() if given is None else self._instead_of_layers(_Between(given)):
                prefix = self.work.processor.prepare(batch, self.work.device).embed(self.work.model)
            embedded[f"x.{number}"] = prefix.embeddings.cpu()
            kept.update({f"{name}.{number}": tensor.cpu() for name, tensor in self.prefix_tensors(prefix).items()})
        return {EMBEDDED: embedded, PREFIX: kept}

    def _patches(self, calibration: Calibration) -> dict[str, Tensors]:
        """What goes into the vision encoder's first layer: the model runs without layers, its output is not used."""
        tensors: Tensors = {}
        for number, batch in enumerate(self.work.batches):
            between = _Between()
            with self._instead_of_layers(between):
                self.work.processor.prepare(batch, self.work.device).embed(self.work.model)
            tensors[f"x.{number}"] = between.seen.cpu()
        return {"patches": tensors}

    def _encoder(self) -> nn.Module:
        return self.work.model.get_submodule(f"{self.vision}.vision_model.encoder")

    @contextmanager
    def _instead_of_layers(self, between: _Between) -> Iterator[None]:
        encoder = self._encoder()
        layers, encoder.layers = encoder.layers, nn.ModuleList([between])
        try:
            yield
        finally:
            encoder.layers = layers

    def _vision_layer(self, index: int, number: int, x: Tensor) -> tuple[Tensor, Tensors]:
        return self._encoder().layers[index](x), {}

    def _through(self, link: _Link, calibration: Calibration) -> dict[str, Tensors]:
        outputs: Tensors = {}
        kept: Tensors = {}
        for number in range(len(self.work.batches)):
            x = self.read("x", number, link.source)
            with calibration.token_mask(self.read("mask", number)) if link.masked else nullcontext():
                x, more = link.layer(link.index, number, x)
            outputs[f"x.{number}"] = x.cpu()
            kept.update({f"{name}.{number}": tensor.cpu() for name, tensor in more.items()})
        return {link.target: outputs, link.kept: kept} if link.kept else {link.target: outputs}

    def _denoise(self, calibration: Calibration) -> dict[str, Tensors]:
        model, total, steps = self.work.model, self.work.num_steps, {}
        conditions = model.step_conditions(total)
        for number in range(len(self.work.batches)):
            cache, x_t = self.cache(number), self.work.noise(number)
            for step in model.denoise(cache, x_t, total):
                steps[f"x.{number}.{step.index}"] = self.first_input(x_t, conditions[step.index], cache).cpu()
                x_t = step.actions
        model.forget_step_tables()
        modulations = {
            f"{index}.{step}": torch.stack(self.modulations(condition, index)).cpu()
            for step, condition in enumerate(conditions)
            for index in range(len(model.get_submodule(self.blocks)))
        }
        return {STEPS: steps, MODULATIONS: modulations}

    def _block(self, index: int, source: str, target: str, calibration: Calibration) -> dict[str, Tensors]:
        files, total, outputs = self.work.files, self.work.num_steps, {}
        modulations = [files.read(MODULATIONS, f"{index}.{step}").unbind() for step in range(total)]
        for number in range(len(self.work.batches)):
            context = self.context(index, number, calibration)
            for step, modulation in enumerate(modulations):
                x = files.read(source, f"x.{number}.{step}")
                with denoise_step(step, total):
                    outputs[f"x.{number}.{step}"] = self.block(index, x, modulation, context).cpu()
        return {target: outputs}


def chain_file(name: str, index: int, what: str = "x") -> str:
    """Name of a layer's file."""
    return f"{name}_{index:03d}_{what}"


@dataclass(frozen=True)
class _Link:
    """One layer of a chain."""

    index: int
    source: str
    target: str
    kept: str
    layer: Layer
    masked: bool


class _Between(nn.Module):
    """Stands where layers run in other stages: keeps what comes in, and hands on what they gave, if that is known."""

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self._given = given
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x if self._given is None else self._given

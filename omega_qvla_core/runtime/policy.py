"""A policy: observation in, action chunk out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from omega_qvla_core.checkpoints.folder import is_pack, load_checkpoint, resolve_folder, save_checkpoint
from omega_qvla_core.checkpoints.layouts import detect
from omega_qvla_core.checkpoints.loading import Description, load_foundation, read_headers
from omega_qvla_core.checkpoints.strict_loading import compute_dtype
from omega_qvla_core.errors import CheckpointError, ConfigError, EngineError
from omega_qvla_core.policy_types import ActionChunk, CommittedPrefix, Observation
from omega_qvla_core.processing.policy_processor import ModelInputs
from omega_qvla_core.processing.robot_setup import RobotSetup
from omega_qvla_core.quant.pack import read_pack, save_pack
from omega_qvla_core.runtime.engine import Engine, build_engine, check_engine
from omega_qvla_core.runtime.realtime_chunking import PrefixGuidance, guidance

logger = logging.getLogger(__name__)


class Policy:
    """A model with its processing.

    Args:
        model: A ``Pi05`` or ``Gr00tN15``, or one whose linears the quantizer replaced.
        description: Configuration, statistics and vocabulary that belong to it.
        device: Where to compute, such as ``cpu`` or ``cuda``.
        quantization: Name of the recipe, ``none`` for unquantized weights.
        engine: ``auto`` to run through a static engine where there is one for the model and the device, ``off`` to run
            the model itself. An engine copies the weights at the first inference: see ``rebuild_engine``.

    Attributes:
        model: The network, in evaluation mode on ``device``.
        description: See above.
        processor: Observation <-> tensors.
        spec: What the policy needs and gives.
        device: Where it computes.

    Raises:
        ConfigError: If the device does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        description: Description,
        device: str | torch.device = "cpu",
        quantization: str = "none",
        engine: str = "auto",
    ) -> None:
        self.device = _device(device)
        self.model = model.to(self.device).eval()
        self.description = description
        self.processor = description.processor()
        self.spec = description.spec(quantization)
        self._engine_choice = check_engine(engine)
        self._engine: Engine | None = None
        self._engine_model: nn.Module | None = None
        self._refusals: set[str] = set()

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        device: str | torch.device = "cpu",
        *,
        robot: RobotSetup | str | Path | None = None,
        tokenizer: Path | None = None,
        dtype: str = "float32",
        engine: str = "auto",
    ) -> Policy:
        """Load any checkpoint folder: our own, a quantized pack, openpi's, LeRobot's or NVIDIA's.

        Args:
            path_or_name: Folder, or the name of a policy that comes with the package.
            device: Where to compute.
            robot: For public checkpoints, what their files do not say: a setup, the name of a known one, or a JSON
                file. None: ``omega_qvla.json`` beside the weights.
            tokenizer: For public checkpoints, file or folder of the tokenizer. None: the checkpoint's folder.
            dtype: ``float32``, or ``bfloat16`` for public checkpoints.
            engine: ``auto`` or ``off``, as for the constructor.

        Raises:
            CheckpointError: If the folder is missing or incomplete; shipped names are listed.
            ConfigError: If a configuration file is not valid, or the device does not exist.
            PackError: If a quantized pack is damaged.
        """
        folder, target, computed = resolve_folder(path_or_name), _device(device), compute_dtype(dtype)
        if is_pack(folder):
            description, model, recipe = read_pack(folder)
            return cls(model, description, target, recipe, engine)
        found = detect(folder)
        if found.layout == "omega_qvla" and "robot" not in found.config:
            if computed != torch.float32:
                raise ConfigError(f"{folder} computes in float32; dtype is for public checkpoints")
            description, model = load_checkpoint(folder)
        else:
            description, model = load_foundation(read_headers(folder, robot, tokenizer), computed)
        return cls(model, description, target, engine=engine)

    def with_model(self, model: nn.Module, quantization: str = "none") -> Policy:
        """The same policy around another network.

        Args:
            model: Of the same sizes.
            quantization: Name of the recipe, ``none`` for unquantized weights.
        """
        return type(self)(model, self.description, self.device, quantization, self._engine_choice)

    @property
    def engine(self) -> Engine | None:
        """The static engine that inferences run through, built when first asked for; None where there is none.

        Another network in ``model``'s place gets an engine of its own.
        """
        if self._engine_model is not self.model:
            self._engine = build_engine(self.model, self.device) if self._engine_choice == "auto" else None
            self._engine_model = self.model
        return self._engine

    def rebuild_engine(self) -> None:
        """Forget the engine; the next inference makes a new one. Needed after the model's weights changed."""
        self._engine = self._engine_model = None

    def save(self, folder: str | Path) -> None:
        """Write a folder that ``load`` reads: a checkpoint, or a pack if the policy is quantized."""
        if self.spec.quantization != "none":
            save_pack(self, Path(folder))
            return
        save_checkpoint(self.description, self.model, Path(folder))

    def infer(
        self,
        observation: Observation,
        noise: np.ndarray | None = None,
        seed: int = 0,
        committed: CommittedPrefix | None = None,
    ) -> ActionChunk:
        """Plan one chunk. The same observation and noise (or seed) give the same chunk.

        Args:
            observation: One observation.
            noise: float ``[horizon, model's action width]`` to start from; drawn from ``seed`` if None.
            seed: Seed of the noise.
            committed: What the arm is committed to; the chunk continues it (see ``realtime_chunking``). None: the chunk
                is free.

        Raises:
            ObservationError: If the observation does not have what the policy needs.
            ConfigError: If the committed prefix does not fit the policy.
        """
        batch = None if noise is None else np.asarray(noise)[None]
        return self.infer_batch([observation], batch, [seed], [committed])[0]

    @torch.inference_mode()
    def infer_batch(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray | None = None,
        seeds: Sequence[int] | None = None,
        committed: Sequence[CommittedPrefix | None] | None = None,
    ) -> list[ActionChunk]:
        """Plan one chunk per observation, all in one batch.

        Args:
            observations: B observations.
            noise: float ``[B, horizon, model's action width]``; drawn from ``seeds`` if None.
            seeds: One seed per observation; 0 for each if None.
            committed: One prefix, or None, per observation.

        Returns:
            B chunks. Values that are not finite are passed on for the robot's guard to refuse.

        Raises:
            ObservationError: If an observation does not have what the policy needs.
            ValueError: If there are no observations, or noise or seeds do not fit them.
        """
        inputs = self.processor.prepare(observations, self.device)
        start = self.noise(len(observations), seeds) if noise is None else self._given_noise(noise, len(observations))
        guide = None if committed is None else self._guide(committed, inputs.measured)
        actions = self._sample(inputs, start.to(self.device), guide)
        targets = self.processor.targets(actions.cpu().numpy(), inputs.measured)
        period_s = 1.0 / self.spec.control_hz
        return [ActionChunk(rows, period_s, self.spec.first_action_delay_s) for rows in targets]

    def _guide(self, committed: Sequence[CommittedPrefix | None], measured: np.ndarray) -> PrefixGuidance | None:
        if len(committed) != len(measured):
            raise ValueError(f"there are {len(committed)} committed prefixes for {len(measured)} observations")
        normalized = []
        for prefix, state in zip(committed, measured, strict=True):
            if prefix is not None:
                prefix.check(self.spec.horizon, len(self.spec.action_names))
            normalized.append(None if prefix is None else self.processor.predictions(prefix.actions, state))
        found = guidance(committed, normalized, (len(committed), *self._noise_shape()))
        return None if found is None else found.to(self.device)

    def _sample(self, inputs: ModelInputs, noise: torch.Tensor, guide: PrefixGuidance | None = None) -> torch.Tensor:
        """Actions float32 ``[B, H, A]``, through the engine where there is one that takes these inputs."""
        engine = self.engine
        if engine is not None:
            try:
                engine.bucket(inputs, self.spec.num_steps)
            except EngineError as error:
                if str(error) not in self._refusals:
                    self._refusals.add(str(error))
                    logger.warning("the %s engine is not used: %s", engine.name, error)
            else:
                return engine.run(inputs, noise, self.spec.num_steps, guide)
        return self.model.sample_actions(inputs.embed(self.model), noise, self.spec.num_steps, guide)

    def noise(self, count: int, seeds: Sequence[int] | None = None) -> torch.Tensor:
        """Start noise float32 ``[count, horizon, model's action width]``, the same on every device.

        Raises:
            ValueError: If the number of seeds is not ``count``.
        """
        seeds = [0] * count if seeds is None else list(seeds)
        if len(seeds) != count:
            raise ValueError(f"there are {len(seeds)} seeds for {count} observations")
        shape = self._noise_shape()
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def warm_up(self) -> float:
        """Run two inferences on a blank observation, so that the first real one is not late.

        Returns:
            Seconds that the second one took.

        Raises:
            CheckpointError: If the weights give values that are not finite.
        """
        blank = self.description.blank_observation()
        self.infer(blank)
        started = time.perf_counter()
        chunk = self.infer(blank)
        elapsed_s = time.perf_counter() - started
        if not np.isfinite(chunk.actions).all():
            raise CheckpointError(f"{self.spec.name} plans values that are not finite; its weights are damaged")
        logger.info("policy %s plans one chunk in %.0f ms", self.spec.name, elapsed_s * 1e3)
        return elapsed_s

    def _noise_shape(self) -> tuple[int, int]:
        return self.description.model.action_horizon, self.description.model.action_dim

    def _given_noise(self, noise: np.ndarray, count: int) -> torch.Tensor:
        expected = (count, *self._noise_shape())
        if np.shape(noise) != expected:
            raise ValueError(f"noise has shape {np.shape(noise)}; this policy and batch need {expected}")
        return torch.from_numpy(np.array(noise, dtype=np.float32))


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known; give cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} is not available: torch finds no CUDA GPU; use cpu")
    return found

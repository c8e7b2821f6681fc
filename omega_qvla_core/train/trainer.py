"""Flow-matching behaviour cloning of a small Pi 0.5 policy: resumable, on CPU or CUDA."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omega_qvla_core.models.pi05 import Pi05, Pi05Config
from omega_qvla_core.train.config import TrainConfig
from omega_qvla_core.train.dataset import Batch, Demonstrations
from omega_qvla_core.train.losses import (
    ReadoutHead,
    flow_targets,
    grounding_loss,
    masked_mean,
    named_cube_error_m,
    readout_loss,
    sample_time,
)
from omega_qvla_core.train.state import load_state, save_state

logger = logging.getLogger(__name__)

STATE_FILE = "train_state.safetensors"
VALIDATION_SEED = 1_000_003
"""Seed of the fixed validation batch's noise, apart from every training step's seed."""
VALIDATION_BATCH = 1024


class Trainee(nn.Module):
    """The policy with the readout head that only training needs."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.policy = Pi05(config)
        self.readout = ReadoutHead(config.lm_width)
        self.state_token = config.vision.num_tokens - 1

    def losses(self, batch: Batch, config: TrainConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """Flow, readout and grounding losses of one batch, and the error of the named cube's position in m."""
        policy, k = self.policy, config.noise_samples
        masks = [torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)] * len(batch.images)
        prefix = policy.embed_prefix(batch.images, masks, batch.tokens, batch.token_mask, batch.state)
        logits = policy.vision.attention_logits
        cache = policy.encode_prefix(prefix)
        actions = batch.actions.repeat_interleave(k, dim=0)
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        flow_time = sample_time(len(actions), generator, actions.device)
        x_t, target = flow_targets(actions, noise, flow_time)
        error = (policy.velocity(x_t, flow_time, cache.repeat(k)) - target).square().mean(dim=-1)
        predicted = self.readout(cache.last_hidden[:, self.state_token])
        losses = {
            "flow": masked_mean(error, batch.action_mask.repeat_interleave(k, dim=0)),
            "readout": readout_loss(predicted, batch.readout),
            "cube_error_m": named_cube_error_m(predicted, batch.readout).detach().median(),
        }
        if logits:
            pairs = zip(logits, batch.pixels, batch.visible, strict=True)
            terms = [
                grounding_loss(camera[:, query], pixels[:, query], visible[:, query])
                for camera, pixels, visible in pairs
                for query in (0, 1)  # query 0 is to find the named cube, query 1 the plate
            ]
            losses["grounding"] = torch.stack(terms).mean()
        return losses


@dataclass
class Progress:
    """One line of the training log. Losses are means over the last ``log_every`` steps."""

    step: int
    steps: int
    observations_per_s: float
    losses: dict[str, float]


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero; 1 is the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """Runs or resumes one training run in a folder.

    Args:
        data: Demonstrations on the training device.
        model_config: Sizes.
        config: Settings.
        folder: Holds ``train_state.safetensors``; a run found there goes on.
        validation: Held-out demonstrations for the validation losses.
    """

    def __init__(
        self,
        data: Demonstrations,
        model_config: Pi05Config,
        config: TrainConfig,
        folder: Path,
        validation: Demonstrations | None = None,
    ) -> None:
        self.data, self.validation, self.config, self.folder = data, validation, config, folder
        self.device = data.device
        torch.manual_seed(config.seed)
        self.model = Trainee(model_config).to(self.device)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self.step = load_state(self.state_path, self.model, self.ema, self.optimizer, config)
            logger.info("resumed %s at step %d of %d", self.state_path, self.step, config.steps)

    @property
    def state_path(self) -> Path:
        """Where the resumable state is."""
        return self.folder / STATE_FILE

    def run(self, progress: Callable[[Progress], None] | None = None, stop_after_s: float | None = None) -> bool:
        """Train to the last step, or until ``stop_after_s`` of wall time have passed.

        Returns:
            Whether the run is complete.
        """
        config, started, sums, since, last = self.config, time.monotonic(), {}, self.step, time.monotonic()
        while self.step < config.steps:
            for name, value in self._one_step().items():
                sums[name] = sums.get(name, 0.0) + value
            self.step += 1
            out_of_time = stop_after_s is not None and time.monotonic() - started > stop_after_s
            if self.step % config.log_every == 0 or self.step == config.steps:
                count, now = self.step - since, time.monotonic()
                losses = {name: float(value) / count for name, value in sums.items()}
                if progress is not None:
                    progress(Progress(self.step, config.steps, count * config.batch / (now - last), losses))
                sums, since, last = {}, self.step, now
            if self.step % config.save_every == 0 or self.step == config.steps or out_of_time:
                save_state(self.state_path, self.model, self.ema, self.optimizer, self.step, config)
            if out_of_time:
                break
        return self.step >= config.steps

    def _one_step(self) -> dict[str, Tensor]:
        config = self.config
        generator = torch.Generator(self.device).manual_seed(config.seed * 10_000_019 + self.step)
        batch = self.data.sample(config, generator)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.model.losses(batch, config, generator)
        total = losses["flow"] + config.readout_weight * losses["readout"]
        if "grounding" in losses:
            total = total + config.grounding_weight * losses["grounding"]
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(self.step, config)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self._update_average()
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short memory at first, so that the random start is forgotten as fast as the run allows.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        averages, parameters = list(self.ema.values()), [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights on held-out demonstrations, always on the same batch and noise."""
        if self.validation is None:
            return {}
        config, model = self.config, self.averaged_model()
        generator = torch.Generator(self.device).manual_seed(VALIDATION_SEED)
        batch = self.validation.sample(config, generator, size=VALIDATION_BATCH, augment=False)
        return {name: float(value) for name, value in model.losses(batch, config, generator).items()}

    def averaged_model(self) -> Trainee:
        """A copy with the averaged weights, in evaluation mode."""
        model = Trainee(self.model.policy.config).to(self.device)
        model.load_state_dict(self.ema)
        return model.eval()

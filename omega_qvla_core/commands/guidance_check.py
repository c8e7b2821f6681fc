"""What real-time chunking leaves out: its correction beside the one with the network's Jacobian.

    python -m omega_qvla_core.commands.guidance_check FOLDER...

with parity folders (a small model, its weights and inputs). Per denoise step, three corrections of the same state:

* ours, ``err = W * (Y - x1)``;
* LeRobot's order of statements: the velocity is evaluated before gradients of ``x`` are asked for, then
  ``x1 = x - t v`` is differentiated; so its Jacobian is the identity;
* the paper's: the vector-Jacobian product through the network, ``err + (1 - tau) (du/dx)^T err``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from omega_qvla_core.checkpoints.families import build_model
from omega_qvla_core.checkpoints.strict_loading import load_model
from omega_qvla_core.checkpoints.weight_files import find_weights
from omega_qvla_core.commands.console import console, user_errors
from omega_qvla_core.models.gr00t_n15 import Gr00tN15, euler_timesteps
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_prefix import euler_times
from omega_qvla_core.parity import gr00t_case, pi05_case
from omega_qvla_core.parity.fixture import Fixture, read_fixture
from omega_qvla_core.policy_types import MAX_GUIDANCE_WEIGHT
from omega_qvla_core.runtime.realtime_chunking import PrefixGuidance, guidance_weight, prefix_weights

DELAY_SHARE = 0.25
"""Share of the horizon that is executed while the inference runs."""
COMMITTED_SHARE = 0.75
"""Share of the horizon for which a committed motion is known."""


@dataclass(frozen=True)
class Field:
    """A model's flow as ``x, index -> u`` (towards the actions), differentiable in ``x``."""

    evaluate: Callable[[Tensor, int], Tensor]
    noise: Tensor


@dataclass(frozen=True)
class GuidanceReport:
    """Differences on one case.

    Attributes:
        lerobot: Largest difference of ours to LeRobot's order of statements; exactly 0 is expected.
        jacobian: Largest relative difference (norm) of ours to the paper's over the steps.
        cosine: Smallest cosine between both.
        prefix_free, prefix_ours, prefix_paper: RMS distance of the first ``d`` steps of the final chunk to the
            committed ones: unguided, with our correction, with the paper's.
        drift: RMS distance between both guided chunks.
    """

    lerobot: float
    jacobian: float
    cosine: float
    prefix_free: float
    prefix_ours: float
    prefix_paper: float
    drift: float


def compare_guidance(field: Field, steps: int, seed: int = 0) -> GuidanceReport:
    """Integrate with all corrections; the committed motion is another sample of the same model.

    Args:
        field: The flow.
        steps: Denoise steps.
        seed: Of the noise behind the committed motion.
    """
    noise = field.noise
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(noise.shape, generator=generator)
    committed = _integrate(field, other, steps, lambda x, u, tau: u)
    horizon = noise.shape[1]
    delay, known = max(1, round(DELAY_SHARE * horizon)), max(2, round(COMMITTED_SHARE * horizon))
    weights = torch.from_numpy(prefix_weights(horizon, delay, known))[None, :, None].expand_as(noise)
    ours = PrefixGuidance(committed, weights, MAX_GUIDANCE_WEIGHT)
    lerobot, jacobian, cosine = 0.0, 0.0, 1.0
    x = noise
    for index in range(steps):
        tau = index / steps
        u, exact = _vjp(field, x, index, tau, committed, weights)
        error = weights * (committed - (x + (1.0 - tau) * u))
        lerobot = max(lerobot, float((_detached_vjp(x, u, tau, committed, weights) - error).abs().max()))
        jacobian = max(jacobian, float((exact - error).norm() / error.norm()))
        cosine = min(cosine, float(torch.cosine_similarity(exact.flatten(), error.flatten(), dim=0)))
        x = x + ours(x, u, tau) / steps
    paper = _integrate_paper(field, noise, steps, committed, weights)
    free = _integrate(field, noise, steps, lambda x, u, tau: u)

    def prefix(chunk: Tensor) -> float:
        return float((chunk - committed)[:, :delay].square().mean().sqrt())

    drift = float((x - paper).square().mean().sqrt())
    return GuidanceReport(lerobot, jacobian, cosine, prefix(free), prefix(x), prefix(paper), drift)


def field_of(fixture: Fixture, model: nn.Module, case: str, steps: int) -> Field:
    """The flow of one case of a parity folder."""
    inputs = fixture.inputs[case]
    if isinstance(model, Pi05):
        arguments, noise = pi05_case.case_arguments(model, inputs, case)
        cache = model.encode_prefix(model.embed_prefix(**arguments))
        times = euler_times(steps)
        batch = noise.shape[0]
        return Field(lambda x, i: -model.velocity(x, torch.full((batch,), times[i]), cache), noise)
    assert isinstance(model, Gr00tN15)
    prefix, noise = gr00t_case.case_prefix(model, inputs, case), gr00t_case.case_noise(model, inputs, case)
    cache = model.encode_prefix(prefix)
    buckets = euler_timesteps(steps, model.config.timestep_buckets)
    return Field(lambda x, i: model.velocity(x, torch.full((noise.shape[0],), buckets[i]), cache), noise)


def round_weights(model: nn.Module, bits: int) -> None:
    """Round every linear weight of a model to ``bits`` per row, symmetric: gradients stay those of a linear layer."""
    top = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / top
            with torch.no_grad():
                module.weight.copy_((module.weight / scale).round().clamp(-top, top) * scale)


def _vjp(field: Field, x: Tensor, index: int, tau: float, committed: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    start = x.detach().requires_grad_(True)
    u = field.evaluate(start, index)
    predicted = start + (1.0 - tau) * u
    error = (weights * (committed - predicted)).detach()
    (gradient,) = torch.autograd.grad(predicted, start, error)
    return u.detach(), gradient


def _detached_vjp(x: Tensor, u: Tensor, tau: float, committed: Tensor, weights: Tensor) -> Tensor:
    """LeRobot's order: the velocity is there before ``x`` asks for gradients."""
    start = x.detach().clone().requires_grad_(True)
    predicted = start + (1.0 - tau) * u.detach()
    error = (committed - predicted) * weights
    (gradient,) = torch.autograd.grad(predicted, start, error.detach())
    return gradient


def _integrate(field: Field, noise: Tensor, steps: int, guide: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    x = noise
    with torch.no_grad():
        for index in range(steps):
            x = x + guide(x, field.evaluate(x, index), index / steps) / steps
    return x


def _integrate_paper(field: Field, noise: Tensor, steps: int, committed: Tensor, weights: Tensor) -> Tensor:
    x = noise
    for index in range(steps):
        tau = index / steps
        u, exact = _vjp(field, x, index, tau, committed, weights)
        x = x + (u + guidance_weight(tau, MAX_GUIDANCE_WEIGHT) * exact) / steps
    return x


def main(
    folders: Annotated[list[Path], typer.Argument(help="Parity folders.")],
    steps: Annotated[list[int], typer.Option(min=2, help="Denoise steps; several times.")] = [4, 10],  # noqa: B006
) -> None:
    """Compare the correction of real-time chunking with LeRobot's and with the paper's."""
    table = Table("model", "weights", "steps", "LeRobot", "Jacobian", "cosine", "prefix free", "ours", "paper", "drift")
    with user_errors():
        for folder in folders:
            fixture = read_fixture(folder)
            for label, bits in (("float32", 0), ("4 bit", 4)):
                build = partial(build_model, fixture.config)
                model = load_model(build, find_weights(folder), fixture.family, torch.float32)
                model.requires_grad_(False)
                if bits:
                    round_weights(model, bits)
                for count in steps:
                    case = min(name for name in fixture.inputs if name != gr00t_case.TRAIN)
                    found = compare_guidance(field_of(fixture, model, case, count), count)
                    numbers = [found.lerobot, found.jacobian, found.cosine, found.prefix_free, found.prefix_ours]
                    numbers += [found.prefix_paper, found.drift]
                    table.add_row(fixture.family, label, str(count), *(f"{value:.3g}" for value in numbers))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

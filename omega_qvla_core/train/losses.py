"""Losses of flow-matching behaviour cloning, and the auxiliary ones that teach colour grounding.

The auxiliary losses use privileged labels of the simulator at training time only; nothing of them is in the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH_SCALE_M = 0.1
"""Positions are divided by this before the smooth-L1 loss, so that an error of 1 cm is 0.1."""
SMOOTH_L1_BETA = 0.1
"""Below this scaled error (1 cm) the position loss is quadratic."""
YAW_SYMMETRY = 4
"""A cube looks the same after a quarter turn, so its yaw is learned as sine and cosine of four times the angle."""
READOUT_DIM = 3 * (2 + 2 + 6) + 2
"""Named cube and plate (base and tool frame), three cubes (base and tool frame), yaw of the named cube."""
TIME_ALPHA, TIME_BETA = 1.5, 1.0
"""Flow time ~ Beta(1.5, 1) * 0.999 + 0.001 with 1 = noise, as openpi trains Pi 0.5."""


def sample_time(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Flow times ``[count]`` in (0, 1], 1 = noise, from the Beta distribution above.

    Beta(a, 1) has the distribution function t^a, so a uniform number to the power 1/a is a sample.
    """
    assert TIME_BETA == 1.0, "the closed form below holds for Beta(a, 1)"
    uniform = torch.rand(count, generator=generator, device=device)
    return uniform.pow(1 / TIME_ALPHA) * 0.999 + 0.001


def flow_targets(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path and its velocity: ``x_t = t noise + (1 - t) action``, ``v = noise - action``.

    Args:
        actions: ``[B, horizon, dim]`` normalised.
        noise: Same shape.
        time: ``[B]``.
    """
    t = time[:, None, None]
    return t * noise + (1 - t) * actions, noise - actions


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` (float, same shape) is 1; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


class ReadoutHead(nn.Module):
    """Reads object positions from the proprioception token after the language tower. Dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, READOUT_DIM)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, width]`` -> ``[B, READOUT_DIM]``."""
        return self.net(hidden)


def readout_targets(
    cubes: Tensor, yaws: Tensor, plate: Tensor, tool_position: Tensor, tool_rotation: Tensor, colour: Tensor
) -> Tensor:
    """What ``ReadoutHead`` is to read.

    Args:
        cubes: ``[B, 3, 3]`` cube centres in the base frame, m, in the order of the environment's colours.
        yaws: ``[B, 3]`` rad.
        plate: ``[B, 3]`` m.
        tool_position: ``[B, 3]`` m.
        tool_rotation: ``[B, 3, 3]``, columns are the tool's axes in the base frame.
        colour: int64 ``[B]``, index of the cube that the instruction names.

    Returns:
        ``[B, READOUT_DIM]``.
    """
    batch = torch.arange(len(colour), device=colour.device)
    points = torch.cat([cubes[batch, colour][:, None], plate[:, None], cubes], dim=1)
    in_tool = torch.einsum("bji,bpj->bpi", tool_rotation, points - tool_position[:, None])
    tool_yaw = torch.atan2(tool_rotation[:, 1, 0], tool_rotation[:, 0, 0])
    angle = YAW_SYMMETRY * (yaws[batch, colour] - tool_yaw)
    lengths = torch.cat([points, in_tool], dim=1).flatten(1) / LENGTH_SCALE_M
    return torch.cat([lengths, angle.sin()[:, None], angle.cos()[:, None]], dim=1)


def readout_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 over all readouts."""
    return F.smooth_l1_loss(predicted.float(), target, beta=SMOOTH_L1_BETA)


def named_cube_error_m(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance ``[B]`` between the read and the true position of the named cube in the base frame, m."""
    return (predicted[:, :3].float() - target[:, :3]).norm(dim=1) * LENGTH_SCALE_M


def bilinear_labels(pixels: Tensor, size: int) -> Tensor:
    """Spread image points over the four nearest cells of a ``size x size`` grid.

    Args:
        pixels: ``[B, 2]`` image coordinates (u right, v down) in [0, 1].
        size: Cells per side.

    Returns:
        ``[B, size * size]``, rows sum to 1; points outside the image are clamped to its border cells.
    """
    position = (pixels * size - 0.5).clamp(0, size - 1)
    low = position.floor().clamp(max=size - 2)
    fraction = position - low
    column, row = low[:, 0].long(), low[:, 1].long()
    fx, fy = fraction[:, 0], fraction[:, 1]
    labels = torch.zeros(len(pixels), size * size, device=pixels.device)
    for dy, dx, weight in ((0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx)):
        labels.scatter_add_(1, ((row + dy) * size + column + dx)[:, None], weight[:, None])
    return labels


def grounding_loss(logits: Tensor, pixels: Tensor, visible: Tensor) -> Tensor:
    """Cross-entropy between one keypoint query's attention and where its object is in the image.

    Args:
        logits: ``[B, S * S]`` attention logits of the query.
        pixels: ``[B, 2]`` image coordinates of the object in [0, 1].
        visible: float ``[B]``, 1 where the object is in the image.
    """
    size = round(logits.shape[1] ** 0.5)
    labels = bilinear_labels(pixels, size)
    return masked_mean(-(labels * logits.float().log_softmax(dim=-1)).sum(dim=-1), visible)

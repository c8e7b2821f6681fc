"""Layers of the GR00T N1.5 action head with weights per embodiment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# One index per row of the batch, on the host: picking the weights then needs neither a copy nor a wait for a GPU.
Embodiment = tuple[int, ...]


class EmbodimentLinear(nn.Module):
    """``x W[e] + b[e]`` with the weights of each row's embodiment e."""

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.normal_(torch.empty(count, in_features, out_features)).mul_(0.02))
        self.b = nn.Parameter(torch.zeros(count, out_features))

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """``[B, S, in]`` -> ``[B, S, out]`` in the type of the weights."""
        x = x.to(self.W.dtype)
        if len(set(embodiment)) == 1:
            weight, bias = self.weights_of(embodiment[0])
            return x @ weight + bias
        index = torch.tensor(embodiment, device=self.W.device)
        return torch.bmm(x, self.W[index]) + self.b[index][:, None]

    def weights_of(self, embodiment: int) -> tuple[Tensor, Tensor]:
        """Weight ``[in, out]`` and bias ``[out]`` of one embodiment, views."""
        return self.W[embodiment], self.b[embodiment]


class EmbodimentMLP(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, count: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.layer1 = EmbodimentLinear(count, in_features, hidden)
        self.layer2 = EmbodimentLinear(count, hidden, out_features)

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """``[B, S, in]`` -> ``[B, S, out]``."""
        return self.layer2(F.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Noisy actions and time features to tokens."""

    def __init__(self, count: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.W1 = EmbodimentLinear(count, action_dim, width)
        self.W2 = EmbodimentLinear(count, 2 * width, width)
        self.W3 = EmbodimentLinear(count, width, width)

    def forward(self, actions: Tensor, time_features: Tensor, embodiment: Embodiment) -> Tensor:
        """Actions ``[B, H, action_dim]``, time features ``[B or 1, width]`` -> ``[B, H, width]``."""
        x = self.W1(actions, embodiment)
        x = torch.cat((x, time_features.to(x.dtype)[:, None].expand_as(x)), dim=-1)
        return self.W3(F.silu(self.W2(x, embodiment)), embodiment)

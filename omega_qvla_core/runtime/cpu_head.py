"""Attention blocks of GR00T N1.5 on a CPU, of the adapter and of the diffusion transformer, over fixed buffers.

What is saved against the model's own code: what reads one input is one product, a modulated norm is one LayerNorm with
the modulation as its weights, and rows that nothing reads any more are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.models.gr00t_dit import HeadBlock
from omega_qvla_core.runtime.cpu_buffers import Buffers
from omega_qvla_core.runtime.cpu_linear import Product, merge


@dataclass(frozen=True)
class BlockWeights:
    """Products of one block.

    Attributes:
        own: Queries; also keys and values, in this order, in a block that attends to its own tokens.
        context: Keys and values of the features, in a block that attends to these.
        out: After attention.
        up: Into the hidden width.
        down: Out of it.
    """

    own: Product
    context: Product | None
    out: Product
    up: Product
    down: Product

    @classmethod
    def of(cls, block: HeadBlock) -> BlockWeights:
        """Read a block."""
        attention, net = block.attn1, block.ff.net
        keys_values = [attention.to_k, attention.to_v]
        own = [attention.to_q] if block.attends_to_features else [attention.to_q, *keys_values]
        return cls(
            merge(own, [None] * len(own)),
            merge(keys_values, [None, None]) if block.attends_to_features else None,
            merge([attention.to_out[0]], [None]),
            merge([net[0].proj], [None]),
            merge([net[2]], [None]),
        )

    def copied_bytes(self) -> int:
        """See ``Product``."""
        products = (self.own, self.context, self.out, self.up, self.down)
        return sum(one.copied_bytes() for one in products if one is not None)


@dataclass(frozen=True)
class Norm:
    """LayerNorm ``[..., width]`` with a factor and a summand ``[width]``, or without.

    Attributes:
        scale: Factor, or None.
        shift: Summand, or None.
        eps: Epsilon.
    """

    scale: Tensor | None
    shift: Tensor | None
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        """Of a norm that no condition modulates."""
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor of the same shape."""
        return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)


class HeadLayer:
    """A block over fixed buffers.

    Args:
        block: Read for its sizes and second norm; its linears come from ``weights``.
        weights: Of the block.
        x: ``[S, width]``, the tokens that it updates.
        features: Tokens of the features, for a block that attends to these.
        read: Of how many last tokens anything reads the output; the others are left as they are.
        buffers: Shared with layers that run before or after it.
    """

    def __init__(
        self, block: HeadBlock, weights: BlockWeights, x: Tensor, features: int, read: int, buffers: Buffers
    ) -> None:
        (tokens, width), self._heads = x.shape, block.attn1.num_heads
        self._rows, self._head_dim = x[tokens - read :], width // self._heads
        self._kept: Tensor | None = None
        self._asking = x
        if weights.context is not None:
            self._asking = self._rows
            self._kept = buffers.own(2, self._heads, features, self._head_dim)
            self._context = weights.context.bind(features, buffers)
        self._own = weights.own.bind(len(self._asking), buffers)
        self._out, self._up, self._down = (one.bind(read, buffers) for one in (weights.out, weights.up, weights.down))
        self._second_norm = Norm.of(block.norm3)
        self._mixed = buffers.get("mixed", read, width)
        self._mixed_heads = self._by_head(self._mixed)[0]
        self._hidden = buffers.get("hidden", read, weights.up.outputs)

    def write_context(self, features: Tensor) -> None:
        """Keep the keys and values of features ``[T, feature_width]``; for blocks that attend to these."""
        self._kept.copy_(self._by_head(self._context(features, 0)))

    def run(self, step: int, norm: Norm) -> None:
        """Update the tokens; ``step`` is the denoise step, 0 in the adapter. ``norm`` is the first norm."""
        parts = self._by_head(self._own(norm(self._asking), step))
        keys, values = parts[1:] if self._kept is None else self._kept
        queries = parts[0, :, -len(self._rows) :]
        mixed = F.scaled_dot_product_attention(queries[None], keys[None], values[None])
        self._mixed_heads.copy_(mixed[0])
        self._rows.add_(self._out(self._mixed, step))
        up = self._up(self._second_norm(self._rows), step)
        torch.ops.aten.gelu.out(up, approximate="tanh", out=self._hidden)
        self._rows.add_(self._down(self._hidden, step))

    def _by_head(self, outputs: Tensor) -> Tensor:
        """``[S, parts * width]`` -> ``[parts, heads, S, head_dim]``, a view."""
        return outputs.view(len(outputs), -1, self._heads, self._head_dim).permute(1, 2, 0, 3)

"""The diffusion transformer of GR00T N1.5: one denoise step, its cross-attention's keys and values prepared before.

Per block: norm and codes; queries (in a block that attends to its own tokens also keys and values); attention in
shares of the keys; join and codes; output product in shares; norm and codes, which adds these shares; the MLP's first
product with activation and codes; its second in shares, which the next block's norm adds. The residual stream is
float32. Tokens have no positions in it, so that their order is free: actions come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla_core.errors import EngineError
from omega_qvla_core.kernels.triton_kernels import numerics, rows
from omega_qvla_core.kernels.triton_kernels.coding import Coding
from omega_qvla_core.kernels.triton_kernels.launch import MOST_SMALL_TOKENS, padded_tokens
from omega_qvla_core.kernels.triton_kernels.launch_rows import Heads, attend, merge, norm
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.gr00t_config import LAYER_NORM_EPS
from omega_qvla_core.models.gr00t_dit import FINAL_NORM_EPS
from omega_qvla_core.models.gr00t_n15 import Gr00tN15, TimeCondition
from omega_qvla_core.runtime.cuda_embodiment import CudaEmbodiment
from omega_qvla_core.runtime.cuda_layers import (
    ActivatedInto,
    LargeProduct,
    NormFactors,
    Operand,
    SmallProduct,
    Workspace,
)
from omega_qvla_core.runtime.cuda_sites import SiteReader, scaled


@dataclass(frozen=True)
class _Block:
    """Products of a block, and per denoise step the factors of its first norm."""

    queries: SmallProduct
    context: LargeProduct | None
    out: SmallProduct
    first: SmallProduct
    second: SmallProduct
    into: ActivatedInto
    norm1: tuple[NormFactors, ...]
    norm3: NormFactors


@dataclass(frozen=True)
class Features:
    """What a chunk's tokens read besides the weights.

    Attributes:
        tokens: float32 ``[T padded, width]``: the tokens without what comes of the noisy actions.
        own: int32 ``[1]``: T.
        keys: int32 ``[1]``: features that are there.
        contexts: Per block ``[features, 2 * width]``, keys, then values; None where it attends to its own tokens.
    """

    tokens: Tensor
    own: Tensor
    keys: Tensor
    contexts: Sequence[Tensor | None]


class CudaDit:
    """Noisy chunk to velocity.

    Args:
        model: A ``Gr00tN15``.
        conditions: ``model.step_conditions(num_steps)``.
        tuned: Block sizes.
        dtype: Of unquantized weights, and of keys and values.
        expand: See ``weights.large_weight``.

    Attributes:
        bits: Of what was read, for the name of the precision.
        embodiment: What depends on the embodiment.
        tokens: Actions, state and future tokens.

    Raises:
        EngineError: The kernels do not compute this model.
    """

    def __init__(
        self, model: Gr00tN15, conditions: Sequence[TimeCondition], tuned: Tuning, dtype: torch.dtype, expand: bool
    ) -> None:
        config = model.config
        self._tuned, self._expand = tuned, expand
        self.width, self.heads = (
            config.dit.width,
            Heads(config.dit.num_heads, config.dit.num_heads, config.dit.head_dim),
        )
        self.actions, self.action_dim = config.action_horizon, config.action_dim
        self.tokens = self.actions + 1 + config.future_tokens
        if self.tokens > MOST_SMALL_TOKENS:
            raise EngineError(
                f"chunk, state and future tokens are {self.tokens} tokens; the kernels take {MOST_SMALL_TOKENS}"
            )
        self._site, self._context_site = SiteReader(dtype, len(conditions)), SiteReader(dtype)
        blocks = enumerate(model.expert.transformer_blocks)
        self._blocks = [self._block(i, one, [step.modulations[i] for step in conditions]) for i, one in blocks]
        self.bits = self._site.bits + self._context_site.bits
        # The last modulation has its shift first, unlike those of the blocks.
        halves = [step.modulations[-1].detach().float().flatten().chunk(2) for step in conditions]
        self._final = tuple(NormFactors(scaled(1.0 + scale, None), scaled(shift, None)) for shift, scale in halves)
        self.embodiment = CudaEmbodiment(model, conditions, tuned, dtype)

    def _block(self, index: int, block: nn.Module, modulations: Sequence[Tensor]) -> _Block:
        attention, ff, name = block.attn1, block.ff.net, f"transformer block {index}"
        context = None
        if block.attends_to_features:
            queries = self._site(f"{name} queries", attention.to_q)
            site = self._context_site(f"{name} keys and values", attention.to_k, attention.to_v)
            context = LargeProduct(site.input, site.large(expand=self._expand), self._tuned)
        else:
            queries = self._site(f"{name} qkv", attention.to_q, attention.to_k, attention.to_v)
        out, first = self._site(f"{name} out", attention.to_out[0]), self._site(f"{name} first", ff[0].proj)
        second = self._site(f"{name} second", ff[2])
        products = [SmallProduct(site.input, site.small(), self._tuned) for site in (queries, out, first, second)]
        return _Block(
            queries=products[0],
            context=context,
            out=products[1],
            first=products[2],
            second=products[3],
            into=ActivatedInto("block hidden", products[2], products[3], numerics.GELU),
            norm1=tuple(_modulated(one, queries.input.unsmooth) for one in modulations),
            norm3=NormFactors.of_layer_norm(block.norm3, first.input.unsmooth),
        )

    def weights(self) -> list[SmallProduct | LargeProduct]:
        """All products."""
        small = [one for block in self._blocks for one in (block.queries, block.out, block.first, block.second)]
        context = [block.context for block in self._blocks if block.context is not None]
        return [*small, *context, *self.embodiment.weights()]

    def table_bytes(self) -> int:
        """Of the norms' factors of all steps, and of the embodiment's tables."""
        norms = 4 * 2 * self.width * len(self._final) * (len(self._blocks) + 1)
        return norms + self.embodiment.table_bytes()

    def context_buffers(self, features: int, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        """Room for ``Features.contexts``."""
        return [
            None if one.context is None else torch.zeros(features, 2 * self.width, dtype=dtype, device=device)
            for one in self._blocks
        ]

    def contexts(self, work: Workspace, features: Tensor, out: Sequence[Tensor | None]) -> None:
        """Keys and values of the features ``[T, feature width]`` into buffers."""
        plain = features if features.dtype == work.dtype else work.buffer("features plain", *features.shape)
        if plain is not features:
            plain.copy_(features)
        for block, keys_values in zip(self._blocks, out):
            if block.context is not None:
                # Codes are made of the features as they are, floating products take what eight blocks share.
                source = plain if block.context.coding.mode == rows.FLOATS else features
                block.context(block.context.coded(work, "context", source), keys_values)

    def velocity_buffer(self, work: Workspace) -> Tensor:
        """float32 ``[H padded, A padded]``, where ``velocity`` leaves its result."""
        columns = self.embodiment.velocity.weight.row_tiles * BLOCK_OUT
        return work.buffer("velocity", padded_tokens(self.actions), columns, dtype=torch.float32)

    def velocity(self, work: Workspace, x_t: Tensor, step: int, seen: Features) -> None:
        """``v(x_t)`` into the velocity buffer; ``x_t`` is float32 ``[H, action_dim]``."""
        embodiment = self.embodiment
        encoder = embodiment.encoder[step]
        # Here, and not just before the first norm: that reads x before the kernel before it has ended.
        x = work.buffer("dit x", *seen.tokens.shape, dtype=torch.float32)
        x.copy_(seen.tokens)
        noisy = encoder.first.operand(work, "noisy", self.actions)
        noisy.values[: self.actions, : self.action_dim].copy_(x_t)
        # Rows after the actions are zeros in the operand, and what is added to the other tokens with it.
        hidden = encoder(work, noisy, self.actions, step, room=self.tokens)
        parts = embodiment.action.parts(work, "action shares", hidden)
        for block, context in zip(self._blocks, seen.contexts):
            parts = self._run_block(work, block, x, parts, step, seen, context)
        final = embodiment.decoder.first.operand(work, "dit final", self.actions)
        self._norm(x, final, Coding(), self._final[step], parts, self.actions, FINAL_NORM_EPS)
        embodiment.velocity.plain(work, embodiment.decoder(work, final, self.actions, step), self.velocity_buffer(work))

    def _run_block(
        self, work: Workspace, block: _Block, x: Tensor, parts: Tensor, step: int, seen: Features,
        context: Tensor | None,
    ) -> Tensor:  # fmt: skip
        tokens, width = self.tokens, self.width
        operand = block.queries.operand(work, "dit in", tokens)
        self._norm(x, operand, block.queries.input.coding(step), block.norm1[step], parts, tokens)
        queries = work.buffer("dit queries", x.shape[0], block.queries.weight.row_tiles * BLOCK_OUT)
        parts = block.queries.parts(work, "dit queries shares", operand)
        norm(None, queries, None, Coding(), parts=parts, tokens=tokens, early=self._tuned.early)
        if context is None:
            mixed = self._attend(
                work, block, queries, queries[:, width : 2 * width], queries[:, 2 * width :], seen.own, step
            )
        else:
            mixed = self._attend(work, block, queries, context, context[:, width:], seen.keys, step)
        parts = block.out.parts(work, "dit out", mixed)
        operand = block.first.operand(work, "dit in", tokens)
        self._norm(x, operand, block.first.input.coding(step), block.norm3, parts, tokens)
        return block.second.parts(work, "dit second", block.into(work, operand, tokens, step))

    def _attend(
        self, work: Workspace, block: _Block, queries: Tensor, k: Tensor, v: Tensor, keys: Tensor, step: int
    ) -> Operand:
        heads, tokens = self.heads, self.tokens
        shares = work.shares("dit", k.shape[0], tokens, heads.count, heads.dim)
        attend(
            queries, k, v, keys, shares, heads, tokens, blocks=self._tuned.shared_attention, early=self._tuned.early,
        )  # fmt: skip
        mixed, site = block.out.operand(work, "dit mixed", tokens), block.out.input
        merge(
            shares, mixed.values, mixed.scales, site.coding(step), tokens, heads.count, site.unsmooth, self._tuned.early
        )  # fmt: skip
        return mixed

    def _norm(
        self, x: Tensor, out: Operand, coding: Coding, factors: NormFactors, parts: Tensor, tokens: int,
        eps: float = LAYER_NORM_EPS,
    ) -> None:  # fmt: skip
        norm(
            x, out.values, out.scales, coding, kind=rows.LAYER_NORM, eps=eps, mul=factors.mul, add=factors.add,
            parts=parts, tokens=tokens, width=self.width, settled=True, early=self._tuned.early,
        )  # fmt: skip


def _modulated(modulation: Tensor, unsmooth: Tensor | None) -> NormFactors:
    scale, shift = modulation.detach().float().flatten().chunk(2)
    return NormFactors(scaled(1.0 + scale, unsmooth), scaled(shift, unsmooth))

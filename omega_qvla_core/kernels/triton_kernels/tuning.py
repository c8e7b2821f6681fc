"""Block sizes per GPU generation: what fits into shared memory, and what was fastest where it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla_core.kernels.triton_kernels.launch import Blocks
from omega_qvla_core.kernels.triton_kernels.launch_rows import AttentionBlocks
from omega_qvla_core.kernels.triton_kernels.layout import round_up

# Shared memory that a program can have, bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications: maximum amount of shared memory per thread block).
SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}
_LEAST_SHARED_BYTES = 101376
_ROOMY_BYTES = 160 * 1024
# Of an H100.
_MULTIPROCESSORS = 132
# Tiles that leave so few of them idle that long sums are worth it.
_FEW_IDLE = 100
_SHORT_COLUMNS = 2048


@dataclass(frozen=True)
class UpTo:
    """Blocks for products of up to so many tiles; None for any number."""

    tiles: int | None
    blocks: Blocks


@dataclass(frozen=True)
class Tuning:
    """Block sizes of an engine.

    Attributes:
        plain: int8 products for many tokens, by their number of tiles, in ascending order.
        wide_gated: Gated int8 products.
        narrow_gated: The same where fewer rows would be computed past the last token.
        floats: bfloat16 products with what cuBLAS does not do in one call, like bias and residual.
        floats_added: Those with a residual alone, where they are faster than cuBLAS; see ``added``.
        floats_gated: Gated bfloat16 products.
        attention: Of many tokens.
        shared_attention: Of few tokens, keys in shares.
        small_stages: Loads in flight of products for few tokens.
        early: Whether kernels for few tokens start before the one before them has ended; see ``numerics.begin``.
            Those for many tokens do not: programs that wait take room from the product that they wait for.
    """

    plain: tuple[UpTo, ...]
    wide_gated: Blocks
    narrow_gated: Blocks
    floats: Blocks
    floats_added: Blocks | None
    floats_gated: Blocks
    attention: AttentionBlocks
    shared_attention: AttentionBlocks
    small_stages: int = 3
    early: bool = False

    def int8(self, tokens: int, outputs: int) -> Blocks:
        """Of an int8 product for many tokens."""
        return next(
            one.blocks for one in self.plain if one.tiles is None or one.blocks.tiles(tokens, outputs) <= one.tiles
        )

    def added(self, tokens: int, outputs: int, columns: int) -> Blocks | None:
        """Of a bfloat16 product with a residual; None for cuBLAS, which is faster but for few tiles, as in SigLIP."""
        tiles = 0 if self.floats_added is None else self.floats_added.tiles(tokens, outputs)
        narrow = 0 < tiles <= _MULTIPROCESSORS and (tiles >= _FEW_IDLE or columns <= _SHORT_COLUMNS)
        return self.floats_added if narrow else None

    def gated(self, tokens: int, grouped: bool) -> Blocks:
        """Of a gated int8 product. With a scale per group there are registers for narrow blocks only."""
        if grouped:
            return self.narrow_gated
        narrow, wide = (round_up(tokens, one.tokens) for one in (self.narrow_gated, self.wide_gated))
        return self.narrow_gated if narrow < wide else self.wide_gated


# Measured on an H100, whose multiprocessors have room for two or three of these programs: one wave of a program per
# tile where that does, else programs that take tiles in turn.
_ROOMY = Tuning(
    plain=(
        UpTo(2 * _MULTIPROCESSORS, Blocks(64, 128, 128, 4, 4, 16, described=True)),
        UpTo(3 * _MULTIPROCESSORS, Blocks(64, 128, 128, 4, 3, 16, described=True)),
        UpTo(None, Blocks(64, 128, 128, 4, 4, 16, resident=2, described=True)),
    ),
    wide_gated=Blocks(128, 128, 128, 4, 3, 16, resident=2, described=True),
    narrow_gated=Blocks(64, 128, 128, 4, 4, 16, resident=2, described=True),
    floats=Blocks(64, 128, 64, 4, 4, 16, described=True),
    floats_added=Blocks(64, 128, 64, 4, 6, 16, described=True),
    floats_gated=Blocks(128, 256, 64, 8, 4, 8, resident=1, described=True),
    attention=AttentionBlocks(64, 64, 4, 3, described=True),
    shared_attention=AttentionBlocks(64, 64, 4, 3, described=True),
    early=True,
)
# Compiled, never timed: narrow tiles until wide ones would be as many as an H100 has multiprocessors.
_TIGHT = Tuning(
    plain=(UpTo(4 * _MULTIPROCESSORS, Blocks(64, 64, 128, 4, 3)), UpTo(None, Blocks(128, 128, 64, 8, 3))),
    wide_gated=Blocks(64, 128, 64, 4, 3),
    narrow_gated=Blocks(64, 128, 64, 4, 3),
    floats=Blocks(64, 128, 32, 4, 3),
    floats_added=None,
    floats_gated=Blocks(64, 128, 32, 4, 3),
    attention=AttentionBlocks(32, 32, 4, 1),
    shared_attention=AttentionBlocks(32, 32, 4, 1),
)


def tuning(capability: tuple[int, int]) -> Tuning:
    """Block sizes for a compute capability; unknown ones get those that fit everywhere."""
    roomy = SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES) > _ROOMY_BYTES and capability >= (9, 0)
    return _ROOMY if roomy else _TIGHT

"""Block sizes per GPU generation: what fits into shared memory, and what was fastest where it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla_core.kernels.triton_kernels.launch import Blocks

# Shared memory that a program can have, bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications: maximum amount of shared memory per thread block).
SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}
_LEAST_SHARED_BYTES = 101376
_ROOMY_BYTES = 160 * 1024
# An H100 has 132 multiprocessors.
_WAVE = 132
_SHORT_COLUMNS = 1536
# Share of a GPU's time that goes into outputs that are there, from which on larger blocks are faster than narrow ones:
# the rest are multiprocessors without a block in the last wave, and rows past the last token.
_FILLED_WIDE = 0.7
_FILLED_EVEN = 0.85


@dataclass(frozen=True)
class AttentionBlocks:
    """Block sizes of ``attention``."""

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tuning:
    """Block sizes of an engine.

    Attributes:
        wide: int8 products for many tokens, where such blocks fill the GPU.
        even: The same where these do.
        short: The same with short rows of the weight and more than one wave of ``even``.
        narrow: The same where none of them would fill it, in up to two waves.
        ragged: The same, in more.
        gated: Gated int8 products.
        floats: bfloat16 products with bias and residual; cuBLAS does the others.
        floats_gated: Gated bfloat16 products.
        attention: Of many tokens.
        shared_attention: Of few tokens, keys in shares.
        small_stages: Loads in flight of products for few tokens.
        small_warps: Warps of their programs where codes are read and a share of K is short. Two run ``mma``, which
            starts sooner than four warps' ``wgmma``.
        early: Whether kernels for few tokens start before the one before them has ended; see ``numerics.begin``.
    """

    wide: Blocks
    even: Blocks
    short: Blocks
    narrow: Blocks
    ragged: Blocks
    gated: Blocks
    floats: Blocks
    floats_gated: Blocks
    attention: AttentionBlocks
    shared_attention: AttentionBlocks
    small_stages: int = 3
    small_warps: int = 2
    early: bool = False

    def int8(self, tokens: int, outputs: int, columns: int) -> Blocks:
        """Of an int8 product for many tokens, by its sizes."""
        if columns <= _SHORT_COLUMNS and _waves(self.even, tokens, outputs) > 1:
            return self.short
        for blocks, least in ((self.wide, _FILLED_WIDE), (self.even, _FILLED_EVEN)):
            computed = _waves(blocks, tokens, outputs) * _WAVE * blocks.tokens * blocks.out
            if tokens * outputs >= least * computed:
                return blocks
        return self.narrow if _waves(self.narrow, tokens, outputs) <= 2 else self.ragged


def _waves(blocks: Blocks, tokens: int, outputs: int) -> int:
    """How often every multiprocessor gets a block."""
    return -(-(-(-tokens // blocks.tokens) * -(-outputs // blocks.out)) // _WAVE)


_ROOMY = Tuning(
    wide=Blocks(128, 256, 128, 8, 4),
    even=Blocks(128, 128, 128, 8, 4),
    short=Blocks(128, 128, 64, 4, 5),
    narrow=Blocks(64, 128, 128, 4, 4, 16),
    ragged=Blocks(64, 128, 128, 4, 3, 16),
    gated=Blocks(128, 128, 128, 8, 4),
    floats=Blocks(64, 128, 64, 4, 4),
    floats_gated=Blocks(128, 128, 64, 8, 4),
    attention=AttentionBlocks(64, 64, 4, 3),
    shared_attention=AttentionBlocks(64, 64, 4, 3),
    early=True,
)
_TIGHT = Tuning(
    wide=Blocks(128, 128, 64, 8, 3),
    even=Blocks(128, 128, 64, 8, 3),
    short=Blocks(128, 128, 64, 8, 3),
    narrow=Blocks(64, 64, 128, 4, 3),
    ragged=Blocks(64, 64, 128, 4, 3),
    gated=Blocks(64, 64, 64, 4, 3),
    floats=Blocks(64, 128, 32, 4, 3),
    floats_gated=Blocks(64, 64, 32, 4, 3),
    attention=AttentionBlocks(32, 32, 4, 1),
    shared_attention=AttentionBlocks(32, 32, 4, 1),
    small_warps=4,
)


def tuning(capability: tuple[int, int]) -> Tuning:
    """Block sizes for a compute capability; unknown ones get those that fit everywhere."""
    roomy = SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES) > _ROOMY_BYTES and capability >= (9, 0)
    return _ROOMY if roomy else _TIGHT

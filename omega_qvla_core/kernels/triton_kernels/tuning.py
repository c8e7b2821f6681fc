"""Block sizes per GPU generation: what fits into shared memory, and what was fastest where it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla_core.kernels.triton_kernels.launch import Blocks

# Shared memory that a program can have, bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications: maximum amount of shared memory per thread block).
SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}
_LEAST_SHARED_BYTES = 101376
_ROOMY_BYTES = 160 * 1024


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
        wide: Products for many tokens with wide outputs.
        narrow: The same with few outputs, where smaller blocks fill the GPU.
        gated: Gated products for many tokens.
        floats: Like ``wide``, for bfloat16.
        floats_gated: Like ``gated``, for bfloat16.
        attention: Of many tokens.
        shared_attention: Of few tokens, keys in shares.
        small_stages: Loads in flight of products for few tokens.
    """

    wide: Blocks
    narrow: Blocks
    gated: Blocks
    floats: Blocks
    floats_gated: Blocks
    attention: AttentionBlocks
    shared_attention: AttentionBlocks
    small_stages: int = 4


_ROOMY = Tuning(
    wide=Blocks(128, 256, 128, 8, 3),
    narrow=Blocks(128, 128, 128, 8, 4),
    gated=Blocks(128, 128, 128, 8, 3),
    floats=Blocks(128, 256, 64, 8, 3),
    floats_gated=Blocks(128, 128, 64, 8, 3),
    attention=AttentionBlocks(128, 64, 8, 2),
    shared_attention=AttentionBlocks(64, 64, 4, 2),
)
_TIGHT = Tuning(
    wide=Blocks(128, 128, 64, 8, 3),
    narrow=Blocks(64, 64, 128, 4, 3),
    gated=Blocks(64, 64, 64, 4, 3),
    floats=Blocks(64, 128, 32, 4, 3),
    floats_gated=Blocks(64, 64, 32, 4, 3),
    attention=AttentionBlocks(32, 32, 4, 1),
    shared_attention=AttentionBlocks(32, 32, 4, 1),
    small_stages=3,
)


def tuning(capability: tuple[int, int]) -> Tuning:
    """Block sizes for a compute capability; unknown ones get those that fit everywhere."""
    roomy = SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES) > _ROOMY_BYTES and capability >= (9, 0)
    return _ROOMY if roomy else _TIGHT

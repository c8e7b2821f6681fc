"""How the input of a product is written by the kernel before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla_core.kernels.triton_kernels import rows
from omega_qvla_core.kernels.triton_kernels.layout import hadamard

LINE = 64
"""Columns of a block of the rotation, and of a line of a row in registers."""


@dataclass(frozen=True)
class Coding:
    """How the input of a product is written.

    Attributes:
        mode: ``rows.FLOATS`` (bfloat16), ``rows.TOKEN`` or ``rows.TOKEN_GROUP``.
        group: Columns per scale of TOKEN_GROUP: 32, 64 or a multiple of 64.
        high: Largest code.
        factor: float32 ``[1]`` or ``[G]``: clip ratio over the largest code.
        rotate: Whether blocks of 64 columns are rotated by the Hadamard matrix.
        tail: float32 ``[64, 64]`` of the short last block, padded with zeros, or None.
    """

    mode: int = rows.FLOATS
    group: int = LINE
    high: int = 7
    factor: Tensor | None = None
    rotate: bool = False
    tail: Tensor | None = None

    @property
    def constants(self) -> dict[str, object]:
        """Compile-time arguments of the kernels."""
        return {
            "ROTATE": self.rotate,
            "TAIL": self.tail is not None,
            "CODES": self.mode,
            "GROUP": self.group if self.mode == rows.TOKEN_GROUP else LINE,
            "HIGH": self.high,
        }

    def tensors(self, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Tail and factors; ``spare`` stands for what is not there and is not read."""
        return tuple(spare if one is None else one for one in (self.tail, self.factor))


def hadamard_tail(width: int, device: torch.device | str) -> Tensor | None:
    """Matrix of the short last Hadamard block of a row, which needs a power of two; None if there is none.

    Raises:
        ValueError: The last block is not a power of two wide, so that there is no Sylvester matrix for it.
    """
    rest = width % LINE
    if rest & (rest - 1):
        raise ValueError(f"width {width} leaves a last block of {rest} columns, which is not a power of two")
    if not rest:
        return None
    tail = torch.zeros(LINE, LINE)
    tail[:rest, :rest] = hadamard(rest)
    return tail.to(device)

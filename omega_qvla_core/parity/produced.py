"""What our model gave for one case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Produced:
    """Tensors of one case by their names in the file.

    Attributes:
        tensors: Computed with every token in place.
        valid: Name -> bool mask of the values that count; names without one count in full.
        in_use: Final actions once more, computed the way a robot gets them.
    """

    tensors: Mapping[str, Tensor]
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    in_use: Mapping[str, Tensor] = field(default_factory=dict)

"""What a loaded model's weights take, by class of module."""

from __future__ import annotations

from collections import Counter

from torch import nn

from omega_qvla_core.quant.linear import QuantizedLinear
from omega_qvla_core.quant.parts import StoredPart
from omega_qvla_core.quant.site import QuantizedSite


def bytes_by_class(model: nn.Module) -> dict[str, int]:
    """Class name of a module -> bytes of the parameters and buffers that it holds itself, largest first.

    A tensor that several modules share counts once.
    """
    counted: set[int] = set()
    found: Counter[str] = Counter()
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in counted:
                counted.add(id(tensor))
                found[type(module).__name__] += tensor.numel() * tensor.element_size()
    return dict(found.most_common())


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer really is a quantized one, whatever the checkpoint calls itself."""
    return any(isinstance(module, (QuantizedLinear, QuantizedSite, StoredPart)) for module in model.modules())

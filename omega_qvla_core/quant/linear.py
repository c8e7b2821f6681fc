"""The module that takes the place of an ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from omega_qvla_core.quant.site import QuantizedSite


class QuantizedLinear(nn.Module):
    """One reader of a ``QuantizedSite``, called like the linear that it replaces.

    Args:
        site: Shared by all linears that read the same input; each of them registers it, so that moving the model moves
            it (once).
        index: Which reader this is.
    """

    def __init__(self, site: QuantizedSite, index: int) -> None:
        super().__init__()
        self.site = site
        self.index = index
        self.in_features = site.spec.in_features
        self.out_features = site.spec.readers[index].out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``.

        Raises:
            StepContextError: See ``QuantizedSite.forward``.
        """
        return self.site.output(self.index, x)

    def extra_repr(self) -> str:
        return f"reader {self.index} ({self.site.spec.readers[self.index].name})"


def quantized_sites(model: nn.Module) -> Iterator[QuantizedSite]:
    """Every quantized site of a model once, in model order."""
    return (module for module in model.modules() if isinstance(module, QuantizedSite))


def set_backend(model: nn.Module, name: str) -> None:
    """Choose the backend of every quantized site: ``cpu`` (integer) or ``reference``.

    Raises:
        ConfigError: No such backend.
    """
    for site in quantized_sites(model):
        site.set_backend(name)


def replace_linears(model: nn.Module, site: QuantizedSite) -> None:
    """Put a site's readers where its linears are."""
    for index, reader in enumerate(site.spec.readers):
        parent, _, last = reader.name.rpartition(".")
        owner = model.get_submodule(parent) if parent else model
        setattr(owner, last, QuantizedLinear(site, index))

"""The model families by name: their configurations and how to build them."""

from __future__ import annotations

from torch import nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.empty import on_meta_device
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_config import Pi05Config

ModelConfig = Pi05Config | Gr00tConfig

# Up to here a wrong depth is found by comparing names, which says more.
_PLAUSIBLE_LAYERS = 1024

_CONFIGS: dict[str, type] = {"pi05": Pi05Config, "gr00t_n15": Gr00tConfig}


def model_config(family: object, data: object, where: str) -> ModelConfig:
    """Read the ``model`` object of one of our ``config.json``.

    Raises:
        ConfigError: If the family is unknown or the object not valid.
    """
    if family not in _CONFIGS:
        raise ConfigError(f"family is {family!r}; this release reads {', '.join(_CONFIGS)}")
    try:
        return _CONFIGS[str(family)].from_json(data, where)
    except TypeError as error:
        raise ConfigError(f"{where} holds a value of the wrong type ({error})") from error


def check_depths(config: ModelConfig, tensors: int, where: str) -> None:
    """Refuse far more layers than there are tensors, before a model of that many is built.

    Raises:
        ConfigError: Naming the size.
    """
    if isinstance(config, Gr00tConfig):
        depths = {"language": config.language.depth, "diffusion transformer": config.dit.depth}
        if config.adapter is not None:
            depths["adapter"] = config.adapter.depth
    else:
        depths = {"language": config.lm_depth}
    depths["vision"] = getattr(config.vision, "depth", 0)
    for part, depth in depths.items():
        if depth > max(tensors, _PLAUSIBLE_LAYERS):
            raise ConfigError(f"{where}: the {part} has {depth} layers, but the files hold {tensors} tensors in all")


def build_empty(config: ModelConfig, where: str) -> nn.Module:
    """The model without memory for its weights.

    Raises:
        ConfigError: If the sizes are beyond what a tensor can have.
    """
    try:
        with on_meta_device():
            return build_model(config)
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: no model has these sizes ({reason}); fetch config.json again") from error


def build_model(config: ModelConfig) -> nn.Module:
    """The model of a configuration, with random weights."""
    return Gr00tN15(config) if isinstance(config, Gr00tConfig) else Pi05(config)


def family_of_config(config: ModelConfig) -> str:
    """Name of a configuration's family."""
    return "gr00t_n15" if isinstance(config, Gr00tConfig) else "pi05"

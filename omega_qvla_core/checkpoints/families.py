"""The model families by name: their configurations and how to build them."""

from __future__ import annotations

from torch import nn

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.gr00t_n15 import Gr00tN15
from omega_qvla_core.models.pi05 import Pi05
from omega_qvla_core.models.pi05_config import Pi05Config

ModelConfig = Pi05Config | Gr00tConfig

_CONFIGS: dict[str, type] = {"pi05": Pi05Config, "gr00t_n15": Gr00tConfig}


def model_config(family: object, data: object, where: str) -> ModelConfig:
    """Read the ``model`` object of one of our ``config.json``.

    Raises:
        ConfigError: If the family is unknown or the object not valid.
    """
    if family not in _CONFIGS:
        raise ConfigError(f"family is {family!r}; this release reads {', '.join(_CONFIGS)}")
    return _CONFIGS[str(family)].from_json(data, where)


def build_model(config: ModelConfig) -> nn.Module:
    """The model of a configuration, with random weights."""
    return Gr00tN15(config) if isinstance(config, Gr00tConfig) else Pi05(config)


def family_of_config(config: ModelConfig) -> str:
    """Name of a configuration's family."""
    return "gr00t_n15" if isinstance(config, Gr00tConfig) else "pi05"

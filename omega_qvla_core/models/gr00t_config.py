"""Sizes of a GR00T N1.5 model, from our ``config.json`` or from the official one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.models.siglip import SiglipConfig
from omega_qvla_core.strict_json import dataclass_from_json, dataclass_to_json

LAYER_NORM_EPS = 1e-5
"""Of every LayerNorm of the action head but the last; the official configuration does not state it."""


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of the language tower.

    Attributes:
        width: Width of the tower.
        depth: Layers that are kept: the official ``select_layer``.
        mlp_dim: Hidden width of the MLPs.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        vocab_size: Rows of the token table.
        image_token_id: Token whose rows the image embeddings take.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    image_token_id: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        _check_positive(self, "model.language", optional_zero=("image_token_id",))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.language.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.language.head_dim is {self.head_dim}; it must be even")
        if self.image_token_id >= self.vocab_size:
            raise ConfigError(
                f"model.language.image_token_id is {self.image_token_id}; vocab_size is {self.vocab_size}"
            )


@dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of attention blocks: adapter or diffusion transformer. Its width is ``num_heads * head_dim``."""

    depth: int
    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_positive(self, "model stack")

    @property
    def width(self) -> int:
        """Width of the stack."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Gr00tConfig:
    """Sizes of the whole model.

    Attributes:
        language: The language tower.
        vision: The vision tower.
        feature_width: Width of the features that the action head reads.
        project_features: Whether a linear brings the language width to ``feature_width``.
        adapter: Blocks over the features; None for a head without adapter and feature norm.
        dit: The diffusion transformer; its width is that of state and action tokens.
        interleave: Odd DiT blocks attend to their own tokens, even ones to the features (else all to the features).
        hidden_size: Hidden width of state encoder and action decoder, and width of the DiT's output.
        future_tokens: Learned tokens between state and actions.
        state_dim: Padded width of the state.
        action_dim: Padded width of an action.
        action_horizon: Steps of one action chunk.
        num_embodiments: Rows of the embodiment-specific weights.
        max_positions: Rows of the action position table; 0 for a head without one.
        timestep_buckets: Flow time runs from 0 (noise) to this (actions).
    """

    language: Qwen3Config
    vision: SiglipConfig
    feature_width: int
    adapter: StackConfig | None
    dit: StackConfig
    hidden_size: int
    future_tokens: int
    state_dim: int
    action_dim: int
    action_horizon: int
    project_features: bool = False
    interleave: bool = True
    num_embodiments: int = 32
    max_positions: int = 1024
    timestep_buckets: int = 1000

    def __post_init__(self) -> None:
        _check_positive(self, "model", optional_zero=("max_positions", "future_tokens"))
        if not self.project_features and self.feature_width != self.language.width:
            raise ConfigError(
                f"model.feature_width is {self.feature_width}, model.language.width {self.language.width}; they must "
                "be equal unless model.project_features is true"
            )
        if self.adapter is not None and self.adapter.width != self.feature_width:
            raise ConfigError(f"model.adapter has width {self.adapter.width}; feature_width is {self.feature_width}")
        if self.dit.width % 2 or self.dit.width < 4:
            raise ConfigError(f"model.dit has width {self.dit.width}; it must be even and at least 4")
        if self.max_positions and self.action_horizon > self.max_positions:
            raise ConfigError(
                f"model.action_horizon is {self.action_horizon}; model.max_positions allows {self.max_positions}"
            )

    @classmethod
    def from_json(cls, data: object, where: str = "model") -> Gr00tConfig:
        """Read the ``model`` object of our ``config.json``.

        Raises:
            ConfigError: For an unknown key (naming the nearest valid one), a missing key, or a value out of range.
        """
        return dataclass_from_json(cls, data, where)

    def to_json(self) -> dict[str, Any]:
        """The object that ``from_json`` reads back to an equal configuration."""
        return dataclass_to_json(self)

    @classmethod
    def from_official_json(cls, data: Mapping[str, Any], eagle: Mapping[str, Any] | None = None) -> Gr00tConfig:
        """Map the official ``config.json`` to ours.

        Args:
            data: The decoded file.
            eagle: The configuration of the vision-language model, which the official release ships with its code and
                not with its weights; None for the released sizes.

        Raises:
            ConfigError: If a size is missing, or a setting asks for another computation than the released one.
        """
        return _from_official(data, RELEASED_EAGLE if eagle is None else eagle)


RELEASED_EAGLE: Mapping[str, Any] = {
    "image_token_index": 151669,
    "select_layer": -1,
    "use_pixel_shuffle": False,
    "mlp_connector_layers": 1,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 28,
        "head_dim": 128,
        "vocab_size": 151680,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
"""What the released GR00T N1.5 reads of the Eagle 2.5 configuration (Qwen3-1.7B and SigLIP 2 So400m at 224)."""


def _from_official(data: Mapping[str, Any], eagle: Mapping[str, Any]) -> Gr00tConfig:
    file = _Reader(data, "config.json")
    backbone, head = file.inside("backbone_cfg"), file.inside("action_head_cfg")
    dit = head.inside("diffusion_model_cfg")
    eagle_file = _Reader(eagle, "eagle configuration")
    language, vision = _qwen3(eagle_file, backbone), _siglip(eagle_file)
    dit.expect("norm_type", "ada_norm")
    dit.expect("positional_embeddings", None)
    hidden_size = head.number("hidden_size")
    dit.expect("output_dim", hidden_size)
    project = backbone.value("project_to_dim", None)
    uses_adapter = bool(head.value("use_vlln", True))
    return Gr00tConfig(
        language=language,
        vision=vision,
        feature_width=head.number("backbone_embedding_dim"),
        project_features=project is not None,
        adapter=_stack(head.inside("vl_self_attention_cfg")) if uses_adapter else None,
        dit=_stack(dit),
        interleave=bool(dit.value("interleave_self_attention", False)),
        hidden_size=hidden_size,
        future_tokens=head.number("num_target_vision_tokens", 32),
        state_dim=head.number("max_state_dim"),
        action_dim=head.number("action_dim"),
        action_horizon=head.number("action_horizon"),
        num_embodiments=head.number("max_num_embodiments", 32),
        max_positions=head.number("max_seq_len", 1024) if head.value("add_pos_embed", True) else 0,
        timestep_buckets=head.number("num_timestep_buckets", 1000),
    )


def _qwen3(eagle: _Reader, backbone: _Reader) -> Qwen3Config:
    text = eagle.inside("text_config")
    text.expect("hidden_act", "silu")
    text.expect("attention_bias", False)
    text.expect("rope_scaling", None)
    available, selected = text.number("num_hidden_layers"), backbone.number("select_layer")
    if not 1 <= selected <= available:
        raise ConfigError(f"config.json: backbone_cfg.select_layer is {selected}; the language model has {available}")
    return Qwen3Config(
        width=text.number("hidden_size"),
        depth=selected,
        mlp_dim=text.number("intermediate_size"),
        num_heads=text.number("num_attention_heads"),
        num_kv_heads=text.number("num_key_value_heads"),
        head_dim=text.number("head_dim"),
        vocab_size=text.number("vocab_size"),
        image_token_id=eagle.number("image_token_index"),
        rms_norm_eps=text.real("rms_norm_eps", 1e-6),
        rope_theta=text.real("rope_theta", 1e6),
    )


def _siglip(eagle: _Reader) -> SiglipConfig:
    vision = eagle.inside("vision_config")
    eagle.expect("select_layer", -1)
    eagle.expect("use_pixel_shuffle", False)
    eagle.expect("mlp_connector_layers", 1)
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    return SiglipConfig(
        width=vision.number("hidden_size"),
        depth=vision.number("num_hidden_layers"),
        num_heads=vision.number("num_attention_heads"),
        mlp_dim=vision.number("intermediate_size"),
        patch_size=vision.number("patch_size"),
        image_size=vision.number("image_size"),
        layer_norm_eps=vision.real("layer_norm_eps", 1e-6),
    )


def _stack(reader: _Reader) -> StackConfig:
    return StackConfig(
        depth=reader.number("num_layers"),
        num_heads=reader.number("num_attention_heads"),
        head_dim=reader.number("attention_head_dim"),
    )


_MISSING = object()


class _Reader:
    """Typed access to an official JSON object, which has many keys that nothing here reads."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be a JSON object, found {type(data).__name__}")
        self._data, self._where = data, where

    def value(self, key: str, default: Any = _MISSING) -> Any:
        found = self._data.get(key, default)
        if found is _MISSING:
            raise ConfigError(f"{self._where} lacks the key {key!r}; is it the whole file of a GR00T N1.5 checkpoint?")
        return found

    def inside(self, key: str) -> _Reader:
        return _Reader(self.value(key), f"{self._where}: {key}")

    def number(self, key: str, default: Any = _MISSING) -> int:
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool):
            raise ConfigError(f"{self._where}: {key} is {found!r}; it must be a whole number")
        return found

    def real(self, key: str, default: float) -> float:
        found = self.value(key, default)
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            raise ConfigError(f"{self._where}: {key} is {found!r}; it must be a number")
        return float(found)

    def expect(self, key: str, wanted: Any) -> None:
        """A key that may be absent, but whose other values mean a computation that this model does not have."""
        found = self._data.get(key, wanted)
        if found != wanted:
            raise ConfigError(f"{self._where}: {key} is {found!r}; this release computes {wanted!r} only")


def _check_positive(config: Any, where: str, optional_zero: tuple[str, ...] = ()) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if value < 0 or (value == 0 and field.name not in optional_zero):
            raise ConfigError(f"{where}.{field.name} is {value}; it must be positive")

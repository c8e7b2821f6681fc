"""How much an inference has to compute and to read, and what the device could do at best: the roofline.

A linear of M tokens costs ``2 M K N`` operations, attention ``4 Mq Mkv heads head_dim``. The floor of a stage is the
larger of operations over peak rate and bytes over bandwidth. Weights are read once per stage, and once per step in the
denoise loop; so are the keys and values of the prefix. Calls and activations cost nothing. What does not depend on the
observation (time, modulations) is not counted, nor is what the last prefix layer of Pi 0.5 need not compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla_core.evaluate.bench_shapes import BenchShape, ModelConfig
from omega_qvla_core.models.gr00t_config import Gr00tConfig
from omega_qvla_core.models.keypoint_vision import KeypointConfig
from omega_qvla_core.models.pi05_config import Pi05Config
from omega_qvla_core.models.siglip import SiglipConfig


@dataclass(frozen=True)
class Work:
    """Of one stage.

    Attributes:
        linear: Operations in linears and convolutions (a multiplication and an addition are two).
        attention: Operations in attention, which no precision here makes cheaper.
        weights: Numbers of weights that are read, all passes together.
        cache: Numbers of keys and values that are read.
        quantized: Whether the linears are in the quantizer's scope.
    """

    linear: float
    attention: float
    weights: float
    cache: float = 0.0
    quantized: bool = True

    def floor_s(
        self, peak: float, plain_peak: float, bandwidth: float, weight_bytes: float, plain_bytes: float
    ) -> float:
        """Shortest time.

        Args:
            peak: Operations per second of the quantized products.
            plain_peak: Of unquantized ones.
            bandwidth: Bytes per second.
            weight_bytes: Per quantized weight.
            plain_bytes: Per unquantized number.
        """
        rate, size = (peak, weight_bytes) if self.quantized else (plain_peak, plain_bytes)
        computing = self.linear / rate + self.attention / plain_peak
        return max(computing, (self.weights * size + self.cache * plain_bytes) / bandwidth)


def work(config: ModelConfig, shape: BenchShape) -> dict[str, Work]:
    """Stage -> work of one chunk: ``vision``, ``prefix``, ``denoise`` (all steps)."""
    if isinstance(config, Gr00tConfig):
        return _gr00t(config, shape)
    return _pi05(config, shape)


def _pi05(config: Pi05Config, shape: BenchShape) -> dict[str, Work]:
    per_camera = (
        config.vision.tokens_per_camera if isinstance(config.vision, KeypointConfig) else config.vision.num_patches
    )
    proprioception = int(isinstance(config.vision, KeypointConfig))
    prefix = shape.cameras * per_camera + proprioception + shape.text_tokens
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = config.lm_depth

    def layer(width: int, hidden: int) -> int:
        return width * (2 * heads + 2 * keys) + 3 * width * hidden

    language = (layers - 1) * layer(config.lm_width, config.lm_mlp_dim) + config.lm_width * 2 * keys
    expert = layers * layer(config.expert_width, config.expert_mlp_dim)
    expert += 2 * config.expert_width * config.action_dim
    tokens, steps = shape.horizon, shape.num_steps
    return {
        "vision": _vision(config.vision, shape.cameras, config.lm_width),
        "prefix": Work(2 * prefix * language, 4 * prefix * prefix * heads * (layers - 1), language),
        "denoise": Work(
            2 * tokens * expert * steps,
            4 * tokens * (prefix + tokens) * heads * layers * steps,
            expert * steps,
            2 * keys * prefix * layers * steps,
        ),
    }


def _gr00t(config: Gr00tConfig, shape: BenchShape) -> dict[str, Work]:
    one, dit = config.language, config.dit
    prefix = shape.cameras * config.vision.num_patches + shape.text_tokens
    heads = one.num_heads * one.head_dim
    layer = one.width * (2 * heads + 2 * one.num_kv_heads * one.head_dim) + 3 * one.width * one.mlp_dim
    # Causal attention needs half of the products.
    language, mixing = one.depth * layer, one.depth * heads / 2
    if config.adapter is not None:
        language += config.adapter.depth * 12 * config.adapter.width**2
        mixing += config.adapter.depth * config.adapter.width
    crosses = (dit.depth + 1) // 2 if config.interleave else dit.depth
    language += crosses * 2 * config.feature_width * dit.width
    tokens, steps = 1 + config.future_tokens + shape.horizon, shape.num_steps
    # Two linears of the attention of a cross block are of the features, and were counted above.
    head = dit.depth * 12 * dit.width**2 - crosses * 2 * dit.width**2 + dit.width * config.hidden_size
    seen = crosses * prefix + (dit.depth - crosses) * tokens
    return {
        "vision": _vision(config.vision, shape.cameras, one.width),
        "prefix": Work(2 * prefix * language, 4 * prefix * prefix * mixing, language),
        "denoise": Work(
            2 * tokens * head * steps,
            4 * tokens * seen * dit.width * steps,
            head * steps,
            2 * crosses * prefix * dit.width * steps,
        ),
    }


def _vision(config: SiglipConfig | KeypointConfig, cameras: int, lm_width: int) -> Work:
    if isinstance(config, SiglipConfig):
        tokens = cameras * config.num_patches
        weights = config.depth * (4 * config.width**2 + 2 * config.width * config.mlp_dim)
        weights += 3 * config.patch_size**2 * config.width + config.width * lm_width
        attention = 4 * tokens * config.num_patches * config.width * config.depth
        return Work(2 * tokens * weights, attention, weights, quantized=False)
    c1, c2, c3 = config.stem_channels
    size, merge = config.image_size, config.image_size // 8 // 4
    stem = [(size // 2, 3 * 25 * c1), (size // 4, c1 * 9 * c2), (size // 8, c2 * 9 * c3), (4, c3 * merge**2 * lm_width)]
    reads = config.key_dim + config.value_dim
    stem += [(size // 4, c2 * reads), (size // 8, c3 * reads)]
    linear = cameras * sum(2 * side * side * weights for side, weights in stem)
    return Work(linear, 0.0, cameras * sum(weights for _, weights in stem), quantized=False)

"""The SigLIP tower over all cameras in one batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.siglip import SiglipVision
from omega_qvla_core.runtime.cuda_blocks import EncoderLayer, LayerModules
from omega_qvla_core.runtime.cuda_layers import LargeProduct, Workspace
from omega_qvla_core.runtime.cuda_sites import SiteReader


class CudaVision:
    """Images to tokens.

    Args:
        vision: The tower.
        tuned: Block sizes.
        dtype: Of rows and unquantized weights.
        expand: See ``weights.large_weight``.

    Attributes:
        bits: Of what was read, for the name of the precision.
    """

    def __init__(self, vision: SiglipVision, tuned: Tuning, dtype: torch.dtype, expand: bool) -> None:
        self.config = vision.config
        self.dtype = dtype
        read = SiteReader(dtype)
        self.bits = read.bits
        embeddings, config = vision.vision_model.embeddings, vision.config
        weight = embeddings.patch_embedding.weight.detach()
        self._patch_weight = weight.permute(0, 2, 3, 1).flatten(1).to(dtype).contiguous()
        bias = embeddings.patch_embedding.bias.detach().float() + embeddings.position_embedding.weight.detach().float()
        self._patch_bias = bias.to(dtype)
        self.eps = config.layer_norm_eps
        self._layers = [
            EncoderLayer(f"vision layer {index}", _modules(layer), read, tuned, expand)
            for index, layer in enumerate(vision.vision_model.encoder.layers)
        ]

    def weights(self) -> list[LargeProduct]:
        """All products."""
        return [one for layer in self._layers for one in layer.products]

    def run(self, work: Workspace, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``[N * num_patches, width]`` before the last norm, for images ``[N, 3, size, size]`` in [-1, 1].

        Also what the last norm has to add to every row first, float32 ``[width or more]``.
        """
        config = self.config
        count, side = images.shape[0], config.image_size // config.patch_size
        cut = images.to(self.dtype).view(count, 3, side, config.patch_size, side, config.patch_size)
        patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(count, side * side, -1)
        x = work.buffer("vision x", count * side * side, config.width)
        torch.add(patches @ self._patch_weight.t(), self._patch_bias, out=x.view(count, side * side, config.width))
        pending = None
        for layer in self._layers:
            pending = layer.run(work, x, partial(self._attention, count), pending)
        return x, pending

    def _attention(self, images: int, qkv: Tensor) -> Tensor:
        """Every image's patches attend to each other: ``[N * patches, 3 * width]`` to ``[N * patches, width]``."""
        heads, width = self.config.num_heads, self.config.width
        q, k, v = qkv.view(images, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)


def _modules(layer: nn.Module) -> LayerModules:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return LayerModules(layer.layer_norm1, qkv, attention.out_proj, layer.layer_norm2, mlp.fc1, mlp.fc2)

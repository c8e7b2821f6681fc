"""The SigLIP tower over all cameras in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omega_qvla_core.kernels.triton_kernels import large_gemm, rows
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.models.siglip import SiglipVision
from omega_qvla_core.runtime.cuda_layers import LargeProduct, NormFactors, Workspace
from omega_qvla_core.runtime.cuda_sites import Site, read_site, scaled


@dataclass(frozen=True)
class _Layer:
    norm1: NormFactors
    qkv: LargeProduct
    out: LargeProduct
    norm2: NormFactors
    fc1: LargeProduct
    fc2: LargeProduct


class CudaVision:
    """Images to tokens.

    Args:
        vision: The tower.
        tuned: Block sizes.
        dtype: Of rows and unquantized weights.
        expand: See ``weights.large_weight``.

    Attributes:
        sites: What was read, for the name of the precision.
    """

    def __init__(self, vision: SiglipVision, tuned: Tuning, dtype: torch.dtype, expand: bool) -> None:
        self.config = vision.config
        self.dtype = dtype
        self.sites: list[Site] = []
        embeddings, config = vision.vision_model.embeddings, vision.config
        weight = embeddings.patch_embedding.weight.detach()
        self._patch_weight = weight.permute(0, 2, 3, 1).flatten(1).to(dtype).contiguous()
        bias = embeddings.patch_embedding.bias.detach().float() + embeddings.position_embedding.weight.detach().float()
        self._patch_bias = bias.to(dtype)
        self.eps = config.layer_norm_eps
        self._layers = []
        for index, layer in enumerate(vision.vision_model.encoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = self._site(f"vision layer {index} qkv", attention.q_proj, attention.k_proj, attention.v_proj)
            out = self._site(f"vision layer {index} out", attention.out_proj)
            fc1, fc2 = (
                self._site(f"vision layer {index} fc1", mlp.fc1),
                self._site(f"vision layer {index} fc2", mlp.fc2),
            )
            products = [LargeProduct(site, site.large(expand=expand), tuned) for site in (qkv, out, fc1, fc2)]
            norm1, norm2 = (
                NormFactors(
                    scaled(one.weight, site.unsmooth),
                    scaled(one.bias, site.unsmooth),
                )
                for one, site in ((layer.layer_norm1, qkv), (layer.layer_norm2, fc1))
            )
            self._layers.append(_Layer(norm1, products[0], products[1], norm2, products[2], products[3]))
        last = vision.vision_model.post_layernorm
        self.final = NormFactors(scaled(last.weight, None), scaled(last.bias, None))

    def _site(self, name: str, *linears: torch.nn.Module) -> Site:
        site = read_site(name, linears, self.dtype)
        self.sites.append(site)
        return site

    def weights(self) -> list[LargeProduct]:
        """All products."""
        return [one for layer in self._layers for one in (layer.qkv, layer.out, layer.fc1, layer.fc2)]

    def run(self, work: Workspace, images: Tensor) -> Tensor:
        """Rows ``[N * num_patches, width]`` before the last norm, for images ``[N, 3, size, size]`` in [-1, 1]."""
        config = self.config
        count, side = images.shape[0], config.image_size // config.patch_size
        cut = images.to(self.dtype).view(count, 3, side, config.patch_size, side, config.patch_size)
        patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(count, side * side, -1)
        x = work.buffer("vision x", count * side * side, config.width)
        torch.add(patches @ self._patch_weight.t(), self._patch_bias, out=x.view(count, side * side, config.width))
        for layer in self._layers:
            self._run_layer(work, layer, x, count)
        return x

    def _run_layer(self, work: Workspace, layer: _Layer, x: Tensor, images: int) -> None:
        config, tokens = self.config, x.shape[0]
        normed = layer.qkv.normed(work, "vision in", x, rows.LAYER_NORM, self.eps, layer.norm1)
        qkv = layer.qkv(normed, work.buffer("vision qkv", tokens, 3 * config.width))
        heads = qkv.view(images, -1, 3, config.num_heads, config.width // config.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        mixed = mixed.transpose(1, 2).reshape(tokens, config.width)
        layer.out(layer.out.coded(work, "vision mixed", mixed), x, residual=x)
        normed = layer.fc1.normed(work, "vision in", x, rows.LAYER_NORM, self.eps, layer.norm2)
        hidden = layer.fc1(normed, work.buffer("vision hidden", tokens, layer.fc2.weight.columns), large_gemm.GELU)
        layer.fc2(layer.fc2.coded(work, "vision codes", hidden, config.mlp_dim), x, residual=x)

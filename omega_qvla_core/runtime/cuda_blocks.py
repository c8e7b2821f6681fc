"""A pre-norm layer with biases and a tanh-GELU MLP for many tokens: of the vision tower, and of GR00T's adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from omega_qvla_core.kernels.triton_kernels import large_gemm, rows
from omega_qvla_core.kernels.triton_kernels.tuning import Tuning
from omega_qvla_core.runtime.cuda_layers import LargeProduct, NormFactors, Workspace
from omega_qvla_core.runtime.cuda_sites import SiteReader


@dataclass(frozen=True)
class LayerModules:
    """The modules of a layer, in the order of the computation; queries, keys and values read one input."""

    norm1: nn.LayerNorm
    qkv: tuple[nn.Module, nn.Module, nn.Module]
    out: nn.Module
    norm2: nn.LayerNorm
    fc1: nn.Module
    fc2: nn.Module


class EncoderLayer:
    """``x + out(attention(norm1(x)))``, then ``x + fc2(gelu(fc1(norm2(x))))``.

    Args:
        name: For messages and buffers; layers of one tower that run in turn may share the part before the first space.
        modules: Of the model.
        read: Reads its sites.
        tuned: Block sizes.
        expand: See ``weights.large_weight``.
    """

    def __init__(self, name: str, modules: LayerModules, read: SiteReader, tuned: Tuning, expand: bool) -> None:
        self._name, self._eps = name.split(" ", maxsplit=1)[0], (modules.norm1.eps, modules.norm2.eps)
        qkv, out = read(f"{name} qkv", *modules.qkv), read(f"{name} out", modules.out)
        fc1, fc2 = read(f"{name} fc1", modules.fc1), read(f"{name} fc2", modules.fc2)
        self.products = [LargeProduct(site, site.large(expand=expand), tuned) for site in (qkv, out, fc1, fc2)]
        self._norm1 = NormFactors.of_layer_norm(modules.norm1, qkv.unsmooth)
        self._norm2 = NormFactors.of_layer_norm(modules.norm2, fc1.unsmooth)

    def run(self, work: Workspace, x: Tensor, attention: Callable[[Tensor], Tensor]) -> None:
        """Update rows ``x [T, width]``.

        Args:
            work: Buffers.
            x: Of any floating type.
            attention: Queries, keys and values ``[T, 3 * width]`` to ``[T, width]``.
        """
        qkv, out, fc1, fc2 = self.products
        name, tokens = self._name, x.shape[0]
        normed = qkv.normed(work, f"{name} in", x, rows.LAYER_NORM, self._eps[0], self._norm1)
        mixed = attention(qkv(normed, work.buffer(f"{name} qkv", tokens, qkv.weight.outputs)))
        out(out.coded(work, f"{name} mixed", mixed), x, residual=x)
        normed = fc1.normed(work, f"{name} in", x, rows.LAYER_NORM, self._eps[1], self._norm2)
        hidden = fc1(normed, work.buffer(f"{name} hidden", tokens, fc2.weight.columns), large_gemm.GELU)
        fc2(fc2.coded(work, f"{name} codes", hidden, fc1.weight.outputs), x, residual=x)

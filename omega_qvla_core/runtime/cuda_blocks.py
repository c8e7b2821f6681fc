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

    The biases of ``out`` and ``fc2`` are added by the norm that reads the rows next: cuBLAS, which does these products
    where it is faster, adds a residual or a bias, not both.

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
        self._qkv, out, self._fc1, fc2 = (
            LargeProduct(site.input, site.large(expand=expand), tuned) for site in (qkv, out, fc1, fc2)
        )
        (self._out, self._out_bias), (self._fc2, self._fc2_bias) = out.without_bias(), fc2.without_bias()
        self.products = [self._qkv, self._out, self._fc1, self._fc2]
        self._norm1 = NormFactors.of_layer_norm(modules.norm1, self._qkv.unsmooth)
        self._norm2 = NormFactors.of_layer_norm(modules.norm2, self._fc1.unsmooth)

    def run(
        self, work: Workspace, x: Tensor, attention: Callable[[Tensor], Tensor], pending: Tensor | None = None
    ) -> Tensor | None:
        """Update rows ``x [T, width]``.

        Args:
            work: Buffers.
            x: Of any floating type.
            attention: Queries, keys and values ``[T, 3 * width]`` to ``[T, width]``.
            pending: What the layer before left to be added to every row, float32 ``[width or more]``.

        Returns:
            What is left to be added to every row of ``x``.
        """
        name, tokens = self._name, x.shape[0]
        normed = self._qkv.normed(work, f"{name} in", x, rows.LAYER_NORM, self._eps[0], self._norm1, pending)
        mixed = attention(self._qkv(normed, work.buffer(f"{name} qkv", tokens, self._qkv.weight.outputs)))
        self._out(self._out.coded(work, f"{name} mixed", mixed), x, residual=x)
        normed = self._fc1.normed(work, f"{name} in", x, rows.LAYER_NORM, self._eps[1], self._norm2, self._out_bias)
        hidden = self._fc1(normed, work.buffer(f"{name} hidden", tokens, self._fc2.weight.columns), large_gemm.GELU)
        self._fc2(self._fc2.coded(work, f"{name} codes", hidden, self._fc1.weight.outputs), x, residual=x)
        return self._fc2_bias

"""Backend ``triton``: the integer products of ``small_gemm`` on a GPU, for any number of tokens and any group size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omega_qvla_core.kernels.base import Backend, GroupedWeight
from omega_qvla_core.kernels.triton_kernels import small_gemm as small
from omega_qvla_core.kernels.triton_kernels.launch import padded_tokens, small_linear
from omega_qvla_core.kernels.triton_kernels.layout import BLOCK_OUT
from omega_qvla_core.kernels.triton_kernels.weights import SmallWeight, regrouped, small_weight


class TritonBackend(Backend):
    """Integer sums per group are exact; ``y += sum_g * sx_g * sw_g`` in ascending order in float32.

    Outputs equal those of the ``cpu`` backend up to the rounding of that float32 sum: a GPU may fuse a product and a
    sum into one operation. Static-shape engines call the kernels themselves; this is the way of a single layer.
    """

    name = "triton"

    def prepare(self, weight: GroupedWeight) -> SmallWeight:
        return small_weight(weight)

    def linear(self, codes: Tensor, scales: Tensor, weight: SmallWeight) -> Tensor:
        tokens = codes.shape[1]
        if tokens == 0:
            return codes.new_zeros(0, weight.outputs, dtype=torch.float32)
        rows = padded_tokens(tokens)
        x, out = self._operands(codes, weight, rows)
        sx = scales.float().expand(scales.shape[0], tokens, 1)[..., 0]
        small_linear(x, F.pad(sx, (0, rows - tokens)).contiguous(), weight, out)
        return out[:tokens, : weight.outputs]

    def accumulators(self, codes: Tensor, weight: SmallWeight) -> Tensor:
        """The integer sums themselves, int64 ``[G, M, O]``, for tests against an int64 oracle."""
        tokens = codes.shape[1]
        rows = padded_tokens(tokens)
        x, out = self._operands(codes, weight, rows)
        sums = out.new_zeros(weight.groups, *out.shape, dtype=torch.int32)
        small_linear(x, sums[0].float()[:1], weight, sums, small.SUMS)
        return sums[:, :tokens, : weight.outputs].long()

    def _operands(self, codes: Tensor, weight: SmallWeight, rows: int) -> tuple[Tensor, Tensor]:
        x = regrouped(codes, weight.group, weight.columns)
        x = F.pad(x, (0, 0, 0, rows - x.shape[0]))
        return x, torch.zeros(rows, weight.row_tiles * BLOCK_OUT, device=codes.device)

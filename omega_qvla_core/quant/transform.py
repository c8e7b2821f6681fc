"""What happens to an input before it is coded: divide (smoothing), permute, rotate; all linear, done in one product.

Per block ``b`` the transform is ``u_b = x[order_b] M_b`` with ``M_b = diag(1 / s_b) R_b``. The weight gets the inverse,
``W_u = W[:, order] M^-T``, from the transform *as it is stored* (float16 rotations are not exactly orthogonal), so that
``u W_u^T = x W^T`` whatever was rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla_core.quant.permute import PERMUTATIONS, channel_score
from omega_qvla_core.quant.recipe import SideRecipe
from omega_qvla_core.quant.rotation import STORED_ROTATIONS, hadamard_blocks, input_rotation

# Channels whose largest value is below this fraction of the largest of all are smoothed as if it were this.
_SMALLEST_FRACTION = 1e-5

# Largest order that an int16 holds.
_INT16_CHANNELS = 32767

# What the pack stores of a transform.
TRANSFORM_TENSORS = ("smooth", "order", "rotation", "rotation_tail")


def smoothing_vector(activation_peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`` with geometric mean 1 (METHOD E1), as stored.

    Args:
        activation_peak: ``[I]``, largest magnitude of each channel.
        weight: ``[O, I]``, all linears that read the input, stacked.
        alpha: 0 to 1.

    Returns:
        float16 ``[I]``, positive. Channels that are dead in input or weight get bounded values.
    """
    peak, columns = activation_peak.double(), weight.double().abs().amax(dim=0)
    peak = peak.clamp_min(max(float(peak.max()) * _SMALLEST_FRACTION, 1e-30))
    columns = columns.clamp_min(max(float(columns.max()) * _SMALLEST_FRACTION, 1e-30))
    logs = alpha * peak.log() - (1 - alpha) * columns.log()
    return (logs - logs.mean()).exp().clamp(2.0**-12, 2.0**12).half()


def build_transform(recipe: SideRecipe, weight: Tensor, activation_peak: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a site's transform.

    Args:
        recipe: Of the site.
        weight: float64 ``[O, I]``, stacked rows of all readers.
        activation_peak: ``[I]``.

    Returns:
        Some of ``TRANSFORM_TENSORS``: ``smooth`` float16 ``[I]``, ``order`` int16 or int32 ``[I]``, ``rotation``
        float16 ``[n, B, B]`` and ``rotation_tail`` float16 ``[r, r]`` for rotations that depend on the weight.
    """
    tensors: dict[str, Tensor] = {}
    columns = weight.shape[1]
    if recipe.smoothing is not None:
        tensors["smooth"] = smoothing_vector(activation_peak, weight, recipe.smoothing)
        weight = weight * tensors["smooth"].double()
        activation_peak = activation_peak / tensors["smooth"].float()
    if recipe.permutation != "none":
        score = channel_score(weight, activation_peak, recipe.permutation_score)
        order = PERMUTATIONS[recipe.permutation](score, recipe.block)
        tensors["order"] = order.to(torch.int16 if columns <= _INT16_CHANNELS else torch.int32)
        weight = weight[:, order]
    if recipe.rotation in STORED_ROTATIONS:
        blocks = [block.half() for block in input_rotation(weight, recipe.rotation, recipe.block)]
        tensors.update(stack_blocks(blocks, "rotation"))
    return tensors


def stack_blocks(blocks: list[Tensor], name: str) -> dict[str, Tensor]:
    """``{name: [n, B, B], name_tail: [r, r]}``; the tail is there when the last block is short."""
    size = blocks[0].shape[0]
    full = [block for block in blocks if block.shape[0] == size]
    tensors = {name: torch.stack(full)}
    if len(full) < len(blocks):
        tensors[f"{name}_tail"] = blocks[-1]
    return tensors


def unstack_blocks(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Inverse of ``stack_blocks``, in float64."""
    blocks = list(tensors[name].double().cpu())
    if f"{name}_tail" in tensors:
        blocks.append(tensors[f"{name}_tail"].double().cpu())
    return blocks


def block_matrices(recipe: SideRecipe, columns: int, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """``M_b`` of every block, float64 ``[b, b]``, from the stored tensors."""
    size = min(recipe.block, columns)
    widths = [min(size, columns - start) for start in range(0, columns, size)]
    if recipe.rotation in STORED_ROTATIONS:
        blocks = unstack_blocks(tensors, "rotation")
    elif recipe.rotation == "none":
        blocks = [torch.eye(width, dtype=torch.float64) for width in widths]
    else:
        blocks = [hadamard_blocks(width) for width in widths]
    if "smooth" not in tensors:
        return blocks
    smooth = tensors["smooth"].double().cpu()
    if "order" in tensors:
        smooth = smooth[tensors["order"].long().cpu()]
    return [block.cpu() / part[:, None] for block, part in zip(blocks, smooth.split(widths))]


def weight_in_basis(weight: Tensor, order: Tensor | None, matrices: list[Tensor]) -> Tensor:
    """``W[:, order] M^-T``, float64 ``[O, I]``."""
    if order is not None:
        weight = weight[:, order.long()]
    parts = weight.split([matrix.shape[0] for matrix in matrices], dim=1)
    return torch.cat([torch.linalg.solve(matrix, part.T).T for matrix, part in zip(matrices, parts)], dim=1)


def gram_in_basis(gram: Tensor, order: Tensor | None, matrices: list[Tensor]) -> Tensor:
    """``M^T G M`` of a Gram matrix ``[I, I]`` of raw inputs, float64; one matrix of that size is made."""
    rotated = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    sizes = [matrix.shape[0] for matrix in matrices]
    kept = None if order is None else order.long().split(sizes)
    for index, (matrix, rows) in enumerate(zip(matrices, rotated.split(sizes))):
        if kept is None:
            start = sum(sizes[:index])
            source = gram[start : start + sizes[index]].double()
        else:
            source = gram[kept[index]][:, order.long()].double()
        torch.matmul(matrix.T, source, out=rows)
    for matrix, columns in zip(matrices, rotated.split(sizes, dim=1)):
        columns.copy_(columns @ matrix)
    return rotated


@dataclass(frozen=True)
class InputTransform:
    """A transform ready to run.

    Attributes:
        order: int64 ``[I]`` or None.
        blocks: float32 ``[n, B, B]`` or None; a short last block is padded with zeros.
        vector: float32 ``[I]`` or None: the diagonal of a transform without rotation.
    """

    order: Tensor | None
    blocks: Tensor | None
    vector: Tensor | None

    @classmethod
    def from_tensors(
        cls, recipe: SideRecipe, columns: int, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> InputTransform:
        """Compose the stored tensors, in float64 on the CPU, and bring the result to ``device``."""
        order = tensors["order"].long().to(device) if "order" in tensors else None
        matrices = block_matrices(recipe, columns, tensors)
        if recipe.rotation == "none":
            vector = torch.cat([matrix.diagonal() for matrix in matrices]).float().to(device)
            return cls(order, None, vector if "smooth" in tensors else None)
        size = matrices[0].shape[0]
        padded = [torch.nn.functional.pad(m, (0, size - m.shape[0], 0, size - m.shape[0])) for m in matrices]
        return cls(order, torch.stack(padded).float().to(device), None)

    def apply(self, x: Tensor, group: int) -> Tensor:
        """Transform and cut into groups.

        Args:
            x: float32 ``[M, I]``.
            group: Columns per group.

        Returns:
            ``[G, M, group]``, zero-padded.
        """
        columns = x.shape[1]
        if self.order is not None:
            x = x[:, self.order]
        if self.vector is not None:
            x = x * self.vector
        if self.blocks is None:
            return _in_groups(x, group)
        blocks, size, _ = self.blocks.shape
        u = torch.bmm(_in_groups(x, size), self.blocks)
        if size == group:
            return u
        return _in_groups(u.transpose(0, 1).reshape(x.shape[0], blocks * size)[:, :columns], group)

    def apply_flat(self, x: Tensor) -> Tensor:
        """``[M, I]`` in, ``[M, I]`` out."""
        return self.apply(x, x.shape[1])[0]


def _in_groups(x: Tensor, group: int) -> Tensor:
    """``[M, I]`` -> ``[G, M, group]``, a view unless padding is needed."""
    tokens = x.shape[0]
    if x.shape[1] % group:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % group))
    return x.view(tokens, x.shape[1] // group, group).transpose(0, 1)

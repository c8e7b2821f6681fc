"""The quantized layer: everything that reads one input, computed together.

``QuantizedSite`` holds what a pack stores (codes, scales, transform, tables) as buffers and computes the stacked
outputs of all linears that read the input. ``QuantizedLinear`` stands where one of these linears was, has its call
signature, and hands out its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla_core import kernels
from omega_qvla_core.errors import StepContextError
from omega_qvla_core.kernels import GroupedWeight, unpack_codes
from omega_qvla_core.models.step_context import DenoiseStep, current_step
from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES, row_factors
from omega_qvla_core.quant.multiplier import unpack_multipliers
from omega_qvla_core.quant.recipe import INTEGER_MULTIPLIER, SideRecipe
from omega_qvla_core.quant.scales import group_count, spread_scales
from omega_qvla_core.quant.transform import InputTransform, unstack_blocks


@dataclass(frozen=True)
class Reader:
    """One linear of a site: module name and width of its output."""

    name: str
    out_features: int


@dataclass(frozen=True)
class SiteSpec:
    """What a quantized site is, besides its tensors.

    Attributes:
        name: Name of the site.
        side: ``language`` or ``action_head``.
        readers: Linears, in the order in which their rows are stacked.
        in_features: Width I of the input.
        steps: Denoise steps that its tables were made for; 0 if no table depends on the step.
        recipe: Recipe of all its readers.
    """

    name: str
    side: str
    readers: tuple[Reader, ...]
    in_features: int
    steps: int
    recipe: SideRecipe

    @property
    def out_features(self) -> int:
        """Stacked rows O."""
        return sum(reader.out_features for reader in self.readers)

    @property
    def executable(self) -> bool:
        """Whether integer products are computed (else the quantization is simulated in float32)."""
        return self.recipe.executable

    @property
    def product_group(self) -> int:
        """Columns per integer sum."""
        group = min(self.recipe.group or self.in_features, self.in_features)
        if self.recipe.scale_format == INTEGER_MULTIPLIER:
            group = self.in_features
        if self.recipe.activation != "token_group":
            return group
        return min(group, self.recipe.activation_group)


def dequantized(spec: SiteSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 ``[O, I]``: the weight that the codes stand for, in the transformed basis."""
    codes = unpack_codes(tensors["codes"], spec.recipe.weight_bits, spec.in_features)
    return codes.float() * spread_scales(group_scales(spec, tensors), spec.recipe.group, spec.in_features)


def group_scales(spec: SiteSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 ``[O, G]``: the scale of every row and group."""
    scales = tensors["scales"].float()
    return scales if "multipliers" not in tensors else scales * _multipliers(spec, tensors).float()


def _multipliers(spec: SiteSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    return unpack_multipliers(tensors["multipliers"], group_count(spec.in_features, spec.recipe.group))


@dataclass
class _Ready:
    """Working data, made from the buffers at the first call."""

    transform: InputTransform
    rows: list[Tensor]
    weight: Any
    encode: Any
    restore: list[Tensor]
    low_rank: tuple[Tensor, Tensor] | None


@dataclass
class _Shared:
    """Outputs of one call that wait for the other readers of the same input."""

    x: Tensor
    content: Tensor | None
    version: int
    step: DenoiseStep | None
    outputs: list[Tensor | None] = field(default_factory=list)


class QuantizedSite(nn.Module):
    """See the module's docstring.

    Args:
        spec: What the site is.
        tensors: Stored tensors by name: ``codes``, ``scales``, optionally ``multipliers``, ``smooth``, ``order``,
            ``rotation``, ``rotation_tail``, ``output_rotation``, ``output_rotation_tail``, ``activation``, ``centre``,
            ``centre_bias``, ``bias``, ``low_rank_in`` ``[r, I]``, ``low_rank_out`` ``[O, r]``. They become buffers as
            they are, so that a pack holds exactly what runs.
    """

    def __init__(self, spec: SiteSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.backend = "cpu" if spec.executable else "reference"
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._widths = [reader.out_features for reader in spec.readers]
        self._ready: _Ready | None = None
        self._shared: _Shared | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a pack stores."""
        return dict(self.named_buffers())

    def set_backend(self, name: str) -> None:
        """Choose the backend of integer products; simulated sites always run in float32."""
        kernels.backend(name)
        self.backend = name if self.spec.executable else "reference"
        self._ready = None

    def resident_bytes(self) -> int:
        """Bytes of the stored buffers and of the working copies that this backend makes of them."""
        ready = self._ready or self._prepare()
        found: dict[int, int] = {}
        _count_storages(
            (self.tensors(), ready.transform, ready.rows, ready.weight, ready.restore, ready.low_rank), found
        )
        return sum(found.values())

    def grouped_weight(self) -> GroupedWeight:
        """The weight of an executable site as backends take it."""
        return self._grouped_weight(self.tensors())

    def forward(self, x: Tensor) -> Tensor:
        """Stacked outputs ``[..., O]`` of an input ``[..., I]``, in the input's dtype.

        Raises:
            StepContextError: Tables depend on the denoise step, and there is none or another number of steps.
        """
        row = self._row(current_step())
        ready = self._ready or self._prepare()
        buffers = self._buffers
        flat = x.detach().reshape(-1, self.spec.in_features)
        flat = flat if flat.dtype == torch.float32 else flat.float()
        if "centre" in buffers:
            flat = flat - buffers["centre"][row].float()
        y = self._product(flat, row, ready)
        if "centre_bias" in buffers:
            y = y + buffers["centre_bias"][row].float()
        if "bias" in buffers:
            y = y + buffers["bias"].float()
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return y.view(*x.shape[:-1], self.spec.out_features)

    def output(self, index: int, x: Tensor) -> Tensor:
        """Output of one reader. Readers that are called with the same tensor at the same step share one computation."""
        if len(self.spec.readers) == 1:
            return self(x)
        shared, step = self._shared, current_step()
        if shared is None or not _same(shared, x, step) or shared.outputs[index] is None:
            shared = self._share(x, step)
        result, shared.outputs[index] = shared.outputs[index], None
        if not any(output is not None for output in shared.outputs):
            self._shared = None
        return result

    def _share(self, x: Tensor, step: DenoiseStep | None) -> _Shared:
        outputs = list(self(x).split_with_sizes(self._widths, dim=-1))
        tracked = not x.is_inference()
        # Inference tensors have no version counter, so that a change in place shows in the content only.
        shared = _Shared(x, None if tracked else x.clone(), x._version if tracked else 0, step, outputs)
        self._shared = shared
        return shared

    def _row(self, step: DenoiseStep | None) -> int:
        if self.spec.steps == 0:
            return 0
        if step is None:
            raise StepContextError(
                f"{self.spec.name} has tables for {self.spec.steps} denoise steps but runs outside the denoise loop; "
                "wrap the call in denoise_step(index, total)"
            )
        if step.total != self.spec.steps:
            raise StepContextError(
                f"{self.spec.name} was calibrated for {self.spec.steps} denoise steps but runs with {step.total}; "
                "use the calibrated number or quantize again"
            )
        return step.index

    def _product(self, flat: Tensor, row: int, ready: _Ready) -> Tensor:
        spec = self.spec
        bits = spec.recipe.activation_bits
        if spec.executable:
            u = ready.transform.apply(flat, spec.product_group)
            codes, scales = ready.encode(u, ready.rows[row], bits)
            y = kernels.backend(self.backend).linear(codes, scales, ready.weight)
            return y if ready.low_rank is None else y + self._low_rank(u, ready.low_rank)
        u = self._simulation_layout(ready.transform.apply_flat(flat))
        codes, scales = ready.encode(u, ready.rows[row], bits)
        y = (codes * scales).transpose(0, 1).reshape(flat.shape[0], -1)[:, : spec.in_features] @ ready.weight
        if ready.low_rank is not None:
            return y + self._low_rank(u, ready.low_rank)
        if not ready.restore:
            return y
        parts = y.split([block.shape[0] for block in ready.restore], dim=1)
        return torch.cat([part @ block for part, block in zip(parts, ready.restore)], dim=1)

    def _low_rank(self, u: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """The branch that sees the transformed input ``[G, M, g]`` before it is coded: ``[M, O]``."""
        flat = u.transpose(0, 1).reshape(u.shape[1], -1)[:, : self.spec.in_features]
        return flat @ factors[0] @ factors[1]

    def _simulation_layout(self, u: Tensor) -> Tensor:
        """``[M, I]`` -> ``[G, M, g]`` for the scheme's scales (one group except for ``token_group``)."""
        if self.spec.recipe.activation != "token_group":
            return u[None]
        group = min(self.spec.recipe.activation_group, self.spec.in_features)
        padded = torch.nn.functional.pad(u, (0, -u.shape[1] % group))
        return padded.view(u.shape[0], -1, group).transpose(0, 1)

    def _prepare(self) -> _Ready:
        spec, recipe, tensors = self.spec, self.spec.recipe, self.tensors()
        transform = InputTransform.from_tensors(recipe, spec.in_features, tensors, self.codes.device)
        rows = [row_factors(recipe.activation, row.float(), recipe.activation_bits) for row in tensors["activation"]]
        restore = []
        if "output_rotation" in tensors:
            restore = [block.float().to(self.codes.device) for block in unstack_blocks(tensors, "output_rotation")]
        if spec.executable:
            weight = kernels.backend(self.backend).prepare(self._grouped_weight(tensors))
        else:
            weight = dequantized(spec, tensors).t().contiguous()
        encode = ACTIVATION_SCHEMES[recipe.activation].encode
        low_rank = None
        if "low_rank_in" in tensors:
            low_rank = tensors["low_rank_in"].float().t(), tensors["low_rank_out"].float().t()
        self._ready = _Ready(transform, rows, weight, encode, restore, low_rank)
        return self._ready

    def _grouped_weight(self, tensors: Mapping[str, Tensor]) -> GroupedWeight:
        spec = self.spec
        codes = unpack_codes(tensors["codes"], spec.recipe.weight_bits, spec.in_features)
        if "multipliers" in tensors:
            codes = codes * spread_scales(_multipliers(spec, tensors), spec.recipe.group, spec.in_features)
            scales = tensors["scales"].float().expand(-1, group_count(spec.in_features, spec.product_group))
            return GroupedWeight(codes, scales, spec.product_group, 8, spec.recipe.activation_bits)
        per_column = spread_scales(tensors["scales"].float(), spec.recipe.group, spec.in_features)
        return GroupedWeight(
            codes,
            per_column[:, :: spec.product_group],
            spec.product_group,
            spec.recipe.weight_bits,
            spec.recipe.activation_bits,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedSite:
        """Moved buffers need new working data; dtype conversions must not touch what the pack stores."""
        self._ready = None
        self._shared = None
        return super()._apply(_keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        recipe = self.spec.recipe
        return (
            f"in={self.spec.in_features}, out={self.spec.out_features}, "
            f"W{recipe.weight_bits}A{recipe.activation_bits}, rotation={recipe.rotation}, "
            f"activation={recipe.activation}, steps={self.spec.steps}, backend={self.backend}"
        )


def _same(shared: _Shared, x: Tensor, step: DenoiseStep | None) -> bool:
    if shared.x is not x or shared.step != step:
        return False
    if shared.content is not None:
        return torch.equal(shared.content, x)
    return shared.version == x._version


def _keeping_dtype(fn: Any) -> Any:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(fn(tensor).device)

    return moved


def _count_storages(value: Any, found: dict[int, int]) -> None:
    """Bytes of every distinct storage in nested containers and dataclasses."""
    if isinstance(value, Tensor) and value.is_mkldnn:
        # oneDNN's own layout has no storage that could be looked at.
        found[id(value)] = value.numel() * value.element_size()
    elif isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            _count_storages(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _count_storages(item, found)
    elif is_dataclass(value):
        _count_storages(vars(value), found)

"""What a quantization costs and saves: errors per layer and step, bytes with every table counted, action error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from omega_qvla_core.quant.action_error import ActionError
from omega_qvla_core.quant.linear import QuantizedLinear, quantized_sites
from omega_qvla_core.quant.parts import StoredPart, stored_parts
from omega_qvla_core.quant.profile import SiteProfile
from omega_qvla_core.quant.quantizable import QuantizablePolicy
from omega_qvla_core.quant.record import record_of
from omega_qvla_core.quant.scope import linear_side
from omega_qvla_core.quant.site import QuantizedSite

_HALF_BYTES = 2

# Buffer of a site -> part of the bytes that it is listed under.
_PARTS = {
    "codes": "codes",
    "scales": "weight_scales",
    "multipliers": "weight_scales",
    "smooth": "smoothing",
    "order": "permutation",
    "rotation": "input_rotation",
    "rotation_tail": "input_rotation",
    "output_rotation": "output_rotation",
    "output_rotation_tail": "output_rotation",
    "activation": "activation_tables",
    "centre": "centring",
    "centre_bias": "centring",
    "bias": "bias",
    "low_rank_in": "low_rank",
    "low_rank_out": "low_rank",
}


@dataclass(frozen=True)
class SiteReport:
    """One input site.

    Attributes:
        name: Of the site.
        side: ``language`` or ``action_head``.
        readers: Linears that read it.
        shape: Stacked rows and columns ``(O, I)``.
        bits: Bits of weights and activations.
        executable: Integer products, or simulated.
        error: ``|y' - y| / |y|`` on the calibration sample.
        per_step: The same per denoise step.
        fp16_bytes: Of the weights as float16.
        bytes: Per part of what is stored.
        notes: What was done other than asked.
        decision: Of the automatic choice, if there was one: ``taken``, ``start`` and everything ``tried``, with errors
            on held-out calibration tokens and bytes.
    """

    name: str
    side: str
    readers: tuple[str, ...]
    shape: tuple[int, int]
    bits: tuple[int, int]
    executable: bool
    error: float
    per_step: tuple[float, ...]
    fp16_bytes: int
    bytes: dict[str, int]
    notes: tuple[str, ...]
    decision: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class QuantReport:
    """The report.

    Attributes:
        recipe: Name.
        sites: One entry per input site.
        fp16_bytes: In-scope weights as float16 (METHOD A.11).
        quantized_bytes: The same linears as stored, every table counted; linears that stay at 16 bits included.
        other_bytes: Everything out of scope, as stored.
        resident_bytes: What the quantized sites keep in memory once they have run, stored buffers included.
        actions: Action error, if it was measured.
        left_at_16_bits: In-scope linears that the recipe leaves.
        profiles: By site, of a fresh quantization: channel energies before and after the transform, activation ranges.
        parts_fp16_bytes: What scope ``whole`` replaced besides linears, as float16.
        parts_bytes: What stands in its place (token table, step tables, embodiment weights).
    """

    recipe: str
    sites: tuple[SiteReport, ...]
    fp16_bytes: int
    quantized_bytes: int
    other_bytes: int
    resident_bytes: int
    actions: ActionError | None = None
    left_at_16_bits: tuple[str, ...] = ()
    profiles: Mapping[str, SiteProfile] = field(default_factory=dict)
    parts_fp16_bytes: int = 0
    parts_bytes: int = 0

    @property
    def whole_fp16_bytes(self) -> int:
        """Every tensor of the model, the in-scope ones as float16, the others as stored."""
        return self.fp16_bytes + self.parts_fp16_bytes + self.other_bytes

    @property
    def whole_saved(self) -> float:
        """Share of ``whole_fp16_bytes`` that is saved, 0 to 1."""
        stored = self.quantized_bytes + self.parts_bytes + self.other_bytes
        return 1 - stored / self.whole_fp16_bytes if self.whole_fp16_bytes else 0.0

    @property
    def saved(self) -> float:
        """Share of the in-scope float16 bytes that is saved (METHOD A.11), 0 to 1."""
        return 1 - self.quantized_bytes / self.fp16_bytes if self.fp16_bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        values = {key: value for key, value in vars(self).items() if key not in ("sites", "actions", "profiles")}
        values["saved"], values["whole_saved"] = self.saved, self.whole_saved
        values["sites"] = [vars(site) for site in self.sites]
        actions = self.actions
        values["actions"] = None if actions is None else {**vars(actions), "jerk_change": actions.jerk_change}
        values["profiles"] = {name: profile.to_json() for name, profile in self.profiles.items()}
        return values

    def to_markdown(self) -> str:
        """As a table."""
        lines = [
            f"Recipe `{self.recipe}`: in-scope weights {self.fp16_bytes} bytes in float16, {self.quantized_bytes} as "
            + f"stored (every table counted), {self.saved:.1%} saved; out of scope {self.other_bytes} bytes, "
            + f"whole model {self.whole_saved:.1%} saved.",
        ]
        if self.actions is not None:
            a = self.actions
            lines.append(
                f"Action error over {a.observations} observations: relative {a.relative:.4f} (median per observation "
                f"{a.median:.4f}), rms {a.rms:.4f}, largest {a.largest:.3f}."
            )
            if a.gripper_flips is not None:
                lines.append(f"Gripper on the other side in {a.gripper_flips:.2%} of the steps.")
            if a.jerk_change is not None:
                lines.append(f"Jerk {a.jerk_change:+.1%} (rms third difference {a.jerk:.4f}).")
        lines += ["", "| site | rows x columns | bits | error | bytes | notes |", "|---|---|---|---|---|---|"]
        for site in self.sites:
            size = f"{site.shape[0]} x {site.shape[1]}"
            bits = f"W{site.bits[0]}A{site.bits[1]}{'' if site.executable else ' (simulated)'}"
            notes = "; ".join(site.notes)
            lines.append(f"| {site.name} | {size} | {bits} | {site.error:.4f} | {sum(site.bytes.values())} | {notes} |")
        return "\n".join(lines) + "\n"


def report(
    policy: QuantizablePolicy, actions: ActionError | None = None, profiles: Mapping[str, SiteProfile] | None = None
) -> QuantReport:
    """Report on a quantized policy, fresh or loaded from a pack.

    Args:
        policy: From ``quantize_policy`` or ``load_pack``.
        actions: Action error to include.
        profiles: Of the sites, to include.

    Raises:
        QuantizationError: The policy is not quantized.
    """
    model = policy.model
    record = record_of(model)
    sites = tuple(_site_report(site, record.sites.get(site.spec.name, {})) for site in quantized_sites(model))
    left = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and linear_side(name)}
    parts = [part for _, part in stored_parts(model)]
    left_bytes = sum(tensor.numel() for m in left.values() for tensor in m.parameters()) * _HALF_BYTES
    return QuantReport(
        recipe=record.recipe.name,
        sites=sites,
        fp16_bytes=sum(site.fp16_bytes for site in sites) + left_bytes,
        quantized_bytes=sum(sum(site.bytes.values()) for site in sites) + left_bytes,
        other_bytes=_other_bytes(model, set(left), 2 if record.recipe.unquantized_dtype == "bfloat16" else 4),
        resident_bytes=sum(site.resident_bytes() for site in quantized_sites(model)),
        actions=actions,
        left_at_16_bits=tuple(left),
        profiles=profiles or {},
        parts_fp16_bytes=sum(part.spec["replaced"] for part in parts) * _HALF_BYTES,
        parts_bytes=sum(t.numel() * t.element_size() for part in parts for t in part.buffers()),
    )


def in_scope_bytes(policy: QuantizablePolicy) -> int:
    """Bytes of the in-scope linears: as stored with every table counted, as float16 where they are not quantized."""
    model = policy.model
    stored = sum(tensor.numel() * tensor.element_size() for site in quantized_sites(model) for tensor in site.buffers())
    left = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and linear_side(name)]
    return stored + sum(tensor.numel() for m in left for tensor in m.parameters()) * _HALF_BYTES


def unquantized_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict that belongs to no quantized site and to no part of scope ``whole``."""
    kinds = (QuantizedLinear, StoredPart)
    owners = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(owners)}


def _site_report(site: QuantizedSite, known: dict[str, Any]) -> SiteReport:
    spec = site.spec
    parts: dict[str, int] = {}
    for name, tensor in site.tensors().items():
        part = _PARTS[name]
        parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    return SiteReport(
        name=spec.name,
        side=spec.side,
        readers=tuple(reader.name for reader in spec.readers),
        shape=(spec.out_features, spec.in_features),
        bits=(spec.recipe.weight_bits, spec.recipe.activation_bits),
        executable=spec.executable,
        error=known.get("error", float("nan")),
        per_step=tuple(known.get("per_step", ())),
        fp16_bytes=spec.out_features * spec.in_features * _HALF_BYTES,
        bytes=parts,
        notes=tuple(known.get("notes", ())),
        decision=known.get("decision"),
    )


def _other_bytes(model: nn.Module, left: set[str], element_bytes: int) -> int:
    skipped = tuple(f"{name}." for name in left)
    tensors = unquantized_tensors(model)
    return sum(t.numel() for name, t in tensors.items() if not skipped or not name.startswith(skipped)) * element_bytes

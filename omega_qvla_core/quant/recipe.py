"""How a policy is quantized, as data: frozen dataclasses to and from JSON, stored inside every pack.

A ``Recipe`` has one ``SideRecipe`` for the language tower and one for the action head, and overrides for linears whose
name matches a pattern. Unknown keys and names are errors that name the nearest valid one.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omega_qvla_core.errors import ConfigError
from omega_qvla_core.quant.activation import ACTIVATION_SCHEMES, CLIPS
from omega_qvla_core.quant.auto_choice import AutoChoice
from omega_qvla_core.quant.permute import PERMUTATION_SCORES, PERMUTATIONS
from omega_qvla_core.quant.registry import unknown_name
from omega_qvla_core.quant.rotation import ROTATIONS
from omega_qvla_core.quant.scales import SCALE_GRIDS
from omega_qvla_core.quant.solver import SOLVERS
from omega_qvla_core.strict_json import check_keys, dataclass_from_json, dataclass_to_json

SCHEMA_VERSION = 1

FLOAT_BITS = 16
"""``weight_bits`` or ``activation_bits`` of something that is not quantized."""

HESSIAN_WEIGHTS = ("uniform", "output_energy")
UNQUANTIZED_DTYPES = ("bfloat16", "float32")
_PART_BITS = (4, 8)

FLOAT_SCALES = "float16"
INTEGER_MULTIPLIER = "integer_multiplier"
SCALE_FORMATS = (FLOAT_SCALES, INTEGER_MULTIPLIER)

# Widest codes whose product with a multiplier of up to 16 fits into int8.
_MULTIPLIED_BITS = 4


@dataclass(frozen=True)
class SideRecipe:
    """How the linears of one side are quantized. The defaults are the executable 4-bit scheme.

    Codes are symmetric and signed, without zero point: -8..7 at 4 bits, for weights and activations (METHOD A.12).

    Attributes:
        weight_bits: 2 to 8, or 16 for a linear that stays as it is.
        activation_bits: 2 to 8, or 16 with ``activation="none"``.
        shared_input: Linears that read the same input (q/k/v, gate/up) share smoothing, permutation, rotation and
            activation codes, and run as one product.
        smoothing: Exponent alpha of ``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``, divided out of the input before
            the rotation and multiplied into the weight. None for no smoothing.
        permutation: Order of the channels before they are cut into blocks: ``none``, ``serpentine``, ``interleave``.
        permutation_score: ``weight``, ``act`` or ``act_weight``.
        rotation: ``none``, ``hadamard``, ``svd``, ``svd_hadamard``.
        block: Size of a rotation block.
        output_rotation: Rotate the outputs by singular vectors of 64-row blocks and undo it after the product. Needs
            ``shared_input`` off, and is simulated.
        solver: ``rtn``, ``gptq``, ``blockwise_gptq``.
        group: Columns per weight scale; 0 for one scale per row.
        scale_grid: Multiples of the absmax scale that are tried: ``absmax``, ``paper``, ``fine``.
        scale_format: ``float16`` (float32 where float16 would lose bits), or ``integer_multiplier``: a float32 scale
            per row times an integer of 1 to 16 per group, so that a row is one integer sum of int8.
        damping: Fraction of the mean diagonal added to the Hessian.
        act_order: Whether ``gptq`` starts with the columns of the largest Hessian diagonal.
        hessian_weights: Weight of each denoise step's Gram matrix: ``uniform``, or ``output_energy`` for equal
            relative errors (the inverse of the step's output energy).
        activation: ``none``, ``static_tensor``, ``static_channel`` (simulated), ``token``, ``token_group``.
        activation_group: Columns per activation scale of ``token_group``.
        clip: Where scales come from: ``absmax``, ``percentile``, ``mse`` (least error of the codes) or ``output``
            (least error after the weight).
        percentile: Of the magnitude, for ``clip="percentile"``.
        per_step: One row of activation scales or clips per denoise step. Without it, one row for all steps.
        centring: Subtract the mean token (per step) before coding and add its product from a table.
        low_rank: Rank of a float16 branch that carries the largest singular directions of the weight past the codes
            (METHOD A.6); the codes hold the rest. 0 for none. Rank r costs ``2 r (O + I)`` bytes.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    shared_input: bool = True
    smoothing: float | None = 0.5
    permutation: str = "none"
    permutation_score: str = "act_weight"
    rotation: str = "hadamard"
    block: int = 64
    output_rotation: bool = False
    solver: str = "gptq"
    group: int = 64
    scale_grid: str = "fine"
    scale_format: str = FLOAT_SCALES
    damping: float = 0.05
    act_order: bool = True
    hessian_weights: str = "uniform"
    activation: str = "token_group"
    activation_group: int = 64
    clip: str = "output"
    percentile: float = 99.9
    per_step: bool = True
    centring: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_combinations(self)

    @property
    def quantized(self) -> bool:
        """Whether a linear of this recipe is replaced at all."""
        return self.weight_bits < FLOAT_BITS

    @property
    def executable(self) -> bool:
        """Whether the product is one of integer codes with scales outside the sum."""
        return self.quantized and ACTIVATION_SCHEMES[self.activation].executable and not self.output_rotation


def eight_bit_side(weight_bits: int = 8, group: int = 0) -> SideRecipe:
    """8-bit codes per token, weights rounded to nearest. Scales per row: at 8 bits more of them buy nothing."""
    return SideRecipe(
        weight_bits=weight_bits,
        activation_bits=8,
        smoothing=None,
        solver="rtn",
        group=group,
        activation="token",
        clip="absmax",
        per_step=False,
    )


@dataclass(frozen=True)
class WholeRecipe:
    """What scope ``whole`` adds to a recipe.

    Attributes:
        vision: Linears of the vision tower.
        adapter: Linears of projectors and of the adapter over the features.
        embedding_bits: 4 or 8, of the token table.
        embedding_group: Columns per scale of the token table, 0 for one scale per row.
        embodiment_bits: 4 or 8, of embodiment-specific weights.
        embodiment_group: Columns per scale of these, 0 for one scale per row.
        embodiments: ``all``, or ``contract``: only the embodiment that the robot setup names.
    """

    vision: SideRecipe = field(default_factory=eight_bit_side)
    adapter: SideRecipe = field(default_factory=eight_bit_side)
    embedding_bits: int = 4
    embedding_group: int = 64
    embodiment_bits: int = 4
    embodiment_group: int = 64
    embodiments: str = "all"

    def __post_init__(self) -> None:
        for name in ("embedding_bits", "embodiment_bits"):
            if getattr(self, name) not in _PART_BITS:
                raise ConfigError(f"recipe whole.{name} is {getattr(self, name)}; it must be 4 or 8")
        for name in ("embedding_group", "embodiment_group"):
            if getattr(self, name) < 0:
                raise ConfigError(f"recipe whole.{name} is {getattr(self, name)}; it must be at least 0")
        if self.embodiments not in ("all", "contract"):
            raise ConfigError(f"recipe whole.embodiments is {self.embodiments!r}; it must be 'all' or 'contract'")


@dataclass(frozen=True)
class Override:
    """Fields of the side's recipe that differ for some linears.

    Attributes:
        pattern: Shell pattern of module names, such as ``*.mlp.down_proj``.
        fields: Field names of ``SideRecipe`` and their values.
    """

    pattern: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A complete recipe.

    Attributes:
        name: Shown in reports and in ``PolicySpec.quantization``.
        language: For the language tower.
        action_head: For the action expert.
        overrides: Applied in order to linears whose names match; a later one wins.
        unquantized_dtype: How every tensor that is not quantized is stored: ``bfloat16`` or ``float32``.
        auto: Choose some fields per input site by calibrated error, with ``language`` and ``action_head`` as the
            starting point; None to take these as they are.
        whole: How scope ``whole`` treats all beyond the published linears; None for scope ``paper``.
    """

    name: str
    language: SideRecipe = field(default_factory=SideRecipe)
    action_head: SideRecipe = field(default_factory=SideRecipe)
    overrides: tuple[Override, ...] = ()
    unquantized_dtype: str = "bfloat16"
    auto: AutoChoice | None = None
    whole: WholeRecipe | None = None

    def __post_init__(self) -> None:
        _check_choice("unquantized_dtype", self.unquantized_dtype, UNQUANTIZED_DTYPES)
        for side in (self.language, self.action_head):
            for override in self.overrides:
                _overridden(side, override)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe of ``PRESETS`` or ``ABLATIONS`` by name.

        Raises:
            ConfigError: There is none; the message names the nearest one.
        """
        from omega_qvla_core.quant.presets import ABLATIONS, PRESETS

        if name not in PRESETS and name not in ABLATIONS:
            raise ConfigError(unknown_name("recipe", name, PRESETS))
        return PRESETS.get(name) or ABLATIONS[name]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A preset by name, or a recipe from a ``.json`` file.

        Raises:
            ConfigError: No such preset, the file is missing, or its content is not a valid recipe.
        """
        path = Path(name_or_path)
        if path.suffix != ".json":
            return cls.preset(str(name_or_path))
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the recipe file {path} cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def resolve(self, linear: str, side: str) -> SideRecipe:
        """The recipe of one linear: its side's, with every matching override."""
        recipe = getattr(self if hasattr(self, side) else self.whole, side)
        for override in self.overrides:
            if fnmatch.fnmatchcase(linear, override.pattern):
                recipe = _overridden(recipe, override)
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object, every field written out."""
        values = {one.name: dataclass_to_json(getattr(self, one.name)) for one in fields(self)}
        values["overrides"] = [{"pattern": one.pattern, "fields": dict(one.fields)} for one in self.overrides]
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Recipe:
        """Inverse of ``to_json``. Fields with a default may be left out.

        Args:
            data: A decoded JSON object, or its text.

        Raises:
            ConfigError: Not JSON, an unknown key or name, a value out of range, or another schema version.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except json.JSONDecodeError as error:
                raise ConfigError(f"the recipe is not JSON: {error}") from error
        names = [one.name for one in fields(cls)]
        values = dict(check_keys(data, ["schema_version", "name"], [n for n in names if n != "name"], "recipe"))
        version = values.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(f"recipe schema_version is {version!r}; this version reads {SCHEMA_VERSION}")
        return dataclass_from_json(cls, values, "recipe", {"overrides": _read_overrides})

    def replace_sides(self, **changes: Any) -> Recipe:
        """The recipe with the same fields changed on both sides."""
        return replace(
            self, language=replace(self.language, **changes), action_head=replace(self.action_head, **changes)
        )


def _read_overrides(data: Any, where: str) -> tuple[Override, ...]:
    if not isinstance(data, (list, tuple)):
        raise ConfigError(f"{where} is {data!r}; it must be a list of objects with 'pattern' and 'fields'")
    overrides = []
    for index, item in enumerate(data):
        values = check_keys(item, ["pattern", "fields"], [], f"{where}[{index}]")
        check_keys(values["fields"], [], [one.name for one in fields(SideRecipe)], f"{where}[{index}].fields")
        overrides.append(Override(str(values["pattern"]), dict(values["fields"])))
    return tuple(overrides)


def _overridden(recipe: SideRecipe, override: Override) -> SideRecipe:
    merged = {**dataclass_to_json(recipe), **override.fields}
    return dataclass_from_json(SideRecipe, merged, f"recipe override {override.pattern!r}")


def _check_choice(name: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise ConfigError(unknown_name(f"recipe {name}", value, valid))


def _check_names(recipe: SideRecipe) -> None:
    _check_choice("rotation", recipe.rotation, ROTATIONS)
    _check_choice("permutation", recipe.permutation, PERMUTATIONS)
    _check_choice("permutation_score", recipe.permutation_score, PERMUTATION_SCORES)
    _check_choice("solver", recipe.solver, SOLVERS)
    _check_choice("scale_grid", recipe.scale_grid, SCALE_GRIDS)
    _check_choice("scale_format", recipe.scale_format, SCALE_FORMATS)
    _check_choice("hessian_weights", recipe.hessian_weights, HESSIAN_WEIGHTS)
    _check_choice("activation", recipe.activation, ACTIVATION_SCHEMES)
    _check_choice("clip", recipe.clip, CLIPS)


def _check_numbers(recipe: SideRecipe) -> None:
    for name in ("weight_bits", "activation_bits"):
        bits = getattr(recipe, name)
        if bits not in (*range(2, 9), FLOAT_BITS):
            raise ConfigError(f"recipe {name} is {bits}; it must be 2 to 8, or {FLOAT_BITS} for none")
    if recipe.smoothing is not None and not 0.0 <= recipe.smoothing <= 1.0:
        raise ConfigError(f"recipe smoothing is {recipe.smoothing}; it must be between 0 and 1, or null for none")
    for name, lowest in (("block", 1), ("activation_group", 1), ("group", 0), ("low_rank", 0)):
        if getattr(recipe, name) < lowest:
            raise ConfigError(f"recipe {name} is {getattr(recipe, name)}; it must be at least {lowest}")
    if not 0.0 <= recipe.damping <= 1.0:
        raise ConfigError(f"recipe damping is {recipe.damping}; it must be between 0 and 1")
    if not 50.0 <= recipe.percentile <= 100.0:
        raise ConfigError(f"recipe percentile is {recipe.percentile}; it must be between 50 and 100")


def _check_combinations(recipe: SideRecipe) -> None:
    float_activations = recipe.activation_bits == FLOAT_BITS
    if float_activations != (recipe.activation == "none"):
        raise ConfigError(
            f"recipe has activation_bits {recipe.activation_bits} with activation {recipe.activation!r}; "
            f"{FLOAT_BITS} bits and 'none' belong together"
        )
    if not recipe.quantized and not float_activations:
        raise ConfigError(
            "recipe quantizes activations but not weights (weight_bits 16); set activation_bits to 16 too"
        )
    if recipe.clip not in ACTIVATION_SCHEMES[recipe.activation].clips:
        valid = ", ".join(ACTIVATION_SCHEMES[recipe.activation].clips)
        raise ConfigError(f"recipe clip {recipe.clip!r} does not go with activation {recipe.activation!r}; use {valid}")
    if recipe.scale_format == INTEGER_MULTIPLIER and (recipe.group == 0 or recipe.weight_bits > _MULTIPLIED_BITS):
        raise ConfigError(
            f"recipe scale_format {INTEGER_MULTIPLIER!r} has group {recipe.group} and weight_bits "
            f"{recipe.weight_bits}; it needs groups (group at least 1) and at most {_MULTIPLIED_BITS} bits"
        )
    if recipe.low_rank and recipe.output_rotation:
        raise ConfigError("recipe low_rank does not go with output_rotation; choose one of them")
    if recipe.output_rotation and recipe.shared_input:
        raise ConfigError("recipe output_rotation needs shared_input false: it mixes the rows of one linear")
    if recipe.activation == "token_group" and recipe.group % recipe.activation_group:
        raise ConfigError(
            f"recipe activation_group {recipe.activation_group} does not divide group {recipe.group}; no integer "
            "product exists (group 0, one scale per row, goes with any)"
        )

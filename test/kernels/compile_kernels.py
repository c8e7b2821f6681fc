"""Compile every kernel for one GPU generation that need not be there; print one JSON line per kernel.

Run by ``test_triton_compile.py`` in a process of its own: ``python compile_kernels.py 90``. What a program needs is
read off the compiled code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from omega_qvla_core.kernels.triton_kernels import attention, large_gemm, rows, small_gemm
from omega_qvla_core.kernels.triton_kernels.tuning import tuning

POINTERS = {"keys_ptr": "*i32", "counter_ptr": "*i32"}
FLOAT_ARGUMENTS = ("eps", "scale")
# Sizes and strides that the engines keep at multiples of 16.
ALIGNED = re.compile(r"(stride|outputs|width|padded|w_rows)$")

EXPERT_NORM = {
    "BLOCKS": 16,
    "HAS_X": True,
    "SETTLED": True,
    "PARTS": 8,
    "GATED": True,
    "NORM": 1,
    "HAS_MUL": True,
    "HAS_ADD": True,
    "TAIL": False,
    "GROUP": 64,
    "HIGH": 7,
    "EARLY": False,
}
SMALL = {
    "TILES": 1,
    "BLOCK_TOKENS": 64,
    "BLOCK_IN": 64,
    "BITS": 4,
    "UNIT": 1,
    "UNITS": 4,
    "GROUPS": 16,
    "SCALED": True,
    "HAS_BIAS": False,
    "ACTIVATION": 0,
    "NATIVE": True,
    "SHARES": 1,
    "HELD": False,
    "TOGETHER": 1,
    "AHEAD": False,
    "EARLY": False,
}


def cases(target, capability):
    """Name, kernel, compile-time arguments, pointer types, warps."""
    codes, floats = {"x_ptr": "*i8", "w_ptr": "*i8"}, {"x_ptr": "*bf16", "w_ptr": "*bf16"}
    half = {"out_ptr": "*bf16"}
    small = SMALL | {"STAGES": target.small_stages, "EARLY": target.early}
    for name, changes, pointers in (
        ("partial int4", {"EPILOGUE": 1}, codes),
        ("partial int4 held", {"EPILOGUE": 1, "HELD": True}, codes),
        ("partial int8 held", {"EPILOGUE": 1, "HELD": True, "BITS": 8}, codes),
        ("partial int4 ahead", {"EPILOGUE": 1, "UNITS": 8, "TOGETHER": 2, "AHEAD": True}, codes),
        ("partial int4 of two tiles", {"EPILOGUE": 1, "TILES": 2, "UNITS": 8, "TOGETHER": 2}, codes),
        ("partial int4 byte by byte", {"EPILOGUE": 1, "NATIVE": False}, codes),
        ("joined int4", {"EPILOGUE": 0, "SHARES": 4}, codes | half),
        (
            "gated int8 rows",
            {"EPILOGUE": 2, "UNIT": 8, "UNITS": 1, "GROUPS": 1, "BLOCK_IN": 128, "BITS": 8},
            codes | half,
        ),
        (
            "gated floats",
            {"EPILOGUE": 2, "UNIT": 16, "UNITS": 1, "GROUPS": 1, "BITS": 16, "SCALED": False},
            floats | half,
        ),
        # The MLP of GR00T's transformer with a scale per token, and its unquantized products in shares.
        (
            "activated int8 rows",
            {
                "EPILOGUE": 4,
                "UNIT": 3,
                "UNITS": 1,
                "GROUPS": 1,
                "BLOCK_IN": 128,
                "BITS": 8,
                "HAS_BIAS": True,
                "SHARES": 4,
            },
            codes | half,
        ),
        (
            "partial floats",
            {"EPILOGUE": 1, "UNIT": 6, "UNITS": 1, "GROUPS": 1, "BITS": 16, "SCALED": False, "HAS_BIAS": True},
            floats,
        ),
        (
            "partial floats held",
            {"EPILOGUE": 1, "UNIT": 4, "UNITS": 1, "GROUPS": 1, "BITS": 16, "SCALED": False, "HELD": True},
            floats,
        ),
    ):
        yield f"small_gemm {name}", small_gemm.small_gemm, small | changes, pointers, 8 if "TILES" in changes else 4
    many = {f"int8 {index}": one.blocks for index, one in enumerate(target.plain)}
    residual = {"HAS_RESIDUAL": True}
    for name, blocks, changes, kind, pointers in (
        *((name, blocks, {}, "i8", half) for name, blocks in many.items()),
        *((f"{name} added", blocks, residual, "i8", half) for name, blocks in many.items()),
        ("int8 activated", target.plain[-1].blocks, {"HAS_BIAS": True, "ACTIVATION": 1}, "i8", half),
        ("int8 gated", target.wide_gated, {"ACTIVATION": 2}, "i8", half),
        ("int8 narrow gated", target.narrow_gated, {"ACTIVATION": 2}, "i8", half),
        ("int8 groups", target.plain[-1].blocks, {"GROUPED": True} | residual, "i8", half),
        ("int8 gated groups", target.narrow_gated, {"GROUPED": True, "ACTIVATION": 2}, "i8", half),
        ("int8 gated silu", target.wide_gated, {"ACTIVATION": 3}, "i8", half),
        ("floats", target.floats, {"BITS": 16, "SCALED": False, "HAS_RESIDUAL": True}, "bf16", half),
        ("floats added", target.floats_added, {"BITS": 16, "SCALED": False, "HAS_RESIDUAL": True}, "bf16", half),
        ("floats gated", target.floats_gated, {"BITS": 16, "SCALED": False, "ACTIVATION": 2}, "bf16", half),
        # GR00T's adapter, whose rows are float32.
        (
            "floats into float32",
            target.floats,
            {"BITS": 16, "SCALED": False, "HAS_BIAS": True, "HAS_RESIDUAL": True},
            "bf16",
            {"out_ptr": "*fp32", "residual_ptr": "*fp32"},
        ),
    ):
        if blocks is None:
            continue
        sizes = {
            "BLOCK_TOKENS": blocks.tokens,
            "BLOCK_OUT": blocks.out,
            "BLOCK_IN": blocks.inner,
            "SWIZZLE": blocks.swizzle,
            "DESCRIBED": blocks.described,
            "RESIDENT": blocks.resident > 0,
        }
        plain = {"BITS": 8, "GROUPED": False, "SCALED": True, "ACTIVATION": 0, "HAS_BIAS": False, "HAS_RESIDUAL": False}
        constants = plain | changes | sizes | {"STAGES": blocks.stages}
        pointers = {"residual_ptr": "*bf16"} | pointers
        pointers |= {
            name: f"tensordesc<{kind}[{rows_}, {blocks.inner}]>" if blocks.described else f"*{kind}"
            for name, rows_ in (("x", blocks.tokens), ("w", blocks.out))
        }
        yield f"large_gemm {name}", large_gemm.large_gemm, constants, pointers, blocks.warps
    # Query heads per key head, columns of a head; the last three are GR00T's language tower, adapter and transformer.
    for name, blocks, (heads, dim), split, suffix, causal in (
        ("whole", target.attention, (8, 256), False, False, False),
        ("shares", target.shared_attention, (8, 256), True, True, False),
        ("causal", target.attention, (2, 128), False, False, True),
        ("of one query head", target.attention, (1, 64), False, False, False),
        ("shares of odd heads", target.shared_attention, (1, 48), True, False, False),
    ):
        constants = {
            "QUERY_HEADS": heads,
            "DIM": dim,
            "DIM_BLOCK": 1 << (dim - 1).bit_length(),
            "BLOCK_ROWS": blocks.rows,
            "BLOCK_KEYS": blocks.keys,
            "SUFFIX": suffix,
            "CAUSAL": causal,
            "SPLIT": split,
            "EARLY": target.early and split,
            "STAGES": blocks.stages,
            "DESCRIBED": blocks.described,
        }
        box = f"tensordesc<bf16[{blocks.keys}, {constants['DIM_BLOCK']}]>" if blocks.described else "*bf16"
        pointers = {"q_ptr": "*bf16", "k": box, "v": box, "out_ptr": "*fp32" if split else "*bf16"}
        yield f"attention {name}", attention.attention, constants, pointers, blocks.warps
    turn = {"Q_HEADS": 16, "KV_HEADS": 8, "HEADS": 32, "NORM": True, "PARTS": 1}
    turn |= {"HALF_DIM": 64, "HALF_BLOCK": 64, "EARLY": False}
    written = dict.fromkeys(("q_out_ptr", "k_out_ptr", "v_out_ptr"), "*bf16")
    yield "rotate_heads", attention.rotate_heads, turn, written | {"x_ptr": "*bf16"}, 4
    added = turn | {
        "Q_HEADS": 8,
        "KV_HEADS": 1,
        "HEADS": 16,
        "NORM": False,
        "PARTS": 4,
        "HALF_DIM": 128,
        "HALF_BLOCK": 128,
    }
    yield "rotate_heads of shares", attention.rotate_heads, added | {"EARLY": capability >= 90}, written, 4
    code = EXPERT_NORM | {"ROTATE": True, "CODES": 2}
    yield "norm_rows codes", rows.norm_rows, code, {"out_ptr": "*i8"}, 8
    yield "norm_rows floats", rows.norm_rows, EXPERT_NORM | {"ROTATE": False, "CODES": 0}, half, 8
    collected = EXPERT_NORM | {"HAS_X": False, "NORM": 0, "HAS_MUL": False, "HAS_ADD": False, "GATED": False}
    yield "norm_rows of shares alone", rows.norm_rows, collected | {"ROTATE": False, "CODES": 0}, half, 8
    layer = code | {"BLOCKS": 32, "NORM": 2, "GATED": False, "EARLY": capability >= 90}
    yield "norm_rows layer norm", rows.norm_rows, layer, {"out_ptr": "*i8"}, 8
    wide = code | {"BLOCKS": 256, "PARTS": 0, "GATED": False, "NORM": 0, "HAS_ADD": False, "CODES": 1}
    yield "norm_rows wide", rows.norm_rows, wide, {"x_ptr": "*bf16", "out_ptr": "*i8"}, 8
    merged = {
        "HEADS": 8,
        "HEAD_DIM": 256,
        "SPLITS": 9,
        "BLOCKS": 32,
        "HAS_MUL": False,
        "ROTATE": True,
        "TAIL": False,
        "CODES": 2,
        "GROUP": 64,
        "HIGH": 7,
        "EARLY": capability >= 90,
    }
    codes = {"out_ptr": "*i8"}
    yield "merge_rows", rows.merge_rows, merged | {"CODES": 1}, codes, 4
    odd = merged | {"HEADS": 32, "HEAD_DIM": 48, "SPLITS": 5}
    yield "merge_rows of odd heads", rows.merge_rows, odd, codes, 4
    yield "merge_heads", rows.merge_heads, merged | {"BLOCKS": 16}, codes, 4
    gated = {name: merged[name] for name in ("HAS_MUL", "ROTATE", "TAIL", "CODES", "GROUP", "HIGH", "EARLY")}
    gated |= {"BLOCKS": 16, "PARTS": 2, "GATED": True, "ACTIVATION": 0}
    yield "activate_rows gated", rows.activate_rows, gated, {"out_ptr": "*i8"}, 4
    yield "activate_rows", rows.activate_rows, gated | {"GATED": False}, {"out_ptr": "*i8"}, 4
    plain = gated | {"GATED": False, "ACTIVATION": 2, "ROTATE": False, "CODES": 0}
    yield "activate_rows floats", rows.activate_rows, plain, half, 4


def compile_one(kernel, constants, pointers, warps, capability):
    names = kernel.arg_names
    signature = {name: "constexpr" for name in constants}
    for name in names:
        if name not in constants:
            kind = (pointers | POINTERS).get(name, "*fp32" if name.endswith("_ptr") else "i32")
            signature[name] = "fp32" if name in FLOAT_ARGUMENTS else kind
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and (ALIGNED.search(name) or signature[name].startswith("*"))
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: signature[name] for name in names}, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def local_bytes(cubin):
    """Bytes of a thread's stack frame, where spilled registers go, or None if no tool is there to read it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max((int(size) for size in re.findall(r"STACK:(\d+)", found)), default=None)


def main(capability):
    for name, kernel, constants, pointers, warps in cases(tuning(divmod(capability, 10)), capability):
        compiled = compile_one(kernel, constants, pointers, warps, capability)
        found = {"name": name, "shared": compiled.metadata.shared, "stack": local_bytes(compiled.asm["cubin"])}
        products = re.findall(r"\b(wgmma|mma)\S*sync\S*", compiled.asm["ptx"])
        int8 = re.search(r"\b(?:wgmma\.mma_async|mma)\.sync\S*\.s8", compiled.asm["ptx"]) is not None
        print(json.dumps(found | {"int8": int8, "wgmma": "wgmma" in products}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Compiles the MoE kernels for GPUs that are not there; writes what it made as JSON (see `test_moe_compile.py`)."""

from __future__ import annotations

import json
import sys
from typing import Any

from compile_rows import Row, compile_row, machine_code, ptxas_says, resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as triton_compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from wgmma_operands import overwritten

from nvfp4_kernels.triton import moe_gemm_hopper, moe_operand_hopper
from nvfp4_kernels.triton.hopper import burst_of

_GEMM_TYPES = {
    "x": "*bf16",
    "row_of": "*i32",
    "data": "*u8",
    "scales": "*u8",
    "row_scale": "*fp32",
    "tile_to_expert": "*i32",
    "out": "*bf16",
    **dict.fromkeys(("x_stride", "scales_stride", "N", "K", "n_blocks"), "i32"),
    **dict.fromkeys(("row_scale_expert", "row_scale_row", "input_scale_expert"), "i32"),
}
_ALIGNED = ("x", "data", "scales", "out", "x_stride", "scales_stride", "N", "K")


def _gemm(name: str, types: dict[str, str], block_m: int, fold: bool, act: int = 2) -> Row:
    constants = {
        "GATHER": True,
        "ACT": act,
        "ACT_FN": "silu",
        "INTERLEAVED": False,
        "EVEN_K": True,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if block_m == 128 else 128,
        "BLOCK_K": 64 if block_m >= 64 else 128,
        "x_scale": None,
        "input_scale": None,
        "bias": None,
    }
    if not fold:
        constants["fold"] = None
    else:
        types = types | {"fold": "*fp32"}
    warps = 8 if block_m == 128 else 4
    return Row(name, "moe_gemm:grouped_gemm_kernel", _GEMM_TYPES | types, constants, _ALIGNED, warps)


def _operand(name: str, mode: str, out: str, **constants: Any) -> Row:
    types = {
        "x": "*bf16",
        "index": "*i32",
        "topk_weights": "*fp32",
        "input_scale": "*fp32",
        "tile_to_expert": "*i32",
        "out": out,
        "out_scale": "*fp32",
        **dict.fromkeys(("x_stride", "K", "width", "block_m"), "i32"),
    }
    defaults = {
        "MODE": mode,
        "SCATTER": True,
        "TOP_K": 8,
        "COPIES": 8,
        "WEIGHTED": False,
        "PER_EXPERT": False,
        "REORDER": False,
        "BLOCK": 2048,
    }
    return Row(name, "moe_operand:operand_kernel", types, defaults | constants, ("x", "out", "x_stride", "K", "width"))


def _place(name: str, bins: int, all_slots: int, arch: int) -> Row:
    pointers = ("ids", "expert_map", "expanded_to_permuted", "permuted_to_token", "expert_offsets", "tile_to_expert")
    types = dict.fromkeys(pointers, "*i32")
    types |= dict.fromkeys(("slots", "chunks", "experts", "global_experts", "tiles"), "i32")
    constants: dict[str, Any] = {
        "TOP_K": 8,
        "BLOCK_M": 16,
        "ALL_SLOTS": all_slots,
        "HAS_MAP": True,
        "BINS": bins,
        "STEP": 128,
        "TILES": 16,
        "PDL": arch >= 90,
    }
    if all_slots:
        constants |= {"counts": None, "totals": None}
    else:
        types |= {"counts": "*i32", "totals": "*i32"}
    return Row(name, "moe_routing:place_kernel", types, constants, pointers, 4 if all_slots else 8)


def rows(arch: int) -> list[Row]:
    fp8 = arch >= 89
    e4m3 = {"x": "*fp8e4nv"} if fp8 else {}
    return [
        _gemm("gemm none 16", {}, 16, False),
        _gemm("gemm none 128", {}, 128, False, act=0),
        _gemm("gemm fp8 128", e4m3, 128, True),
        _operand("operand nvfp4", "nvfp4_per_token", "*bf16"),
        _operand("operand fp8", "fp8_per_token", "*u8" if fp8 else "*bf16", REORDER=fp8),
        _operand("operand per expert", "nvfp4_per_tensor", "*bf16", COPIES=1, WEIGHTED=True, PER_EXPERT=True, BLOCK=8192),
        _place("route few", 256, 512, arch),
        _place("route many", 1024, 0, arch),
        Row(
            "count",
            "moe_routing:count_kernel",
            {"ids": "*i64", "counts": "*i32", **dict.fromkeys(("slots", "experts", "global_experts"), "i32")},
            {"expert_map": None, "HAS_MAP": False, "BINS": 512, "STEP": 128},
            ("ids", "counts"),
            8,
        ),
        Row(
            "scan",
            "moe_routing:scan_kernel",
            {"counts": "*i32", "totals": "*i32", "chunks": "i32"},
            {"BINS": 256, "WIDTH": 8, "CHUNKS": 256},
            ("counts", "totals"),
        ),
        Row(
            "combine",
            "moe_combine:combine_kernel",
            {"y": "*bf16", "index": "*i32", "topk_weights": "*fp32", "out": "*bf16", "hidden": "i32"},
            {"TOP_K": 8, "WEIGHTED": True, "BLOCK": 1024, "PDL": arch >= 90},
            ("y", "out", "hidden"),
        ),
    ]


def compile_hopper(
    block_m: int,
    x: str,
    act: int,
    operand_order: bool,
    reduce: bool = False,
    by_word: bool = False,
    k: int = 4096,
    gather: bool = False,
) -> dict[str, Any]:
    """One specialization of the Hopper kernels; x: "bf16", "fp16" or "fp8e4nv"."""
    fp8 = x == "fp8e4nv"
    warps, weight_stages, x_stages, resident = moe_gemm_hopper.tiling(block_m, fp8, k)
    short = moe_gemm_hopper.is_short(block_m, fp8, k)
    small = block_m <= moe_gemm_hopper._DECODE_ROWS
    long = block_m == moe_gemm_hopper._LONG_ROWS
    kernel = moe_gemm_hopper.grouped_gemm_kernel
    if short:
        kernel = moe_gemm_hopper.grouped_gemm_short_kernel
    elif small:
        kernel = moe_gemm_hopper.grouped_gemm_decode_kernel
    elif long:
        kernel = moe_gemm_hopper.grouped_gemm_long_kernel

    def descriptor(kind: str, box: list[int], element: Any) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        return f"tensordesc<{kind}{box},{layout!r}>"

    constants: dict[str, Any] = {
        "BM": block_m,
        "ACT": act,
        "ACT_FN": "silu" if act == 2 else "relu2_no_mul",
        "OPERAND_ORDER": operand_order,
        "input_scale_ptr": None,
    }
    if short:
        constants |= {"WEIGHT_STAGES": weight_stages}
    elif small:
        constants |= {"STAGES": weight_stages, "BURST": burst_of(weight_stages), "REDUCE": reduce, "MIN_STAGES": 2}
        constants |= {} if reduce else {"partial_ptr": None, "count_ptr": None}
    else:
        constants |= {"WEIGHT_STAGES": weight_stages}
        if not long:
            constants |= {"GROUP": 8, "X_STAGES": x_stages, "BY_WORD": by_word, **({} if gather else {"x_ptr": None})}
    if not long:
        constants["WARPS"] = warps
    if long and operand_order:
        constants["out_desc"] = None
    if not fp8:
        constants |= {"fold_ptr": None, "token_ptr": None}
    parts = 2 if act == 2 else 1
    rows = (8 if long else 16) * warps // parts
    element = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp8e4nv": gl.float8e4nv}[x]
    out = "fp16" if x == "fp16" else "bf16"
    types = {
        "out_desc": descriptor(out, [block_m // 2, rows], gl.float16 if out == "fp16" else gl.bfloat16),
        "w_desc": descriptor("i32", [parts, rows, 32 if small or short else 16], gl.int32),
        "s_desc": descriptor("i16", [parts, rows, 8], gl.int16),
        "x_desc": descriptor(x, [block_m, 128 if fp8 else 64], element),
        "x_ptr": f"*{x}",
        "out_ptr": f"*{out}",
        "bias_ptr": f"*{out}",
        **dict.fromkeys(("fold_ptr", "row_ptr", "token_ptr", "partial_ptr"), "*fp32"),
        **dict.fromkeys(("count_ptr", "live_ptr", "tile_to_expert", "offsets"), "*i32"),
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = ("x_ptr", "out_ptr", "fold_ptr", "row_ptr", "token_ptr", "bias_ptr", "partial_ptr", "N")
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names and name not in constants
    }
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    kinds = {"split": reduce, "by word": by_word, "short": short, "gather": gather}
    options = {"num_warps": warps // 2 if long else warps, "launch_pdl": True}
    if by_word or short or block_m == 128:
        options["maxnreg"] = moe_gemm_hopper.max_registers(warps, resident)
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "name": " ".join(["hopper", str(block_m), x, str(act), *(word for word, on in kinds.items() if on)]),
        "arch": 90,
        "rows": block_m,
        "by_word": by_word,
        "ptx": compiled.asm["ptx"],
        "ptxas": ptxas_says(compiled.asm["ptx"]),
        "shared": compiled.metadata.shared,
        "warps": warps,
        "resident": resident,
        "overwritten": overwritten(machine_code(compiled)),
        **resource_usage(compiled),
    }


def compile_operand(block: int, permute: bool) -> dict[str, Any]:
    """The Hopper kernel that quantizes rows of `block` values."""
    kernel = moe_operand_hopper.operand_fp8_kernel
    constants = moe_operand_hopper.shape_of(block, permute) | {"SCATTER": permute, "TOP_K": 8 if permute else 1}
    types = {"x_ptr": "*bf16", "index_ptr": "*i32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = ("x_ptr", "q_ptr", "stride", "K", "width")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": constants["WARPS"], "launch_pdl": True, "enable_fp_fusion": False}
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"name": f"fp8 operand {block}", "arch": 90, "ptx": compiled.asm["ptx"], **resource_usage(compiled)}


HOPPER = [
    (8, "fp8e4nv", 2, False, True),
    (8, "bf16", 0, False),
    (16, "bf16", 2, True),
    (16, "fp8e4nv", 2, False),
    (32, "fp16", 0, False),
    (32, "fp8e4nv", 0, False),
    (32, "bf16", 2, True, True),
    *((rows, "fp8e4nv", 0, False, False, False, 256) for rows in (8, 16, 32, 64, 128)),
    (16, "fp8e4nv", 2, False, False, False, 2880),
    (8, "bf16", 2, True, True, False, 2880),
    (64, "fp8e4nv", 2, False),
    (64, "bf16", 1, True),
    (128, "fp8e4nv", 2, False),
    (128, "fp8e4nv", 0, False),
    (128, "bf16", 2, True),
    (64, "fp8e4nv", 2, False, False, True),
    (128, "fp8e4nv", 0, False, False, True),
    (64, "fp8e4nv", 2, False, False, False, 2048, True),
    (64, "bf16", 2, True, False, False, 4096, True),
    (128, "fp8e4nv", 2, False, False, True, 4096, True),
    (256, "fp8e4nv", 2, False),
    (256, "fp8e4nv", 0, False),
    (256, "bf16", 2, True),
]
ARCHS = (80, 89, 90, 120)

if __name__ == "__main__":
    made = [compile_row(row, arch) for arch in ARCHS for row in rows(arch)]
    made += [compile_hopper(*one) for one in HOPPER]
    made += [compile_operand(k, permute) for k in (128, 768, 2048, 7168, 14336) for permute in (False, True)]
    json.dump(made, sys.stdout)

"""Compiles the dense layer's kernels for GPUs that are not here and prints what they became, as JSON. A row a variant."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_rows import machine_code, ptxas_says
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from wgmma_operands import overwritten

from nvfp4_kernels.triton.activation_hopper import prepare_rows
from nvfp4_kernels.triton.gemm_decode import gemm_decode
from nvfp4_kernels.triton.gemm_dot_scaled import gemm_dot_scaled
from nvfp4_kernels.triton.gemm_few import gemm_few
from nvfp4_kernels.triton.gemm_large import gemm_large
from nvfp4_kernels.triton.gemm_medium import gemm_medium
from nvfp4_kernels.triton.gemm_portable import gemm_portable
from nvfp4_kernels.triton.gemm_vendor import scale_product_kernel
from nvfp4_kernels.triton.widen import _widen_kernel

TYPES = {"fp8": (gl.float8e4nv, "fp8e4nv"), "bf16": (gl.bfloat16, "bf16"), "fp16": (gl.float16, "fp16")}
SOURCES = ("plain", "rms_norm", "add_rms_norm", "silu_and_mul")
ROW_SHAPES = ((4096, True), (4096, False))  # values of a block, and whether that is a row
POINTERS = {
    "fold_ptr": "*fp32",
    "row_ptr": "*fp32",
    "token_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "column_ptr": "*fp32",
    "count_ptr": "*i32",
    "words_ptr": "*i32",
    "data_ptr": "*u8",
    "scales_ptr": "*u8",
}


def descriptor(element: Any, name: str, block: list[int], swizzle: int) -> str:
    bits = element.primitive_bitwidth
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{name}{block},{layout!r}>"


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int, gluon: bool = True) -> Any:
    """The kernel compiled for SM`arch`; arguments without a type in `types` are 32-bit integers."""
    signature = {name: types.get(name, POINTERS.get(name, "i32")) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("K", "out_k", "x_stride", "stride", "residual_stride")
    }
    source = (GluonASTSource if gluon else ASTSource)(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps} | ({"maxnreg": constants["REGISTERS"]} if "REGISTERS" in constants else {})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def wgmma_operands(x: str, bn: int, bm: int, columns: int) -> dict[str, str]:
    element, name = TYPES[x]
    return {
        "w_desc": descriptor(gl.int32, "i32", [bn, 16], 64),
        "s_desc": descriptor(gl.int16, "i16", [bn, 8], 0),
        "x_desc": descriptor(element, name, [bm, columns], 128),
        "out_ptr": "*fp16" if x == "fp16" else "*bf16",
        "bias_ptr": "*bf16",
    }


def rows() -> list[tuple[Any, ...]]:
    """(name, kernel, types, constants, arch, warps, gluon) of every variant."""
    made: list[tuple[Any, ...]] = []
    for x in ("fp8", "bf16", "fp16"):
        out, name = TYPES["fp16" if x == "fp16" else "bf16"]
        for reduce, bulk in ((0, True), (1, True), (1, False), (2, True)):
            types = wgmma_operands(x, 64, 256, 128 if x == "fp8" else 64)
            types["w_desc"] = descriptor(gl.int32, "i32", [2, 64, 16], 64)
            constants = {
                "BM": 256, "WEIGHT_STAGES": 3, "GROUP": 8,
                "TOKEN": x == "fp8", "BIAS": False, "REDUCE": reduce, "BULK_STORE": bulk,
            }  # fmt: skip
            if bulk:
                types["out_desc"] = descriptor(out, name, [32, 64], 128)
            else:
                constants["out_desc"] = None
            made.append((f"large {x} {reduce} {bulk}", gemm_large, types, constants, 90, 4, True))
        for reduce in (False, True):
            types = wgmma_operands(x, 128, 128, 128 if x == "fp8" else 64)
            types["out_desc"] = descriptor(out, name, [16, 64], 128)
            constants = {
                "BM": 128, "WEIGHT_STAGES": 3, "X_STAGES": 6 if x == "fp8" else 8, "GROUP": 8,
                "TOKEN": x == "fp8", "BIAS": False, "REDUCE": reduce, "BULK_STORE": True,
            }  # fmt: skip
            made.append((f"medium {x} {reduce}", gemm_medium, types, constants, 90, 4, True))
    for x in ("fp8", "bf16"):
        for bm, warps, groups in ((8, 4, 1), (64, 8, 1), (16, 4, 2), (64, 4, 2), (128, 4, 2 if x == "fp8" else 1)):
            ring = {"STAGES": 4, "BURST": 2} if groups == 1 and bm < 128 else {"STAGES": 2, "BURST": 1}
            registers = {"GROUPS": groups, "REGISTERS": 128 if bm <= 16 else 255}
            constants = {"BM": bm, "WARPS": warps, **registers, **ring, "TOKEN": True, "BIAS": True, "REDUCE": True}
            types = wgmma_operands(x, 16 * warps, bm, 256) | {"w_desc": descriptor(gl.int32, "i32", [16 * warps, 32], 128)}
            made.append((f"decode {x} {bm} {groups}", gemm_decode, types, constants, 90, warps, True))
            if (bm, groups) == (16, 2):  # one block a processor: two sets of operands in registers
                alone = constants | {"REGISTERS": 248, "STAGES": 3, "REDUCE": False}
                made.append((f"decode {x} {bm} {groups} alone", gemm_decode, types, alone, 90, warps, True))
    for x in ("bf16", "fp16"):
        for warps, apart, tail in ((8, False, False), (2, True, False), (4, True, True)):
            types = {
                "w_ptr": "*i32",
                "s_ptr": "*i16" if apart else "*i32",
                "x_ptr": f"*{x}",
                "out_ptr": f"*{x}",
                "bias_ptr": f"*{x}",
            }
            constants = {"KW": warps, "APART": apart, "TAIL": tail, "TOKEN": False, "BIAS": False}
            made.append((f"few {x} {warps}", gemm_few, types, constants, 90, warps, True))
    for source, out, permute, block, whole in (
        *((source, "fp8", permute, *shape) for source in SOURCES for permute in (False, True) for shape in ROW_SHAPES),
        *((source, x, False, *ROW_SHAPES[0]) for source in SOURCES for x in ("bf16", "fp16")),
    ):
        warps = block // 1024
        constants = {"SOURCE": source, "PERMUTE": permute, "BLOCK": block, "WHOLE": whole, "WARPS": warps}
        x = "bf16" if out == "fp8" else out
        types = {"x_ptr": f"*{x}", "out_ptr": f"*{TYPES[out][1]}", "eps": "fp32"}
        used = {"rms_norm": ("weight_ptr",), "add_rms_norm": ("residual_ptr", "weight_ptr", "total_ptr")}.get(source, ())
        for name in ("residual_ptr", "weight_ptr", "total_ptr", *(["scale_ptr"] if out != "fp8" else [])):
            if name in used:
                types[name] = f"*{x}"
            else:
                constants[name] = None
        made.append((f"rows {source} {out} {permute} {whole}", prepare_rows, types, constants, 90, warps, True))
    for arch in (89, 90, 100, 120):
        constants = {"ROWS": 4, "WORDS": 512}
        made.append(("widen", _widen_kernel, {"out_ptr": "*i32"}, constants, arch, 4, False))
    for arch in (80, 86, 89, 90, 100, 120):
        for fp8 in (False, True):
            types = {"x_ptr": "*fp8e4nv" if fp8 and arch >= 89 else "*bf16", "out_ptr": "*bf16", "bias_ptr": "*bf16"}
            constants = {"FP8": fp8, "TOKEN": fp8, "BIAS": True, "BM": 64, "BN": 128, "BK": 64}
            made.append((f"portable {fp8}", gemm_portable, types, constants, arch, 8, False))
    types = {
        "x_ptr": "*u8", "w_ptr": "*u8", "x_scales_ptr": "*fp8e4nv", "w_scales_ptr": "*fp8e4nv",
        "out_ptr": "*bf16", "bias_ptr": "*bf16",
    }  # fmt: skip
    for arch in (100, 120):
        constants = {"BIAS": False, "BM": 128, "BN": 128, "BK": 256}
        made.append(("dot_scaled", gemm_dot_scaled, types, constants, arch, 8, False))
        for product in ("fp32", "bf16"):
            types_of_product = {"product_ptr": f"*{product}", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
            constants = {"N": 4096, "token_stride": 1, "row_stride": 1, "BIAS": True, "BLOCK": 1024}
            made.append((f"scale {product}", scale_product_kernel, types_of_product, constants, arch, 4, False))
    return made


if __name__ == "__main__":
    compiled = []
    for name, kernel, types, constants, arch, warps, gluon in rows():
        one = build(kernel, types, constants, arch, warps, gluon)
        log = ptxas_says(one.asm["ptx"]) if name.startswith(("large", "medium", "decode")) else ""
        found = {"name": name, "arch": arch, "ptx": one.asm["ptx"], "shared": one.metadata.shared, "log": log}
        if name.startswith("few"):
            found["code"] = machine_code(one)
        if "wgmma" in found["ptx"]:
            found["overwritten"] = overwritten(machine_code(one))
        compiled.append(found)
    json.dump(compiled, sys.stdout)

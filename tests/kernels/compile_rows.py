"""Compiles kernels for GPUs that are not there. Run as a script it writes what it made as JSON (see `test_compile.py`)."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100, 120)


@dataclass(frozen=True)
class Row:
    """One specialization of a kernel.

    kernel: "module:function" below nvfp4_kernels.triton. types: Triton types of the arguments that are not constants.
    aligned: arguments that are divisible by 16, as the launcher would find. constants: constexpr arguments; those called ARCH
    and PDL (launched programmatically, from SM90 on) are filled in.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int = 4
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})


_QUANTIZE_TYPES = {
    "x": "*bf16",
    "a_global_sf": "*fp32",
    "index": "*i32",
    "named": "*u8",
    "x_q": "*u8",
    "sf": "*u8",
    "token_scale": "*fp32",
    **dict.fromkeys(("m", "out_rows", "pad_start", "blocks", "padded_blocks", "x_stride", "g_stride"), "i32"),
}
_QUANTIZE = {
    "LAYOUT": 0,
    "PER_TOKEN": True,
    "SHUFFLE": False,
    "SILU": False,
    "ROWS": "all",
    "TOP_K": 1,
    "FAST": False,
    "PDL": False,
    "BLOCK_M": 1,
    "BLOCKS": 128,
    "CHUNKS": 2,
    "SHARED": False,
    "PAD_WORDS": 1024,
    "DECODE": False,
}


def _quantize(name: str, x: str = "*bf16", warps: int = 4, **constants: Any) -> Row:
    types = _QUANTIZE_TYPES | {"x": x}
    return Row(
        name,
        "quantize:quantize_kernel",
        types,
        _QUANTIZE | constants,
        ("x", "x_q", "sf", "token_scale", "padded_blocks"),
        warps,
    )


ROWS = (
    _quantize("quantize per token"),
    _quantize("quantize per tensor", PER_TOKEN=False, CHUNKS=1, warps=2),
    _quantize("quantize per tensor by decode scales", PER_TOKEN=False, CHUNKS=1, warps=2, LAYOUT=2, DECODE=True),
    _quantize("quantize per token fp16 linear", x="*fp16", LAYOUT=2),
    _quantize("quantize per token fp8", x="*u8", LAYOUT=1),
    _quantize("quantize few rows", BLOCKS=128, CHUNKS=7, SHARED=True, warps=8),
    _quantize("quantize two passes", BLOCKS=512, CHUNKS=0, warps=8),
    _quantize("quantize fast", FAST=True),
    _quantize("permute_quantize", ROWS="scattered", TOP_K=8),
    _quantize("silu_and_mul_quantize", SILU=True),
    Row(
        "place scales",
        "quantize:place_kernel",
        {
            "token_of": "*i32",
            "scales": "*u8",
            "scale": "*fp32",
            "x_q": "*u8",
            "sf": "*u8",
            "token_scale": "*fp32",
            **dict.fromkeys(("out_rows", "blocks", "padded_blocks"), "i32"),
        },
        {"LAYOUT": 0, "BLOCKS": 64, "PDL": False},
        ("token_of", "scales", "scale", "x_q", "sf", "token_scale", "padded_blocks"),
        options={},
    ),
    Row(
        "dequantize",
        "quantize:dequantize_kernel",
        {"x_q": "*u8", "sf": "*u8", "global_scale": "*fp32", "out": "*bf16"}
        | dict.fromkeys(("m", "blocks", "padded_blocks", "g_stride"), "i32"),
        {"LAYOUT": 0, "BLOCK_M": 1, "BLOCKS": 128},
        ("x_q", "sf", "out"),
    ),
    Row(
        "search_scales mse",
        "weight:search_kernel",
        {"weight": "*bf16", "encode_scale": "*fp32", "data": "*u8", "scales": "*u8"}
        | dict.fromkeys(("rows", "rows_per_matrix", "blocks", "stride"), "i32"),
        {"SEARCH": "mse", "BLOCK_M": 4, "BLOCKS": 64},
        ("weight", "data", "scales"),
    ),
)


def compile_row(row: Row, arch: int) -> dict[str, Any]:
    """PTX of a row, and from the finished binary its registers and the bytes of stack and local memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = row.kernel.partition(":")
    kernel = getattr(importlib.import_module(f"nvfp4_kernels.triton.{module}"), name)
    constants = dict(row.constants)
    if "ARCH" in kernel.arg_names:
        constants["ARCH"] = arch
    options = dict(row.options)
    if "PDL" in kernel.arg_names and arch >= 90:
        constants["PDL"] = options["launch_pdl"] = True
    signature = row.types | dict.fromkeys(constants, "constexpr")
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in row.aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": row.warps, **options},
    )
    return {"name": row.name, "arch": arch, "ptx": compiled.asm["ptx"], **resource_usage(compiled)}


def _dumped(compiled: Any, option: str) -> str:
    """What Triton's cuobjdump prints of a finished binary."""
    import triton.backends.nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        return subprocess.run([str(tool), option, cubin.name], capture_output=True, text=True, check=True).stdout


def resource_usage(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes of stack and local memory of a finished binary."""
    text = _dumped(compiled, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def machine_code(compiled: Any) -> list[tuple[int, str]]:
    """Address and text of every instruction of a finished binary."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", _dumped(compiled, "--dump-sass"), re.MULTILINE)
    return [(int(address, 16), text.strip()) for address, text in found]


def ptxas_says(ptx: str) -> str:
    """What Triton's ptxas for Hopper reports of a kernel: registers, spills, wgmma that it had to serialize."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    rows = {row.name: row for row in ROWS}
    wanted = json.loads(sys.argv[1]) if len(sys.argv) > 1 else [[name, arch] for name in rows for arch in ARCHS]
    json.dump([compile_row(rows[name], arch) for name, arch in wanted], sys.stdout)

"""The dense layer's kernels compile for every GPU generation, and hold the instructions that they are built on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wgmma_operands import overwritten

Variants = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> Variants:
    """Every variant by name and architecture; in a process of its own, because tests beside this one run the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_linear.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(one["name"], one["arch"]): one for one in json.loads(done.stdout)}


def count(variant: dict[str, Any], pattern: str) -> int:
    return len(re.findall(pattern, variant["ptx"]))


@pytest.mark.parametrize("x", ["fp8", "bf16", "fp16"])
@pytest.mark.parametrize(("reduce", "bulk"), [(0, True), (1, True), (1, False), (2, True)])
def test_large(compiled: Variants, x: str, reduce: int, bulk: bool) -> None:
    variant = compiled[f"large {x} {reduce} {bulk}", 90]
    k, steps = (32, 8) if x == "fp8" else (16, 16)  # wgmma of a weight stage of 256 values of K
    assert count(variant, rf"wgmma\.mma_async\.sync\.aligned\.m64n256k{k}\.") == 2 * steps  # in either group of warps
    assert count(variant, r"cp\.async\.bulk\.tensor\.[23]d\.shared") >= 2 * 4
    assert ("stmatrix" in variant["ptx"]) == bulk
    assert variant["shared"] <= 227 * 1024
    assert_pipelined(variant)


@pytest.mark.parametrize("x", ["fp8", "bf16", "fp16"])
@pytest.mark.parametrize("reduce", [False, True])
def test_medium(compiled: Variants, x: str, reduce: bool) -> None:
    variant = compiled[f"medium {x} {reduce}", 90]
    k, steps = (32, 8) if x == "fp8" else (16, 16)
    assert count(variant, rf"wgmma\.mma_async\.sync\.aligned\.m64n128k{k}\.") == 2 * steps  # in either group of warps
    assert variant["shared"] <= 227 * 1024
    assert_pipelined(variant)


def assert_pipelined(variant: dict[str, Any]) -> None:
    """ptxas neither serialized the products (C7510 to C7515) nor ran out of registers within them."""
    assert "C75" not in variant["log"], variant["log"]
    spilled = re.search(r"(\d+) bytes spill stores", variant["log"])
    assert spilled is not None
    assert int(spilled[1]) <= 64, variant["log"]  # a few words around the epilogue


@pytest.mark.parametrize(
    ("x", "bm", "groups"),
    [
        *((x, *tile) for x in ("fp8", "bf16") for tile in ((8, 1), (64, 1), (16, 2), (64, 2))),
        ("fp8", 128, 2),
        ("bf16", 128, 1),
    ],
)
def test_decode(compiled: Variants, x: str, bm: int, groups: int) -> None:
    variant = compiled[f"decode {x} {bm} {groups}", 90]
    assert count(variant, rf"wgmma\.mma_async\.sync\.aligned\.m64n{bm}k") == groups * (8 if x == "fp8" else 16)
    # The weights' first copies come before the wait for the kernel that prepares x, x's own after it.
    ptx = variant["ptx"]
    assert ptx.index("cp.async.bulk.tensor") < ptx.index("griddepcontrol.wait") < ptx.rindex("cp.async.bulk.tensor")
    # The next kernel may start with the last products; with two groups and many rows, when parts are added up.
    starts = ptx.index("griddepcontrol.launch_dependents")
    assert ptx.rindex("wgmma.mma_async", 0, starts) < starts < ptx.rindex("st.global")
    assert ("atom" in ptx[:starts]) == (groups == 2 and bm > 16)
    # What a stage begins with is decoded before its x is waited for: 128 values of K, in e4m3 all 256 where registers suffice.
    first = ptx.index("wgmma.mma_async")
    assert not re.search(r"prmt|bf16x2", ptx[ptx.rindex("mbarrier.try_wait", 0, first) : first])
    if x == "fp8" and (bm, groups) != (16, 2):
        products = [found.start() for found in re.finditer(r"wgmma\.mma_async", ptx)]
        assert not re.search(r"prmt|wgmma\.wait_group", ptx[first : products[7]])
    assert variant["shared"] <= 227 * 1024
    assert_pipelined(variant)


@pytest.mark.parametrize("x", ["fp8", "bf16"])
def test_decode_with_a_processor_for_a_block(compiled: Variants, x: str) -> None:
    variant = compiled[f"decode {x} 16 2 alone", 90]
    ptx = variant["ptx"]
    # Registers suffice for two operands at a time: products of one run while the next is decoded.
    first, second = (found.start() for found in list(re.finditer(r"wgmma\.mma_async", ptx))[:2])
    assert x == "bf16" or not re.search(r"prmt|wgmma\.wait_group", ptx[first:second])
    assert "atom" not in ptx
    assert_pipelined(variant)


def test_no_operand_is_overwritten(compiled: Variants) -> None:
    variants = [one for one in compiled.values() if "overwritten" in one]
    assert {one["name"].split()[0] for one in variants} >= {"large", "medium", "decode"}
    for one in variants:
        assert not one["overwritten"], (one["name"], one["overwritten"][:3])


LOOP = """
LDS.128 R84, [R2]
{}
WARPGROUP.DEPBAR.LE gsb0, 0x{}
QGMMA.64x64x32.F32.E4M3.E4M3 R24, R84, gdesc[UR12], R24, gsb0
QGMMA.64x64x32.F32.E4M3.E4M3 R24, R80, gdesc[UR12], R24, gsb0
@P1 BRA 0x{}
EXIT
"""


@pytest.mark.parametrize(
    ("between", "pending", "start", "found"),
    [
        ("NOP", 1, 0, 1),  # the next operand is loaded before the wait
        ("NOP", 1, 2, 0),
        ("@!P2 HMUL2 R81, R8.H0_H0, 1.5, 1", 0, 1, 1),
        ("@!P2 HMUL2 R79, R8.H0_H0, 1.5, 1", 0, 1, 0),
        ("IMAD.WIDE R86, R8, 0x2, R10", 0, 1, 1),
        ("IADD3 R86, P2, R8, R9, RZ", 1, 1, 1),
        ("CS2R R82, SRZ", 0, 1, 1),
        ("ISETP.NE.AND P2, PT, R84, R86, PT", 2, 1, 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1, 1, 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1, 0, 1),
    ],
)
def test_an_overwritten_operand_is_found(between: str, pending: int, start: int, found: int) -> None:
    code = list(enumerate(LOOP.format(between, pending, start).strip().splitlines()))
    assert len(overwritten(code)) == found


@pytest.mark.parametrize("x", ["bf16", "fp16"])
@pytest.mark.parametrize("warps", [2, 4, 8])
def test_few(compiled: Variants, x: str, warps: int) -> None:
    variant = compiled[f"few {x} {warps}", 90]
    assert count(variant, r"mma\.sync\.aligned\.m16n8k16") == 2 * 16
    assert count(variant, r"ld\.global(?:\.\w+)*\.v4\.b32") >= 2 * 4  # 16-byte loads of the packed weights
    ptx = variant["ptx"]
    assert ptx.index("ld.global") < ptx.index("griddepcontrol.wait")
    assert ptx.rindex("mma.sync") < ptx.index("griddepcontrol.launch_dependents")
    # Warps meet in the sum at the end alone.
    assert "bar.sync" not in ptx[: ptx.rindex("mma.sync")]
    assert "shared" not in ptx[ptx.index("griddepcontrol.wait") : ptx.rindex("mma.sync")]
    # ptxas moves loads to where registers are free. At the end of a turn of the loop the next weights would come too late:
    # a layer took 10 to 20 % longer.
    jumps = ((at, re.search(r"BRA .*?0x([0-9a-f]+)", text)) for at, text in variant["code"])
    start, end = max(((int(to[1], 16), at) for at, to in jumps if to), key=lambda loop: loop[1] - loop[0])
    loads = [at for at, text in variant["code"] if start <= at <= end and "LDG.E.128" in text]
    assert len(loads) == 2 * (8 + 4)  # x and weights of two steps
    assert max(loads) < start + 0.8 * (end - start)


READS = {"plain": 1, "rms_norm": 2, "silu_and_mul": 2, "add_rms_norm": 3}  # rows as long as x's: itself, weight, up, residual
PASSES = {"plain": 2, "silu_and_mul": 2, "rms_norm": 3, "add_rms_norm": 3}  # over a row that is longer than a block


@pytest.mark.parametrize("source", list(READS))
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_rows_to_fp8(compiled: Variants, source: str, permute: bool, whole: bool) -> None:
    variant = compiled[f"rows {source} fp8 {permute} {whole}", 90]
    # A thread's 32 values are 4 loads of 16 bytes. The sum is stored once, by the first block and by those after it.
    totals = (4 if whole else 8) if source == "add_rms_norm" else 0
    assert count(variant, r"st\.global(?:\.\w+)*\.v4\.b32") == totals
    assert count(variant, r"st\.global(?:\.\w+)*\.v2\.b32") == 4 * (not permute)
    assert not permute or count(variant, r"st\.global\.b32|st\.global\.v1\.b32") >= 8
    loads = count(variant, r"ld\.global(?:\.\w+)*\.v4\.b32")
    assert loads == 4 * READS[source] if whole else loads >= 4 * (PASSES[source] + 1)
    assert count(variant, r"cvt\.rn\.satfinite\.e4m3x2\.f32") == 16
    ptx = variant["ptx"]
    assert "griddepcontrol.launch_dependents" in ptx
    # Nothing is read before the wait; the norm's weight is brought nearer.
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
    assert ("prefetch.global.L2" in ptx[: ptx.index("griddepcontrol.wait")]) == (PASSES[source] == 3)


@pytest.mark.parametrize("x", ["bf16", "fp16"])
@pytest.mark.parametrize("source", list(READS))
def test_rows_in_16_bits(compiled: Variants, source: str, x: str) -> None:
    variant = compiled[f"rows {source} {x} False True", 90]
    assert count(variant, r"ld\.global(?:\.\w+)*\.v4\.b32") == 4 * READS[source]
    assert count(variant, r"st\.global(?:\.\w+)*\.v4\.b32") == 4 * (1 + (source == "add_rms_norm"))
    # SiLU: an exponential and a reciprocal a value, and conversions of pairs.
    assert count(variant, r"ex2\.approx|rcp\.approx") == (64 if source == "silu_and_mul" else 0)
    assert count(variant, rf"cvt\.rn\.{'f16' if x == 'fp16' else x}x2\.f32") >= (16 if source == "silu_and_mul" else 0)


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_widen(compiled: Variants, arch: int) -> None:
    variant = compiled["widen", arch]
    assert count(variant, r"cvt\.rn\.satfinite\.e4m3x2\.f16x2") >= 4
    assert count(variant, r"prmt\.b32") >= 4


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_portable(compiled: Variants, arch: int, fp8: bool) -> None:
    assert count(compiled[f"portable {fp8}", arch], r"mma\.sync|wgmma\.mma_async|tcgen05\.mma") > 0


@pytest.mark.parametrize(
    ("arch", "instruction"), [(100, r"tcgen05\.mma\S*kind::mxf4nvf4"), (120, r"mma\.sync\S*kind::mxf4nvf4\S*ue4m3")]
)
def test_dot_scaled_is_native(compiled: Variants, arch: int, instruction: str) -> None:
    assert count(compiled["dot_scaled", arch], instruction) > 0


@pytest.mark.parametrize("product", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", [100, 120])
def test_products_are_scaled_in_whole_vectors(compiled: Variants, arch: int, product: str) -> None:
    variant = compiled[f"scale {product}", arch]
    # 8 values a thread: the product, the rows' scales and the bias, and the token's scale.
    assert count(variant, r"ld\.global(?:\.\w+)*\.v4\.b32") == 2 * (product == "fp32") + (product == "bf16") + 2 + 1
    assert count(variant, r"ld\.global") == count(variant, r"ld\.global(?:\.\w+)*\.v4\.b32") + 1
    assert count(variant, r"st\.global(?:\.\w+)*\.v4\.b32") == 1

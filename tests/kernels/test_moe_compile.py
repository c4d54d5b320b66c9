"""Compile-only checks of the MoE kernels: which instructions they become on GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel for every architecture; in a process of its own, because tests beside this one run the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_moe.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def of(compiled: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    chosen = [one for one in compiled if one["name"].startswith(name)]
    assert chosen
    return chosen


def test_no_local_memory(compiled):
    for one in compiled:
        assert one["LOCAL"] == 0
        # Triton 3.9 puts one value there, six of 256 rows, ten for a short K; products of 128 rows by words what only their
        # epilogue needs.
        most = 192 if one.get("by_word") else 40 if "short" in one["name"] else 24 if one.get("rows") == 256 else 8
        assert one["STACK"] <= most, (one["name"], one["arch"])


def test_no_operand_is_overwritten(compiled):
    for one in of(compiled, "hopper"):
        assert not one["overwritten"], (one["name"], one["overwritten"][:3])


def test_portable_gemms_run_on_tensor_cores(compiled):
    for one in of(compiled, "gemm"):
        assert "mma" in one["ptx"], (one["name"], one["arch"])
    for one in of(compiled, "gemm fp8"):
        # e4m3 operands where tensor cores take them, 16-bit ones below.
        assert ("e4m3" in one["ptx"]) == (one["arch"] >= 89)


def test_launches_overlap_from_hopper_on(compiled):
    for name in ("operand", "combine"):
        for one in of(compiled, name):
            assert ("griddepcontrol.wait" in one["ptx"]) == (one["arch"] >= 90)
    for one in of(compiled, "hopper"):
        assert one["ptx"].count("griddepcontrol.wait") >= 1


def test_fp8_operands_move_in_wide_accesses(compiled):
    for one in of(compiled, "fp8 operand"):
        assert "ld.global.v4.b32" in one["ptx"]
        assert "st.global.v4.b32" in one["ptx"]
        # The next kernel reads the routing before it waits: it may not start before the routing is complete.
        assert one["ptx"].index("griddepcontrol.wait") < one["ptx"].index("griddepcontrol.launch_dependents")


def test_hopper_decodes_without_shuffles(compiled):
    for one in of(compiled, "hopper"):
        ptx = one["ptx"]
        assert "wgmma.mma_async" in ptx
        assert ptx.count("shfl") == (one["rows"] == 256)  # which of two groups a warp belongs to
        if "fp8" in one["name"]:
            assert "wgmma.mma_async.sync.aligned.m64" in ptx
            assert ".e4m3.e4m3" in ptx
        # The decoded weights go into the product from registers: what is stored to shared memory is the epilogue's.
        assert ptx.count("st.shared") <= (22 if one["rows"] == 256 else 8), one["name"]  # there, of two groups of warps


def test_blocks_of_the_hopper_kernels_fit_a_multiprocessor(compiled):
    for one in of(compiled, "hopper"):
        assert one["resident"] * (one["shared"] + 1024) <= 228 * 1024, one["name"]
        assert one["resident"] * one["REG"] * one["warps"] * 32 <= 65536, one["name"]


def test_persistent_hopper_kernels_overlap_products_and_decoding(compiled):
    """ptxas says so where it has to wait for every product at once (of a tile a block, the other block fills the gap)."""
    for one in of(compiled, "hopper"):
        if one["rows"] <= 32 or one["rows"] == 256 or one["by_word"]:
            assert "serialized" not in one["ptxas"], one["ptxas"]


def test_rows_are_gathered_by_asynchronous_copies(compiled):
    """Of 16 bytes, which arrive at a barrier by themselves; the weights still come in bulk."""
    gathering = [one for one in of(compiled, "hopper") if "gather" in one["name"]]
    assert len(gathering) == 3
    for one in gathering:
        ptx = one["ptx"]
        assert "cp.async.cg.shared.global" in ptx
        assert "cp.async.mbarrier.arrive.noinc" in ptx
        assert "cp.async.bulk.tensor.3d" in ptx
        assert "cp.async.bulk.tensor.2d" not in ptx, one["name"]

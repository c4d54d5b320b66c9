"""Compile-only checks: what the kernels become on GPUs that are not here. A kernel joins by a row in `compile_rows.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from compile_rows import ARCHS, ROWS

NAMES = [row.name for row in ROWS]
QUANTIZERS = [name for name in NAMES if name not in ("dequantize", "place scales")]
Compiled = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every row for every architecture; in a process of its own, because tests beside this one run the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_rows.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {(one["name"], one["arch"]): one for one in json.loads(done.stdout)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_no_local_memory(compiled: Compiled, name: str, arch: int):
    one = compiled[name, arch]
    assert (one["STACK"], one["LOCAL"]) == (0, 0)
    assert ".local" not in one["ptx"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_accesses_are_as_wide_as_the_data_allows(compiled: Compiled, name: str, arch: int):
    ptx = compiled[name, arch]["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*", ptx)
    stores = re.findall(r"st\.global[\w.:]*", ptx)
    if name == "dequantize":
        assert "st.global.v4.b32" in stores  # 16 bytes of bf16
        assert "ld.global.v2.b32" in loads  # the 8 bytes of codes that they come from
    else:
        assert "ld.global.v4.b32" in loads  # 16 bytes
        assert not any("b16" in load for load in loads)
        # The codes of a block of 16 are 8 bytes; of few rows two threads share a block. Scales are placed as they lie.
        wide = {"quantize few rows": "st.global.b32", "place scales": "st.global.v4.b32"}
        assert wide.get(name, "st.global.v2.b32") in stores


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_roundings(compiled: Compiled, name: str, arch: int):
    ptx = compiled[name, arch]["ptx"]
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (arch >= 100)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (arch >= 89)
    fast = name == "quantize fast"
    assert ("rcp.approx.ftz.f32" in ptx) == (fast or "silu" in name)
    assert ("rcp.rn.f32" in ptx) == (not fast)
    # Flushed subnormals and contracted products change bits.
    assert not re.search(r"\b(mul|add|sub|div)(\.rn|\.full)?\.ftz\.f32", ptx)
    assert "div.full" not in ptx


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [*QUANTIZERS[:-1], "place scales"])
def test_programmatic_launches_wait_before_they_let_others_start(compiled: Compiled, name: str, arch: int):
    ptx = compiled[name, arch]["ptx"]
    found = re.findall(r"griddepcontrol\.\w+|[ls][dt]\.global", ptx)
    if arch < 90:
        assert not any("griddep" in one for one in found)
    else:
        assert found[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]


@pytest.mark.parametrize("arch", ARCHS)
def test_two_multiply_adds_in_the_portable_encoder_and_none_elsewhere(compiled: Compiled, arch: int):
    """Contracted products show as fma: eight codes take 16 of them before SM100, none from SM100 on."""
    ptx = compiled["quantize per token", arch]["ptx"]
    encoded = 0 if arch >= 100 else ptx.count("mad.lo.u32")
    assert len(re.findall(r"fma\.rn(\.sat)?\.f32", ptx)) == 2 * encoded

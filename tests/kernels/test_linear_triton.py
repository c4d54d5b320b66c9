"""The dense layer's portable kernels under Triton's interpreter against their twins, and the choice of a GEMM.

fp16 throughout: the interpreter truncates to bf16.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import json
from typing import Any

import pytest
import torch

from nvfp4_kernels import dispatch, quantize_weight
from nvfp4_kernels.devices import hopper_problem
from nvfp4_kernels.formats import SfLayout
from nvfp4_kernels.reference import linear as reference
from nvfp4_kernels.reference.quantize import dequantize, quantize
from nvfp4_kernels.triton import activation, gemm_portable, tuning
from nvfp4_kernels.triton import linear as gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 32), (5, 100, 144), (70, 130, 272)])
@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
def test_portable(mode: str, m: int, n: int, k: int) -> None:
    x = torch.randn(m, k, dtype=torch.float16)
    weight = quantize_weight(torch.randn(n, k)).prepared(mode)
    bias = torch.randn(n, dtype=torch.float16)
    arguments = (weight.data, weight.scales, weight.row_scale())
    want = reference.linear(x, *arguments, activation=mode, fp8_fold=weight.fp8_fold, bias=bias)
    operand, token = activation.quantize_fp8(x, "natural") if mode == "fp8_per_token" else (x, None)
    out = torch.full((m, n), float("nan"), dtype=torch.float16)
    gemm_portable.run(operand, *arguments, out, fp8_fold=weight.fp8_fold, token_scale=token, bias=bias)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("k", [16, 144, 1040])
def test_quantize_fp8_bits(k: int) -> None:
    x = (torch.randn(9, k) * torch.logspace(-5, 3, 9)[:, None]).to(torch.float16)
    x[3] = 0
    want, want_scale = reference.quantize_fp8_per_token(x)
    got, scale = activation.quantize_fp8(x, "natural")
    assert torch.equal(got.float(), want.float())
    assert torch.equal(scale, want_scale)


ORDERS = {
    "16": lambda k: torch.arange(k).view(-1, 4, 4, 2, 2, 2).permute(0, 2, 4, 5, 1, 3).reshape(-1),
    "fp8": lambda k: torch.arange(k).view(-1, 4, 4, 2, 4).permute(0, 2, 3, 1, 4).reshape(-1),
}


def ordered(x: torch.Tensor, order: str) -> torch.Tensor:
    """x [M, K] with zeros up to a multiple of 256 and K in the GEMMs' order."""
    wide = torch.nn.functional.pad(x, (0, -x.shape[1] % 256))
    return wide[:, ORDERS[order](wide.shape[1])]


@pytest.mark.parametrize("k", [32, 256, 608, 2880])
@pytest.mark.parametrize("order", list(ORDERS))
def test_orders(order: str, k: int) -> None:
    wide = torch.randn(3, k + 8, dtype=torch.float16)
    x = wide[:, :k]
    assert torch.equal(activation.permute(x, order), ordered(x, order))
    if order == "fp8":
        got, scale = activation.quantize_fp8(x, order)
        want, want_scale = reference.quantize_fp8_per_token(x)
        assert torch.equal(got.float(), ordered(want.float(), order))
        assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("k", [32, 256, 608])
@pytest.mark.parametrize("order", ["natural", "16"])
def test_decode(order: str, k: int) -> None:
    x = torch.randn(5, k)
    codes, sf, _ = quantize(x, torch.tensor([400.0]), layout=SfLayout.layout_linear)
    want = dequantize(codes, sf, torch.ones(1), layout=SfLayout.layout_linear)
    if order == "16":
        want = ordered(want, order)
    assert torch.equal(activation.decode(codes, sf, torch.float16, order).float(), want)


def test_quantize_nvfp4() -> None:
    x, decode_scale = torch.randn(5, 256).bfloat16(), torch.tensor([0.00217])
    got = gpu.quantize_nvfp4(x, "nvfp4_per_tensor", decode_scale)
    want = quantize(x, 1 / decode_scale, layout=SfLayout.layout_linear)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], decode_scale)
    base = torch.tensor([reference.INVERSE_BASE])
    for g, w in zip(
        gpu.quantize_nvfp4(x, "nvfp4_per_token", None),
        quantize(x, base, layout=SfLayout.layout_linear, per_token=True),
        strict=True,
    ):
        assert torch.equal(g, w)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Makes `plan` see a device of a given name and architecture; the user's own tables stay out."""

    def pretend(name: str, arch: int, processors: int = 132) -> torch.device:
        monkeypatch.setattr(gpu, "cuda_device", lambda index: (name, arch, processors))
        gpu.plan.cache_clear()
        return torch.device("cuda", 0)

    monkeypatch.setenv("NVFP4_CACHE", str(tmp_path))
    gpu._table.cache_clear()
    yield pretend
    gpu._table.cache_clear()


def test_plan_reads_the_table(on_device) -> None:
    shipped = json.loads(gpu.shipped_table_path(H100).read_text())["linear"]
    device = on_device(H100, 90)
    entry = shipped["fp8_per_token"]["28672x4096"]["1024"]
    for m in (961, 1000, 1024):
        plan = gpu.plan(device, "fp8_per_token", m, 28672, 4096)
        assert {"kernel": plan.kernel, **plan.parameters} == entry
        assert H100 in plan.reason
    # How many rows make how many tiles decides there; up to 128 the next entry serves.
    assert not gpu.plan(device, "fp8_per_token", 960, 28672, 4096).reason.startswith("measured")
    assert gpu.plan(device, "fp8_per_token", 65, 28672, 4096) == gpu.plan(device, "fp8_per_token", 128, 28672, 4096)
    # The W4A4 modes run the GEMM of "none".
    assert gpu.plan(device, "nvfp4_per_token", 64, 6144, 4096) == gpu.plan(device, "none", 64, 6144, 4096)
    # Another Hopper device takes the H100's numbers where it has none of its own, and the reason says so.
    for name, mode, m, origin in (
        ("NVIDIA H800", "fp8_per_token", 64, H100),
        ("NVIDIA H200", "fp8_per_token", 64, "NVIDIA H200"),
        ("NVIDIA H200", "none", 64, "NVIDIA H200"),
    ):
        reason = gpu.plan(on_device(name, 90), mode, m, 6144, 4096).reason
        assert reason == f"measured on {origin} for 6144 x 4096 at M = {m}"


def test_entries_of_another_version_are_not_used(on_device, tmp_path, caplog) -> None:
    device = on_device(H100, 90)
    old = {"4": {"kernel": "few", "bm": 8, "warps": 4}, "32": {"kernel": "gone"}}
    good = {"32": {"kernel": "decode", "bm": 64, "warps": 4, "groups": 2, "stages": 3, "resident": 1, "split": 1}}
    path = gpu.user_table_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"linear": {"fp8_per_token": {"8192x512": old, "4096x512": good}, "auto": {"8192x512": 3}}}))
    with caplog.at_level("WARNING"):
        assert not gpu.plan(device, "fp8_per_token", 32, 8192, 512).reason.startswith("measured")
        measured = gpu.plan(device, "fp8_per_token", 32, 4096, 512)
    assert {"kernel": measured.kernel, **measured.parameters} == good["32"]
    assert [str(path) in message and "8192x512" in message for message in caplog.messages] == [True]


def test_rows_that_the_user_measured_go_before_shipped_ones(on_device) -> None:
    mine = {"kernel": "decode", "bm": 64, "warps": 4, "groups": 1, "stages": 5, "resident": 1, "split": 1}
    path = gpu.user_table_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    few = {"kernel": "few", "warps": 4, "apart": 1}
    path.write_text(json.dumps({"linear": {"fp8_per_token": {"6144x4096": {"64": mine}}, "none": {"4096x512": {"8": few}}}}))
    device = on_device("NVIDIA H200", 90)
    plan = gpu.plan(device, "fp8_per_token", 50, 6144, 4096)
    assert {"kernel": plan.kernel, **plan.parameters} == mine
    # gemm_few has eight rows, whatever is the last that a table holds.
    assert gpu.plan(device, "none", 8, 4096, 512).kernel == "few"
    assert gpu.plan(device, "none", 5000, 4096, 512).kernel != "few"
    for name, m in (("NVIDIA H200", 16), (H100, 32)):  # the others as they were
        shipped = json.loads(gpu.shipped_table_path(name).read_text())["linear"]["fp8_per_token"]["6144x4096"][str(m)]
        plan = gpu.plan(device, "fp8_per_token", m, 6144, 4096)
        assert {"kernel": plan.kernel, **plan.parameters} == shipped


def assert_fits(kernel: str, parameters: dict[str, Any], mode: str) -> None:
    """As many blocks of gemm_decode as shall lie beside each other have room in a Hopper's shared memory."""
    if kernel == "decode":
        features, groups = 16 * parameters["warps"], parameters["groups"]
        stage = parameters["bm"] * 256 * (1 if mode == "fp8_per_token" else 2) + features * (128 + 16)
        sums = parameters["bm"] * features * 4 if groups == 2 else 0
        block = groups * parameters["stages"] * (stage + 16) + sums + 1024
        assert parameters["resident"] * block <= 228 * 1024, parameters


def test_every_shipped_entry_runs_somewhere() -> None:
    for path in gpu.shipped_table_path(H100).parent.glob("*.json"):
        table = json.loads(path.read_text())["linear"]
        for mode in tuning.MODES:
            for shape, entries in table[mode].items():
                n, k = map(int, shape.split("x"))
                assert hopper_problem(k) is None
                # "auto" is known where few rows were measured.
                assert (shape in table["auto"]) == ("1" in table["none"].get(shape, {}))
                for m, entry in entries.items():
                    assert entry["kernel"] in ("few", "decode", "medium", "large", "widen")
                    assert gpu.stages_of(k) >= entry.get("split", 1) * entry.get("groups", 1)
                    if entry.get("split") == 0:
                        assert gpu._shares(entry["kernel"], entry, int(m), n, k, mode == "fp8_per_token", 132)[1] > 0
                    assert entry["kernel"] != "few" or int(m) <= 8
                    assert entry["kernel"] != "decode" or int(m) <= entry["bm"] or entry["bm"] >= 64
                    assert_fits(entry["kernel"], entry, mode)


@pytest.mark.parametrize("mode", ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 33, 64, 65, 129, 700, 5000])
@pytest.mark.parametrize(
    ("n", "k"), [(7, 32), (7, 256), (3000, 1280), (5120, 2880), (1024, 8192), (4096, 14336), (65536, 12288)]
)
def test_rules_hold_for_any_shape(on_device, mode: str, m: int, n: int, k: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        plan = gpu.plan(on_device("another Hopper", 90), mode, m, n, k, dtype)
        assert plan.reason
        assert gpu.stages_of(k) >= plan.parameters.get("split", 1) * plan.parameters.get("groups", 1)
        assert k % {"large": 128}.get(plan.kernel, 32) == 0
        assert_fits(plan.kernel, plan.parameters, mode)
        assert plan.kernel != "few" or (m <= 8 and mode != "fp8_per_token")
        assert plan.kernel != "decode" or min(m, 64) <= plan.parameters["bm"] <= (128 if k <= 10240 else 64)
        assert plan.kernel != "widen" or (mode == "fp8_per_token" and dtype == torch.bfloat16 and n % 16 == 0)


@pytest.mark.parametrize("mode", ["none", "fp8_per_token", "auto"])
@pytest.mark.parametrize(("n", "k"), [(3000, 1280), (7168, 4608), (21504, 2560), (4096, 4096), (12800, 5120)])
@pytest.mark.parametrize(("name", "processors"), [(H100, 132), ("NVIDIA H200", 132), ("NVIDIA H20", 78)])
def test_every_kernel_is_compiled_ahead(
    on_device, monkeypatch: pytest.MonkeyPatch, name: str, processors: int, mode: str, n: int, k: int
) -> None:
    """A warm-up of the rows that `rows_to_compile` names leaves no kernel of any number of rows to a request."""
    device = on_device(name, 90, processors)
    monkeypatch.setattr(dispatch, "arch_of", lambda device: 90)

    def variant(m: int) -> tuple[Any, ...]:
        resolved = dispatch.resolve_activation(mode, device, m, n, k)
        plan = gpu.plan(device, resolved, m, n, k)
        if plan.kernel in ("medium", "large"):  # the plan says what is launched
            split, lent = gpu._shares(plan.kernel, plan.parameters, m, n, k, resolved == "fp8_per_token", processors)
            assert plan.parameters["split"] == (0 if lent else split)
        return resolved, plan.variant

    rows = [*(1 << i for i in range(13)), *range(64, 16385, 64)]
    chosen = dispatch.rows_to_compile(device, mode, n, k, torch.bfloat16, rows)
    assert len({variant(m) for m in chosen}) == len(chosen)
    assert {variant(m) for m in (*range(1, 4097), *range(4097, 16385, 31))} == {variant(m) for m in chosen}


def test_other_devices(on_device) -> None:
    for name, arch in (("NVIDIA A100", 80), ("NVIDIA L40S", 89)):
        assert gpu.plan(on_device(name, arch), "none", 64, 4096, 4096).kernel == "portable"
    blackwell = on_device("NVIDIA B200", 100)
    assert gpu.plan(blackwell, "nvfp4_per_token", 64, 4096, 4096).kernel == "dot_scaled"
    assert gpu.plan(blackwell, "none", 64, 4096, 4096).kernel == "portable"
    hopper = on_device(H100, 90)
    assert "K = 144" in gpu.plan(hopper, "none", 64, 4096, 144).reason
    assert gpu.faster_mode(hopper, 1, 28672, 4096) == "none"
    assert gpu.faster_mode(hopper, 1024, 28672, 4096) == "fp8_per_token"
    assert gpu.faster_mode(hopper, 1024, 4096, 144) == "none"


def test_first_fp8() -> None:
    none = {"1": 10.0, "8": 10.0, "16": 10.0}
    assert tuning._first_fp8(none, {"1": 9.0, "8": 9.0, "16": 9.0}) == 1
    assert tuning._first_fp8(none, {"1": 12.0, "8": 12.0, "16": 9.0}) == 9
    assert tuning._first_fp8(none, {"1": 12.0, "8": 9.0, "16": 9.9}) == 2
    assert tuning._first_fp8(none, {"1": 9.0, "8": 10.6, "16": 9.0}) == 9
    assert tuning._first_fp8(none, {"1": 9.9, "8": 9.9, "16": 9.9}) == 17


def test_plans_close_to_the_fastest_are_measured_hot() -> None:
    plans = [gpu.Plan(name) for name in ("broken", "a", "b", "c")]
    cold, hot = {"a": 10.0, "b": 10.5, "c": 11.0}, {"a": 12.0, "b": 11.0}
    asked: list[tuple[str, float]] = []

    def time_calls(calls: list[Any], warm_up: float) -> float:
        asked.append((calls[0], warm_up))
        return times_longer * 1e-6 * (cold if warm_up < 0.3 else hot)[calls[0]]

    def measured(m: int, plans: list[gpu.Plan]) -> list[tuple[float, str]]:
        asked.clear()
        found = tuning._measured(
            plans, lambda plan: [plan.kernel], f"4x32 M={m} none", m >= tuning._HOT_ROWS, tuning._CLOSE, time_calls, said.append
        )
        return [(round(seconds * 1e6, 3), plan.kernel) for seconds, plan in found]

    times_longer = 1
    said: list[str] = []
    assert measured(64, plans) == [(10.0, "a"), (10.5, "b"), (11.0, "c")]
    assert len(said) == 1
    assert "4x32 M=64 none broken" in said[0]
    assert measured(512, plans) == [(12.0, "a"), (11.0, "b")]
    assert [name for name, _ in asked] == ["broken", "a", "b", "c", "a", "b"]
    assert asked[-2][1] > asked[-1][1]  # the first heats the card
    assert measured(512, plans[:1]) == []
    times_longer = 3
    assert measured(64, plans) == [(36.0, "a"), (33.0, "b")]


def test_plans_of_a_block_are_those_that_make_it_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, narrow, wide = (gpu.Plan("decode", {"resident": resident}) for resident in (4, 1, 8))
    monkeypatch.setattr(tuning, "cuda_device", lambda index: (H100, 90, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    monkeypatch.setattr(tuning, "compile_all", lambda jobs, device: [])
    monkeypatch.setattr(tuning, "operands", lambda n, k, device: (torch.empty(n, 0),))
    monkeypatch.setattr(gpu, "faster_mode", lambda device, m, n, k: "none" if m == 8 else "fp8_per_token")
    monkeypatch.setattr(gpu, "plan", lambda device, mode, m, n, k: shipped)
    monkeypatch.setattr(tuning, "candidates", lambda *_: [wide, narrow, gpu.Plan("large")])
    monkeypatch.setattr(tuning, "calls", lambda plan, mode, m, weights: [plan])
    monkeypatch.setattr(tuning, "block_calls", lambda block, choices, m, weights: [choices, m])
    asked: list[tuple[int, list[int]]] = []

    def time_calls(calls: list[Any], warm_up: float) -> float:
        if len(calls) == 1:
            return 7e-6
        choices, m = calls
        resident = [plan.parameters["resident"] for _, plan in choices.values()]
        asked.append((m, resident))
        # From 16 rows on narrow tiles serve the first two layers, and gain next to nothing in the last.
        gain = {1: 2.0 if m > 8 else -1.0, 4: 0.0, 8: -2.0}
        return 1e-6 * (100 - gain[resident[0]] - gain[resident[1]] - 0.1 * (resident[3] == 1) + (resident[2] != 4))

    block = tuning.Block(512, 1024, 128, 2048, ranks=2)
    assert block.layers == {"qkv": (640, 512), "o": (512, 512), "gate_up": (2048, 512), "down": (512, 1024)}
    table = tuning.tune_block(block, torch.device("cuda", 0), time_calls, copies_of=lambda nbytes: 2, log=lambda line: None)
    entry = {"kernel": "decode", "resident": 1}
    rows = {str(m): entry for m in tuning.DECODE_ROWS[1:]}
    assert table["linear"] == {"none": {}, "fp8_per_token": {"640x512": rows, "512x512": rows}}
    assert table["us"]["fp8_per_token"]["640x512"] == dict.fromkeys(rows, 7.0)
    # A layer is measured beside what the ones before it have been given.
    assert (16, [1, 8, 4, 4]) in asked
    assert (8, [4, 8, 4, 4]) in asked
    assert not any(m == 16 and resident[:2] != [1, 1] for m, resident in asked if 1 in resident[2:])


def test_tiles_of_128_tokens_where_they_fill_the_card_once(on_device) -> None:
    device = on_device("another Hopper", 90)
    for n, k, m, bm in ((3584, 4736, 192, 128), (3584, 4736, 128, 64), (4096, 1408, 192, 64), (1024, 4096, 512, 64)):
        for mode in ("fp8_per_token", "none"):
            if (mode, k) != ("none", 1408):  # 16 bits hold two tiles of 64 beside each other less well
                plan = gpu.plan(device, mode, m, n, k)
                assert (plan.kernel, plan.parameters["bm"]) == ("decode", bm), (mode, m, n, k, plan)

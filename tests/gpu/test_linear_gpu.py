"""The dense layer's GEMMs on a real GPU, against float64 over the same quantized operands."""

from __future__ import annotations

import math

import pytest
import torch

from nvfp4_kernels import nvfp4_linear
from nvfp4_kernels.formats import SfLayout
from nvfp4_kernels.reference.linear import INVERSE_BASE, quantize_fp8_per_token, weight_operand
from nvfp4_kernels.reference.quantize import dequantize, quantize
from nvfp4_kernels.triton import linear as gpu
from nvfp4_kernels.triton import tuning, workspace
from nvfp4_kernels.triton.activation import permute, quantize_fp8
from nvfp4_kernels.triton.widen import widen_fp8
from nvfp4_kernels.weight import Nvfp4Weight, fp8_fold

pytestmark = pytest.mark.gpu

MODES = ("none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor")
INPUT_SCALE = 4 / (6 * 448)


def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def weight(n: int, k: int, per_row: bool = False) -> Nvfp4Weight:
    """Codes and scales of every kind, a block of zeros and a row of zeros among them."""
    data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = (torch.rand(n, k // 16) * 40 + 1).to(torch.float8_e4m3fn)
    scales[n // 2] = 0
    scales[0, 0] = 0
    scale = torch.rand(n) * 0.01 + 0.001 if per_row else torch.tensor(0.004)
    return Nvfp4Weight(data, scales, scale, fp8_fold(scales))


def on_gpu(w: Nvfp4Weight) -> Nvfp4Weight:
    assert w.fp8_fold is not None
    return Nvfp4Weight(w.data.cuda(), w.scales.cuda(), w.global_scale.cuda(), w.fp8_fold.cuda())


def exact(x: torch.Tensor, w: Nvfp4Weight, mode: str, bias: torch.Tensor | None) -> torch.Tensor:
    """float64 over the operands that the CPU twins quantize: the definition of the layer but for its roundings."""
    scale: torch.Tensor | float = 1.0
    if mode == "none":
        operand = x.double()
    elif mode == "fp8_per_token":
        values, token = quantize_fp8_per_token(x)
        operand, scale = values.double(), token.double()[:, None]
    else:
        per_token = mode == "nvfp4_per_token"
        encode = torch.tensor([INVERSE_BASE]) if per_token else 1 / torch.tensor([INPUT_SCALE])
        codes, sf, token = quantize(x, encode, layout=SfLayout.layout_linear, per_token=per_token)
        operand = dequantize(codes, sf, torch.ones(1), layout=SfLayout.layout_linear).double()
        scale = token.double()[:, None] if per_token else INPUT_SCALE
    fold = w.fp8_fold if mode == "fp8_per_token" else None
    product = operand @ weight_operand(w.data, w.scales, fold).double().t()
    product = product * scale * w.row_scale().double()
    return product if bias is None else product + bias.double()


def check(out: torch.Tensor, want: torch.Tensor, mode: str, k: int) -> None:
    """`out` is no further from `want` than its own rounding; FP8 tensor cores add their short accumulators' error."""
    assert out.isfinite().all()
    norm = want.norm()
    rounding = ((want.to(out.dtype).double() - want).norm() / norm).item()
    error = ((out.cpu().double() - want).norm() / norm).item()
    # Hopper adds FP8 products in accumulators of 14 bits or so: measured 2e-5 * sqrt(K), the same in cuBLAS's fast mode.
    short = 3e-5 * math.sqrt(k) if mode == "fp8_per_token" else 0.0
    assert error < math.hypot(1.2 * rounding, short) + 1e-5, (error, rounding, short)


SHAPES = [
    (1, 264, 512),
    (2, 256, 768),
    (7, 200, 1024),
    (16, 1024, 4096),
    (33, 328, 768),
    (64, 136, 2048),
    (100, 136, 512),
    (129, 1000, 1024),
    (300, 520, 2048),
    (1030, 256, 512),
    (5, 100, 144),
    (70, 72, 272),
    (3, 7, 256),
    (1, 264, 32),
    (5, 100, 96),
    (40, 136, 608),
    (100, 400, 2880),
    (1100, 264, 2880),
    (2100, 512, 1408),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_default_plan(mode: str, m: int, n: int, k: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(m, k).to(dtype) * 0.3
        w = weight(n, k, per_row=m % 2 == 1)
        bias = torch.randn(n).to(dtype) if m % 3 else None
        scale = torch.tensor([INPUT_SCALE], device="cuda")
        out = nvfp4_linear(x.cuda(), on_gpu(w), activation=mode, input_scale=scale, bias=None if bias is None else bias.cuda())
        check(out, exact(x, w, mode, bias), mode, k)


def hopper_plans() -> list[tuple[str, int, str, dict[str, int]]]:
    """(mode, M, kernel, parameters): one of each kind, split and whole."""
    plans: list[tuple[str, int, str, dict[str, int]]] = []
    for split in (1, 4):
        for mode in ("none", "fp8_per_token"):
            for bm, warps in ((8, 4), (64, 8)):
                tile = {"bm": bm, "warps": warps, "groups": 1, "stages": 3, "split": split, "resident": 1}
                plans.append((mode, bm - 1, "decode", tile))
            for bm, groups, stages in ((8, 2, 3), (16, 2, 4), (32, 2, 2), (64, 2, 2)):
                tile = {"bm": bm, "warps": 4, "groups": groups, "stages": stages, "split": min(split, 2), "resident": 1}
                plans.append((mode, 2 * bm - 1, "decode", tile))
            for warps, m in ((4, 130), (8, 150)):  # several tiles of tokens
                tile = {"bm": 64, "warps": warps, "groups": 1, "stages": 2, "split": split, "resident": 2}
                plans.append((mode, m, "decode", tile))
            for warps, groups in ((4, 2), (8, 1)) if mode == "fp8_per_token" else ((4, 1), (8, 1)):
                tile = {"bm": 128, "warps": warps, "groups": groups, "stages": 2, "split": min(split, 3), "resident": 1}
                plans.append((mode, 255, "decode", tile))
            plans.append((mode, 513, "large", {"bm": 256, "weight_stages": 3, "group": 8, "split": split}))
            tile = {"bm": 128, "weight_stages": 3, "x_stages": 6 if mode == "fp8_per_token" else 8, "group": 8, "split": split}
            plans.append((mode, 257, "medium", tile))
    for warps, apart, m in ((1, 0, 7), (4, 1, 8), (8, 0, 1), (2, 1, 3)):
        plans.append(("none", m, "few", {"warps": warps, "apart": apart}))
    return [*plans, ("fp8_per_token", 70, "widen", {})]


@pytest.mark.parametrize("k", [2048, 1760])
@pytest.mark.parametrize(("mode", "m", "kernel", "parameters"), hopper_plans())
def test_every_hopper_gemm(mode: str, m: int, kernel: str, parameters: dict[str, int], k: int) -> None:
    assert arch() == 90, "these GEMMs are Hopper's"
    k -= k % {"large": 128}.get(kernel, 32)
    n = 400
    x, w, bias = torch.randn(m, k).bfloat16(), weight(n, k, per_row=True), torch.randn(n).bfloat16()
    g = on_gpu(w)
    outs = []
    for _ in range(2):
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        plan = gpu.Plan(kernel, parameters)
        outs.append(gpu.run(plan, x.cuda(), g.data, g.scales, g.row_scale(), out, mode, g.fp8_fold, None, bias.cuda()))
    check(outs[0], exact(x, w, mode, bias), mode, k)
    assert torch.equal(outs[0], outs[1])  # split-K adds up in a fixed order


@pytest.mark.parametrize("k", [32, 96, 1408, 2080, 4064])
@pytest.mark.parametrize(("warps", "m"), [(2, 1), (4, 8), (8, 3)])
def test_few_rows_of_a_k_with_a_tail(k: int, warps: int, m: int) -> None:
    assert arch() == 90, "this GEMM is Hopper's"
    n = 100
    x, w = torch.randn(m, k).bfloat16(), weight(n, k, per_row=True)
    g = on_gpu(w)
    # NaN behind the rows of x, which the last step reaches into.
    rows = torch.full((m, k + 256), float("nan"), dtype=torch.bfloat16, device="cuda")
    rows[:, :k] = x
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    plan = gpu.Plan("few", {"warps": warps, "apart": 0})
    gpu.run(plan, rows[:, :k], g.data, g.scales, g.row_scale(), out, "none", None, None, None)
    check(out, exact(x, w, "none", None), "none", k)


FULL = (33792, 1536)  # 64 features for four blocks on each of 132 processors


def candidates() -> list[tuple[str, int, gpu.Plan]]:
    """(mode, M, plan) of every variant that tuning tries for a layer of FULL."""
    found: dict[tuple[object, ...], tuple[str, int, gpu.Plan]] = {}
    for mode in ("none", "fp8_per_token"):
        for m in (1, 4, 8, 16, 32, 64, 256, 1024):
            for plan in tuning.candidates(mode, m, *FULL, 132):
                found.setdefault((mode, plan.variant), (mode, m, plan))
    return list(found.values())


@pytest.mark.parametrize(("mode", "m", "plan"), candidates())
def test_full_processors(mode: str, m: int, plan: gpu.Plan) -> None:
    """Products take longest, and warps drift furthest apart, where as many blocks as fit have work."""
    assert arch() == 90, "these GEMMs are Hopper's"
    n, k = FULL
    x, w = torch.randn(m, k, device="cuda").bfloat16(), on_gpu(weight(n, k, per_row=True))
    outs = []
    for _ in range(10):
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        outs.append(gpu.run(plan, x, w.data, w.scales, w.row_scale(), out, mode, w.fp8_fold, None, None))
    check(outs[0], exact(x, w, mode, None).cpu(), mode, k)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    ("kernel", "parameters"),
    [
        ("decode", {"bm": 64, "warps": 4, "groups": 1, "stages": 3, "split": 1, "resident": 1}),
        ("medium", {"bm": 128, "weight_stages": 3, "x_stages": 6, "group": 8, "split": 1}),
        ("large", {"bm": 256, "weight_stages": 3, "group": 8, "split": 1}),
        ("widen", {}),
    ],
)
def test_every_code_of_every_scale_of_every_fold(kernel: str, parameters: dict[str, int]) -> None:
    """Products with single ones give the FP8 operand back, bit for bit: scales that are subnormal, zero or NaN, too."""
    assert arch() == 90, "these GEMMs are Hopper's"
    k = 2048
    largest = torch.arange(0, 128).clamp(max=126).repeat_interleave(2)  # of a row; 0x7F is NaN
    scales = torch.minimum(torch.stack([torch.randperm(k // 16) for _ in largest]), largest[:, None])
    scales[1::2] = scales[1::2].clamp(min=(largest[1::2, None] - 70).clamp(min=0))  # none that is very small beside others
    scales[-1, 5] = 0x7F
    codes = torch.rand(len(largest), k // 16, 16).argsort(-1).to(torch.uint8)
    data = (codes[..., ::2] | codes[..., 1::2] << 4).flatten(1)
    scales = scales.to(torch.uint8).view(torch.float8_e4m3fn)
    fold = fp8_fold(scales)
    assert fold.unique().numel() == 19  # 2^-15 to 2^3
    x = torch.eye(k, dtype=torch.bfloat16, device="cuda")
    out = torch.full((k, len(largest)), 12.0, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, device="cuda")
    plan = gpu.Plan(kernel, parameters)
    got = gpu.run(plan, x, data.cuda(), scales.cuda(), one, out, "fp8_per_token", fold.cuda(), None, None).cpu().t()
    want = weight_operand(data, scales, fold).bfloat16()
    assert got[-1].isnan().all()  # a NaN weight is in each of its sums
    assert torch.equal(got[:-1], want[:-1])


# (kernel, M, N, K, BM, shares): tiles of the last wave alone share their K, in unequal parts where it does not divide.
TAILS = [
    ("large", 90, 17050, 1792, 256, 2),
    ("large", 257, 9000, 768, 256, 3),
    ("large", 300, 8520, 1280, 256, 2),
    ("large", 300, 8520, 1280, 256, 4),
    ("large", 513, 400, 2304, 256, 5),
    ("large", 200, 200, 256, 256, 3),
    ("large", 2500, 400, 2304, 256, 0),
    ("large", 1100, 8520, 2048, 256, 0),
    ("large", 512, 5120, 4096, 256, 0),
    ("large", 300, 1001, 3200, 256, 0),
    ("medium", 90, 17050, 1792, 128, 2),
    ("medium", 257, 9000, 768, 128, 3),
    ("medium", 300, 5640, 2304, 128, 4),
    ("medium", 513, 400, 2304, 128, 5),
    ("medium", 30, 65, 256, 128, 1),
]


@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
@pytest.mark.parametrize(("kernel", "m", "n", "k", "bm", "split"), TAILS)
def test_shared_tail(mode: str, kernel: str, m: int, n: int, k: int, bm: int, split: int) -> None:
    assert arch() == 90, "these GEMMs are Hopper's"
    x, w, bias = torch.randn(m, k).bfloat16(), weight(n, k, per_row=True), torch.randn(n).bfloat16()
    g, x_gpu, bias_gpu = on_gpu(w), x.cuda(), bias.cuda()
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    tile = {"bm": bm, "weight_stages": 3, "group": 8, "split": split}
    if kernel == "medium":
        tile["x_stages"] = 6 if mode == "fp8_per_token" else 8
    plan = gpu.Plan(kernel, tile)
    if not split:
        assert gpu._shares(kernel, tile, m, n, k, mode == "fp8_per_token", 132)[1] > 0, "no tile is helped"

    def run() -> torch.Tensor:
        out.fill_(float("nan"))
        return gpu.run(plan, x_gpu, g.data, g.scales, g.row_scale(), out, mode, g.fp8_fold, None, bias_gpu).clone()

    first = run()
    check(first, exact(x, w, mode, bias), mode, k)
    for _ in range(5):
        assert torch.equal(run(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        graph.replay()
        assert torch.equal(captured, first)
    for counters in (*workspace._eager.values(), *(pool for pools in workspace._pools.values() for pool in pools)):
        assert not counters.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [144, 256, 4096, 5120, 14336, 28672])
@pytest.mark.parametrize("m", [37, 150])
def test_quantize_fp8_bits(dtype: torch.dtype, k: int, m: int) -> None:
    x = (torch.randn(m, k) * torch.logspace(-6, 3, m)[:, None]).to(dtype)
    x[3] = 0
    x[5, 7] = -0.0
    if dtype == torch.bfloat16:
        x[6] = x[6] * 1e-38
        x[7] = x[7] * 1e30
    want, want_scale = quantize_fp8_per_token(x)
    got, scale = quantize_fp8(x.cuda(), "natural")
    assert torch.equal(got.cpu().float(), want.float())
    assert torch.equal(scale.cpu(), want_scale)
    if k % 256 == 0:
        permuted, _ = quantize_fp8(x.cuda(), "fp8")
        order = torch.arange(k).view(-1, 4, 4, 2, 4).permute(0, 2, 3, 1, 4).reshape(-1)
        assert torch.equal(permuted.float().cpu(), want.float()[:, order])


def test_permute() -> None:
    x = torch.randn(5, 512, dtype=torch.bfloat16)
    order = torch.arange(512).view(-1, 4, 4, 2, 2, 2).permute(0, 2, 4, 5, 1, 3).reshape(-1)
    assert torch.equal(permute(x.cuda(), "16").cpu(), x[:, order])


def test_widen_bits() -> None:
    w = weight(300, 4096)
    g = on_gpu(w)
    wide, columns = widen_fp8(g.data, g.scales, g.fp8_fold, g.row_scale())
    want = (weight_operand(w.data, w.scales, None) / w.fp8_fold[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(wide.cpu().view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(columns.cpu()[0], w.fp8_fold * w.row_scale())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_cuda_graph(mode: str, m: int) -> None:
    w = on_gpu(weight(512, 1024))
    scale = torch.tensor([INPUT_SCALE], device="cuda")
    x = torch.randn(m, 1024, dtype=torch.bfloat16, device="cuda")

    def run() -> torch.Tensor:
        return nvfp4_linear(x, w, activation=mode, input_scale=scale)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 2, 16, 64, 128, 300])
def test_chain_of_overlapping_launches(mode: str, m: int) -> None:
    """Layers that read what the one before them wrote, launched at once, in a graph, and each after the last has ended."""
    weights = [on_gpu(weight(1024, 1024)) for _ in range(6)]
    scale = torch.tensor([INPUT_SCALE], device="cuda")
    x = torch.randn(m, 1024, dtype=torch.bfloat16, device="cuda")

    def chain(wait: bool) -> torch.Tensor:
        y = x
        for w in weights:
            y = nvfp4_linear(y, w, activation=mode, input_scale=scale)
            if wait:
                torch.cuda.synchronize()
        return y

    want = chain(wait=True)
    assert want.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(wait=False)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want)
        assert torch.equal(chain(wait=False), want)


def test_empty_and_strided() -> None:
    w = on_gpu(weight(256, 512))
    assert nvfp4_linear(torch.empty(0, 512, dtype=torch.bfloat16, device="cuda"), w).shape == (0, 256)
    wide = torch.randn(9, 1000, dtype=torch.bfloat16, device="cuda")
    for x in (wide[:, :512], wide[:, 3:515], wide[:, :512].t().contiguous().t()):
        assert torch.equal(nvfp4_linear(x, w), nvfp4_linear(x.contiguous(), w))


def test_bias_of_another_dtype() -> None:
    m, n, k = 4096, 256, 512
    x, w, bias = torch.randn(m, k).bfloat16(), weight(n, k), torch.randn(n)
    out = nvfp4_linear(x.cuda(), on_gpu(w), activation="fp8_per_token", bias=bias.cuda())
    check(out, exact(x, w, "fp8_per_token", bias), "fp8_per_token", k)


def test_float32_is_refused() -> None:
    with pytest.raises(TypeError, match="float16 and bfloat16"):
        nvfp4_linear(torch.randn(2, 512, device="cuda"), on_gpu(weight(64, 512)))


@pytest.mark.parametrize("backend", ["cublas", "flashinfer", "cute-dsl"])
@pytest.mark.parametrize("mode", ["nvfp4_per_token", "nvfp4_per_tensor"])
@pytest.mark.parametrize("m", [1, 100, 1000])
def test_vendors(m: int, mode: str, backend: str) -> None:
    """cuBLAS's product is rounded once, as ours; FlashInfer's twice."""
    if arch() < 100:
        with pytest.raises(ValueError, match=rf"'{backend}' cannot serve this call: this device is SM{arch()}"):
            nvfp4_linear(torch.ones(1, 64, device="cuda").bfloat16(), on_gpu(weight(64, 64)), activation=mode, backend=backend,
                         input_scale=INPUT_SCALE)  # fmt: skip
        return
    if backend != "cublas":
        pytest.importorskip("flashinfer")
    w, x = weight(384, 1024, per_row=True), torch.randn(m, 1024, dtype=torch.bfloat16)
    want = exact(x, w, mode, None)
    got = nvfp4_linear(x.cuda(), on_gpu(w), activation=mode, backend=backend, input_scale=INPUT_SCALE).cpu().double()
    if backend == "cublas":
        check(got.bfloat16(), want, mode, 1024)
    else:
        assert (got - want).norm() < 1.6 * (want.bfloat16().double() - want).norm()

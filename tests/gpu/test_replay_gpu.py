"""Layers that are replayed give the bits that they give as they are written, wherever their tensors lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import pytest
import torch

from nvfp4_kernels import Nvfp4Weight, nvfp4_fused_moe, nvfp4_linear, ops, quantize_weight, replay

pytestmark = pytest.mark.gpu

MODES = ["none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor"]
Layer = Callable[[torch.Tensor, Nvfp4Weight], tuple[torch.Tensor, ...]]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Somebody who watches launches sees each of them, so that nothing is replayed."""

    from triton import knobs

    def watch(metadata: object) -> None:
        pass

    knobs.runtime.launch_enter_hook.add(watch)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(watch)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[replay.Program]:
    """The programs that have run."""
    ran: list[replay.Program] = []
    run = replay.Program.__call__

    def counted(self: replay.Program, args: tuple[object, ...]) -> object:
        ran.append(self)
        return run(self, args)

    monkeypatch.setattr(replay.Program, "__call__", counted)
    return ran


def poison() -> None:
    """What is free in the allocator's hands holds NaN."""
    for size in (1 << 12, 1 << 20, 1 << 25):
        torch.full((size,), float("nan"), device="cuda")


def weight(n: int, k: int, activation: str) -> Nvfp4Weight:
    return quantize_weight(randn(n, k), scale_search="absmax").prepared(activation)


def scale() -> torch.Tensor:
    return torch.full((1,), 4 / (448 * 6), device="cuda")


def layers(mode: str, k: int) -> dict[str, Layer]:
    norm, one = randn(k), scale() if mode == "nvfp4_per_tensor" else None

    def args(w: Nvfp4Weight) -> tuple[object, ...]:
        return w.data, w.scales, w.row_scale(), mode, w.fp8_fold, one, None, "cuda"

    return {
        "linear": lambda x, w: (nvfp4_linear(x[:, :k], w, activation=mode, input_scale=one, bias=norm[: w.shape[0]]),),
        "silu_and_mul": lambda x, w: (ops.silu_and_mul_linear(x, *args(w)),),
        "rms_norm": lambda x, w: (ops.rms_norm_linear(x[:, k:], norm, 1e-5, *args(w)),),
        "add_rms_norm": lambda x, w: ops.add_rms_norm_linear(x[:, :k], x[:, k:].clone(), norm, 1e-5, *args(w)),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", ["linear", "silu_and_mul", "rms_norm", "add_rms_norm"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 256, 512), (5, 512, 1024), (40, 512, 4096), (300, 1024, 2048), (4096, 256, 512), (33, 48, 272), (40, 512, 1504)],
)
def test_dense(mode: str, layer: str, m: int, n: int, k: int, replays: list[replay.Program]) -> None:
    function = layers(mode, k)[layer]
    weights = [weight(n, k, mode) for _ in range(3)]
    for turn in range(9):
        x, w = randn(m, 2 * k), weights[turn % 3]
        with as_written():
            want = function(x, w)
        poison()
        got = function(x, w)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    # Elsewhere torch computes what comes before the layer.
    if layer == "linear" or (k % 32 == 0 and torch.cuda.get_device_capability() == (9, 0)):
        assert len(replays) == 7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act_fn", ["silu", "relu2_no_mul"])
@pytest.mark.parametrize("tokens", [1, 16, 200, 3000])
def test_experts(mode: str, act_fn: str, tokens: int, replays: list[replay.Program]) -> None:
    experts, hidden, inner, top_k = 8, 1024, 512, 3
    gates = 1 if act_fn.endswith("no_mul") else 2

    def stack(n: int, k: int) -> Nvfp4Weight:
        return quantize_weight(randn(experts, n, k), scale_search="absmax").prepared(mode)

    stacks = [(stack(gates * inner, hidden), stack(hidden, inner)) for _ in range(2)]
    scales = (scale(), scale()) if mode == "nvfp4_per_tensor" else None
    for turn in range(6):
        x = randn(tokens, hidden)
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        weights = torch.rand(tokens, top_k, device="cuda")
        w13, w2 = stacks[turn % 2]

        run = partial(nvfp4_fused_moe, x, w13, w2, weights, ids, activation=mode, act_fn=act_fn, input_scales=scales)
        with as_written():
            want = run()
        poison()
        assert torch.equal(run(), want)
    assert len(replays) == 4


def test_in_a_graph_and_beside_it(replays: list[replay.Program]) -> None:
    weights = [weight(1024, 1024, "fp8_per_token") for _ in range(4)]
    x = randn(300, 1024)

    def chain() -> torch.Tensor:
        y = x
        for w in weights:
            y = nvfp4_linear(y, w, activation="fp8_per_token")
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept = list(replay._known)
    with torch.cuda.graph(graph):
        captured = chain()
    assert len(replays) > 4
    assert list(replay._known) == kept  # a capture's addresses come once
    for _ in range(5):
        x.copy_(randn(300, 1024))
        with as_written():
            want = chain()
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want)
        assert torch.equal(chain(), want)


def test_on_two_streams() -> None:
    """Split-K has memory that outlives a call, of each stream."""
    w, xs, streams = (
        weight(256, 8192, "fp8_per_token"),
        [randn(16, 8192) for _ in range(2)],
        [torch.cuda.Stream() for _ in range(2)],
    )
    with as_written():
        want = [nvfp4_linear(x, w, activation="fp8_per_token") for x in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(nvfp4_linear(x, w, activation="fp8_per_token"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_has_to_be_copied_first_runs_as_written(replays: list[replay.Program]) -> None:
    w = weight(256, 512, "fp8_per_token")
    for _ in range(4):
        x = randn(40, 1000)[:, 3:515]  # rows that no 16-byte access can read
        assert torch.equal(
            nvfp4_linear(x, w, activation="fp8_per_token"), nvfp4_linear(x.contiguous(), w, activation="fp8_per_token")
        )
    assert all(program.steps for program in replays)
    assert len(replays) == 2  # of the contiguous ones


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("mode", ["none", "fp8_per_token"])
def test_on_a_gpu_that_is_not_the_current_one(mode: str, replays: list[replay.Program]) -> None:
    def moved(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to("cuda:1")

    def away(w: Nvfp4Weight) -> Nvfp4Weight:
        return Nvfp4Weight(**{field.name: moved(getattr(w, field.name)) for field in fields(w)})

    w = weight(512, 1024, mode)
    w13, w2 = (quantize_weight(randn(4, 512, 512)[:, :, :k]).prepared(mode) for k in (512, 256))
    for _ in range(4):
        x, weights, ids = randn(40, 1024), torch.rand(40, 2, device="cuda"), torch.randint(4, (40, 2), device="cuda")
        apart = (x.to("cuda:1"), weights.to("cuda:1"), ids.to("cuda:1"))
        torch.cuda.synchronize(0)
        got = nvfp4_linear(apart[0], away(w), activation=mode)
        experts = nvfp4_fused_moe(apart[0][:, :512], away(w13), away(w2), *apart[1:], activation=mode)
        torch.cuda.synchronize(1)
        assert torch.cuda.current_device() == 0
        assert torch.equal(got.cuda(0), nvfp4_linear(x, w, activation=mode))
        assert torch.equal(experts.cuda(0), nvfp4_fused_moe(x[:, :512], w13, w2, weights, ids, activation=mode))
    assert len(replays) == 2 * 2 * 2  # the last two of four calls, on either GPU

"""Layers that take in the norm or the SiLU before them: the torch twins, through the ops, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvfp4_kernels import ops, quantize_weight
from nvfp4_kernels.reference.source import Source, apply

N, K, EPS = 48, 128, 1e-5
MODES = ("none", "fp8_per_token", "nvfp4_per_token", "nvfp4_per_tensor")


def layer(mode: str) -> tuple[Any, ...]:
    weight = quantize_weight(torch.randn(N, K)).prepared(mode)
    scale = torch.tensor([0.002]) if mode == "nvfp4_per_tensor" else None
    return (weight.data, weight.scales, weight.row_scale(), mode, weight.fp8_fold, scale, torch.randn(N), "cuda")


def inputs(m: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, residual, the weight of a norm, and gate beside up."""
    x, residual, both = torch.randn(m, K) * 3, torch.randn(m, K), torch.randn(m, 2 * K)
    return x.to(dtype), residual.to(dtype), (torch.rand(K) + 0.5).to(dtype), both.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    x, residual, weight, _ = inputs(7, dtype)
    x[3] = residual[3] = 0
    got = apply(x, Source("rms_norm", weight, EPS))
    # Hugging Face's and vLLM's: the norm is rounded before the weight comes.
    want = torch.nn.functional.rms_norm(x.float(), (K,), None, EPS).to(dtype) * weight
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
    total = torch.full_like(x, float("nan"))
    got = apply(x, Source("add_rms_norm", weight, EPS, residual, total))
    assert torch.equal(total, x + residual)
    # The norm is one of the sum before that is rounded.
    exact = x.float() + residual.float()
    want = torch.nn.functional.rms_norm(exact, (K,), None, EPS).to(dtype) * weight
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert got.dtype == dtype


def test_a_norm_weight_in_fp32_is_not_rounded() -> None:
    x, _, weight, _ = inputs(5, torch.bfloat16)
    weight = weight.float() * 1.001
    got = apply(x, Source("rms_norm", weight, EPS))
    assert torch.equal(got, (torch.nn.functional.rms_norm(x.float(), (K,), weight, EPS)).bfloat16())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [0, 1, 9])
def test_ops_are_the_layer_of_what_comes_before_it(m: int, mode: str) -> None:
    x, residual, weight, both = inputs(m, torch.bfloat16)
    rest = layer(mode)
    norm = Source("rms_norm", weight, EPS)
    assert torch.equal(ops.rms_norm_linear(x, weight, EPS, *rest), ops.linear(apply(x, norm), *rest))
    assert torch.equal(ops.silu_and_mul_linear(both, *rest), ops.linear(apply(both, Source("silu_and_mul")), *rest))
    out, total = ops.add_rms_norm_linear(x, residual, weight, EPS, *rest)
    expected = torch.empty_like(x)
    assert torch.equal(out, ops.linear(apply(x, Source("add_rms_norm", weight, EPS, residual, expected)), *rest))
    assert torch.equal(total, expected)


def test_fakes_have_the_shapes_and_dtypes() -> None:
    x, residual, weight, both = inputs(5, torch.bfloat16)
    rest = layer("fp8_per_token")
    nvfp4, checks = torch.ops.nvfp4, ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(nvfp4.rms_norm_linear.default, (x, weight, EPS, *rest), test_utils=checks)
    torch.library.opcheck(nvfp4.add_rms_norm_linear.default, (x, residual, weight, EPS, *rest), test_utils=checks)
    torch.library.opcheck(nvfp4.silu_and_mul_linear.default, (both, *rest), test_utils=checks)

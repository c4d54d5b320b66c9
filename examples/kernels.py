"""The kernel library alone: quantize activations, quantize a weight, multiply. Runs on any device, no framework needed.

python examples/kernels.py
"""

import torch

from nvfp4_plugin import SfLayout, nvfp4_dequantize, nvfp4_linear, nvfp4_quantize, quantize_weight

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
tokens, k, n = 8, 1024, 512
x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device)
x[0] *= 1e5  # one loud token, as some models have: with a scale per token it does not hurt the others


def decibels(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to noise ratio: every 6 dB halve the error."""
    noise = signal.double() - approximation.double()
    return float(10 * torch.log10(signal.double().square().sum() / noise.square().sum()))


# Activations: 4-bit codes (two a byte), one scale for 16 values, one fp32 scale for each token.
x_q, block_scales, token_scales = nvfp4_quantize(x, 1 / (448 * 6), sfLayout=SfLayout.layout_linear, per_token_activation=True)
print(f"activations {tuple(x.shape)} bf16 -> codes {tuple(x_q.shape)}, scales {tuple(block_scales.shape)} + {tokens}")
back = nvfp4_dequantize(x_q, block_scales, None, sfLayout=SfLayout.layout_linear, per_token_scale=token_scales)
print(f"per token:  the quiet tokens keep {decibels(x[1:], back[1:]):.1f} dB")

# The same with one scale for the whole matrix.
scale = 448 * 6 / x.abs().amax().float()
x_q, block_scales = nvfp4_quantize(x, scale, sfLayout=SfLayout.layout_linear)
back = nvfp4_dequantize(x_q, block_scales, 1 / scale, sfLayout=SfLayout.layout_linear)
print(f"per tensor: the quiet tokens keep {decibels(x[1:], back[1:]):.1f} dB")

# A weight, its block scales chosen by least squared error, and a linear layer over it in three modes.
weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
quantized = quantize_weight(weight, scale_search="mse")
print(f"weight {weight.nbytes / 2**20:.2f} MiB -> {quantized.nbytes / 2**20:.2f} MiB")
exact = x.double() @ weight.double().T
for activation in ("none", "fp8_per_token", "nvfp4_per_token"):
    y = nvfp4_linear(x, quantized, activation=activation)
    print(f"nvfp4_linear, activation {activation:15s} {decibels(exact[1:], y[1:]):.1f} dB")

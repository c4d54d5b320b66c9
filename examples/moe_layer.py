"""One mixture-of-experts layer in NVFP4, beside the same layer in bf16.

python examples/moe_layer.py
"""

import torch

from nvfp4_plugin import nvfp4_fused_moe, quantize_weight

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
tokens, hidden, inner, experts, top_k = 16, 512, 256, 8, 2

x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
# The two projections of each expert: gate and up stacked (gate first), then down.
w13 = torch.randn(experts, 2 * inner, hidden, dtype=torch.bfloat16, device=device) * hidden**-0.5
w2 = torch.randn(experts, hidden, inner, dtype=torch.bfloat16, device=device) * inner**-0.5

# The router, which stays in bf16: each token goes to its two likeliest experts.
router = torch.randn(experts, hidden, dtype=torch.bfloat16, device=device)
probabilities = (x @ router.T).float().softmax(-1)
topk_weights, topk_ids = probabilities.topk(top_k, dim=-1)
topk_weights /= topk_weights.sum(-1, keepdim=True)

# All experts at once: each gets a global scale of its own.
w13_q, w2_q = quantize_weight(w13), quantize_weight(w2)
print(f"experts {(w13.nbytes + w2.nbytes) / 2**20:.1f} MiB -> {(w13_q.nbytes + w2_q.nbytes) / 2**20:.1f} MiB")

# The layer in plain PyTorch, token by token.
expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
for token in range(tokens):
    for weight, expert in zip(topk_weights[token].tolist(), topk_ids[token].tolist(), strict=True):
        gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
        expected[token] += weight * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))

for activation in ("none", "fp8_per_token", "nvfp4_per_token"):
    y = nvfp4_fused_moe(x, w13_q, w2_q, topk_weights, topk_ids, activation=activation)
    error = (y.double() - expected).norm() / expected.norm()
    print(f"nvfp4_fused_moe, activation {activation:15s} relative error {error:.3f}")

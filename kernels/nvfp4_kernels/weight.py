"""Weights in NVFP4: the container that layers hold, and the quantizer that fills it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import ops
from .devices import hopper_serves
from .formats import E2M1_MAX, E4M3_MAX, GROUP_SIZE, align_scale_rows, e4m3_decode
from .reference.quantize import dequantize
from .reference.weight import SCALE_BASE, SCALE_SEARCHES


@dataclass(frozen=True)
class Nvfp4Weight:
    """A weight [N, K], or a stack [E, N, K], in NVFP4. Its value is e2m1 * scale * global_scale.

    data: uint8 [..., N, K/2], two e2m1 codes a byte, the low nibble is the even index.
    scales: float8_e4m3fn [..., N, K/16], row-major; the rows of a stack may lie further apart than they are long.
    global_scale: fp32 decode scale, [] or [E]; for layers fused of several logical matrices also per row, [N] or [E, N].
    fp8_fold: fp32 [..., N], the power of two that `prepared` takes out of each row for the FP8 path; None until then.
    """

    data: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor
    fp8_fold: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.dim() not in (2, 3):
            raise ValueError(f"data: got {self.data.dtype} {list(self.data.shape)}, allowed is uint8 [N, K/2] or [E, N, K/2]")
        if self.data.shape[-1] * 2 % GROUP_SIZE:
            raise ValueError(f"data: K is {self.data.shape[-1] * 2}, allowed are multiples of {GROUP_SIZE}")
        expected = (*self.data.shape[:-1], self.data.shape[-1] * 2 // GROUP_SIZE)
        if self.scales.dtype != torch.float8_e4m3fn or tuple(self.scales.shape) != expected:
            raise ValueError(
                f"scales: got {self.scales.dtype} {list(self.scales.shape)}, allowed is float8_e4m3fn {list(expected)}"
                f" for data {list(self.data.shape)}"
            )
        experts, rows = self.data.shape[:-2], self.data.shape[-2]
        if self.global_scale.dtype != torch.float32 or tuple(self.global_scale.shape) not in (
            experts,
            (*experts, rows),
        ):
            raise ValueError(
                f"global_scale: got {self.global_scale.dtype} {list(self.global_scale.shape)}, allowed is float32"
                f" {list(experts)} or {[*experts, rows]} for data {list(self.data.shape)}"
            )
        device, fold = self.data.device, self.fp8_fold
        if self.scales.device != device or self.global_scale.device != device or (fold is not None and fold.device != device):
            devices = ", ".join(f"{name} on {t.device}" for name, t in vars(self).items() if t is not None)
            raise ValueError(f"data, scales, global_scale, fp8_fold: got {devices}; allowed is one device")

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight that this stands for: [N, K] or [E, N, K]."""
        return torch.Size((*self.data.shape[:-1], self.data.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales and global scales."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales, self.global_scale))

    def row_scale(self) -> torch.Tensor:
        """The global scale with one trailing dimension: fp32 [1] or [N]; [E, 1] or [E, N] for a stack."""
        per_row = self.global_scale.dim() == self.data.dim() - 1
        return self.global_scale if per_row else self.global_scale.unsqueeze(-1)

    def prepared(self, activation: str) -> Nvfp4Weight:
        """This weight as the kernels take it under `activation`, so that no call has to make it so. Call it after a (re)load.

        The same tensors, but for the fold that FP8 needs, and for scales that bulk copies read, see `formats.align_scale_rows`.
        """
        bulk = self.scales.dim() == 3 or hopper_serves(self.scales.device, self.shape[-1])
        scales = align_scale_rows(self.scales) if bulk else self.scales
        fold = fp8_fold(self.scales) if activation in ("fp8_per_token", "auto") else self.fp8_fold
        return replace(self, scales=scales, fp8_fold=fold)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight's values, [..., N, K] in `dtype`."""
        rows = self.data.shape[:-1]
        scale = self.row_scale().expand(rows).reshape(-1)
        flat = dequantize(
            self.data.reshape(-1, self.data.shape[-1]),
            self.scales.reshape(-1, self.scales.shape[-1]),
            scale,
            layout=2,
            dtype=dtype,
        )
        return flat.view(self.shape)


def fp8_fold(scales: torch.Tensor) -> torch.Tensor:
    """2^f for each row of e4m3 scales [..., N, K/16], fp32 [..., N]: f is the smallest integer with 6 * max(SF) * 2^-f <= 448.

    The FP8 path rounds e2m1 * SF * 2^-f to e4m3: the largest weight of a row then lies in e4m3's top binade, and small
    ones stay normal as long as they can. A row of zeros gets 1.
    """
    largest = e4m3_decode(scales.view(torch.uint8).amax(-1)) * (E2M1_MAX / E4M3_MAX)
    mantissa, exponent = torch.frexp(largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def quantize_weight(
    weight: torch.Tensor, *, scale_search: str = "mse", global_scale: torch.Tensor | float | None = None
) -> Nvfp4Weight:
    """Quantize a weight [N, K], or a stack of experts [E, N, K], to NVFP4 on its own device.

    weight: fp32, fp16 or bf16; K a multiple of 16.
    scale_search: how a block of 16 gets its scale. "absmax" takes its largest magnitude; "four_over_six" lets it fall on
        6 or on 4, whichever errs less (arXiv 2512.02010); "mse" takes the best of the nine e4m3 scales around it.
    global_scale: fp32 decode scale [] or [E] to use; by default amax / (6 * 448) of each matrix (6 * 256 but for "absmax",
        so that there are scales above).

    A matrix of zeros gets the global scale 1. Raises TypeError for another dtype, ValueError for another shape or search
    and for a weight or global scale that is not finite (this reads one number back from the device).
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, allowed is a torch.Tensor")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weight: got {weight.dtype}, allowed are float32, float16 and bfloat16")
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight: got shape {list(weight.shape)}, allowed are [N, K] and [E, N, K]")
    if weight.shape[-1] % GROUP_SIZE or not weight.shape[-1]:
        raise ValueError(f"weight: K is {weight.shape[-1]}, allowed are positive multiples of {GROUP_SIZE}")
    if scale_search not in SCALE_SEARCHES:
        raise ValueError(f"scale_search: got {scale_search!r}, allowed are {', '.join(map(repr, SCALE_SEARCHES))}")
    experts = weight.shape[:-2]
    # One reduction serves both: aminmax spreads a NaN, and its extremes are infinite where an element is.
    if weight.numel():
        low, high = torch.aminmax(weight.flatten(-2), dim=-1)
        amax = torch.maximum(high, -low).to(torch.float32)
        if not bool(amax.isfinite().all()):
            bad = (~weight.isfinite()).nonzero()
            raise ValueError(
                f"weight: {len(bad)} values are NaN or infinite, the first at {bad[0].tolist()}; only finite weights can be"
                " quantized"
            )
    else:
        amax = torch.zeros(experts, dtype=torch.float32, device=weight.device)
    if global_scale is None:
        encode_scale = torch.where(amax > 0, (SCALE_BASE[scale_search] * E2M1_MAX) / amax, 1.0)
        # amax of a subnormal matrix: its encode scale would not be finite.
        encode_scale = encode_scale.clamp(max=torch.finfo(torch.float32).max)
        decode_scale = 1.0 / encode_scale
    else:
        if isinstance(global_scale, torch.Tensor) and global_scale.device != weight.device:
            raise ValueError(f"global_scale: it is on {global_scale.device}, allowed is the weight's device {weight.device}")
        decode_scale = torch.as_tensor(global_scale, dtype=torch.float32, device=weight.device)
        if tuple(decode_scale.shape) != tuple(experts):
            if decode_scale.numel() != 1:
                raise ValueError(f"global_scale: got shape {list(decode_scale.shape)}, allowed is {list(experts)}")
            decode_scale = decode_scale.reshape(()).expand(experts).contiguous()
        if not bool((decode_scale.isfinite() & (decode_scale > 0)).all()):
            raise ValueError("global_scale: got a value that is not finite and positive, allowed are decode scales above 0")
        encode_scale = 1.0 / decode_scale
    data, scales = ops.search_scales(weight, encode_scale, scale_search)
    return Nvfp4Weight(data, scales, decode_scale)

"""How much arithmetic a step is, and how much the machine could do: the two sides of MFU.

FLOPs are counted by torch.utils.flop_counter over the model's forward and backward pass as they are run: products of
matrices, convolutions and attention, a multiply-add as two. Norms, activations and the optimizer are left out, as
everybody does who quotes an MFU (PaLM, appendix B); what activation checkpointing computes twice counts twice.
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HALF_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362.05e12),
    ("L40", 181.05e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("T4", 65e12),
    ("RTX 6000 Ada", 364.2e12),
    ("RTX A6000", 154.8e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
"""Part of a card's name -> FLOP/s of its tensor cores in bf16 (V100, T4: fp16), dense, summed in float32. NVIDIA's data
sheets of each card; where they print sparse figures, half of those. The first that fits counts."""


def count_flops(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> float:
    """FLOPs of forward and backward per sample, over images (B, 3, H, W) and tokens (B, L); gradients are dropped.

    Of both towers; the loss's own products (B x B, a thousandth) are left out, so that it does not depend on the batch.
    """
    counter = FlopCounterMode(display=False)
    # The counter knows the products that attention is made of, not every fused kernel (CPU's it does not).
    with sdpa_kernel(SDPBackend.MATH), counter:
        image, text, _ = model(images, tokens)
        (image.sum() + text.sum()).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images)


def half_peak(name: str) -> float | None:
    """FLOP/s in bf16 or fp16 that a card's maker gives; None for one that is not in the list."""
    return next((peak for part, peak in HALF_PEAKS if part.lower() in name.lower()), None)


def matmul_peak(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """FLOP/s of a large product of matrices here, the best of several: what any code of this torch can hope for."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        _finish(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak(device: torch.device, precision: str) -> dict[str, Any]:
    """The peak that MFU is a share of: the data sheet's on a GPU in half precision, else measured; both where known.

    Keys: flops_per_s and source, and measured_flops_per_s.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    measured = matmul_peak(device, dtype)
    listed = half_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" and precision != "fp32" else None
    source = "the maker's data sheet" if listed else f"a product of matrices in {precision}, measured here"
    return {"flops_per_s": listed or measured, "source": source, "measured_flops_per_s": measured}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How far a step is from what the machine can do: FLOPs against the peak, time in which a GPU waits for its host, and
the batch at which films/s stop growing.

FLOPs are counted by torch.utils.flop_counter over the model's forward and backward pass as they are run: products of
matrices, convolutions and attention, a multiply-add as two. Norms, activations and the optimizer are left out, as
everybody does who quotes an MFU (PaLM, appendix B); what activation checkpointing computes twice counts twice.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.turns import finish
from pipeline.batch import Batch

HALF_PEAKS = (
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
        finish(device)
        started = time.perf_counter()
        torch.mm(left, right)
        finish(device)
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


_STEPS = 5


def launch_seconds(run: Callable[[int], None], device: torch.device, steps: int) -> float:
    """Seconds a step that the host takes to launch it: near those of the step, the host is what it waits for."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run(steps)
    launched = time.perf_counter()
    torch.cuda.synchronize(device)
    return (launched - begin) / steps


def idle_share(run: Callable[[int], None], device: torch.device) -> float | None:
    """Share of a few steps in which no kernel and no copy ran, by torch's profiler; None where it sees no kernel."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(_STEPS)
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return gaps(spans)


def gaps(spans: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first beginning to the last end that no span covers; None where there is none."""
    ordered = sorted(spans)
    if not ordered:
        return None
    begin = reached = ordered[0][0]
    idle = 0.0
    for start, end in ordered:
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - begin) if reached > begin else None


GROWTH = 1.03
"""Doubling a batch has to bring so much."""
_LEFT_FREE = 0.25
"""Of the memory that is free before a step, a CPU's search leaves this share."""


def sized(batch: Batch, size: int) -> Batch:
    """A batch of `size` samples, those of `batch` again and again: what they show is nothing to the time of a step."""
    times = -(-size // len(batch))
    tensors = {
        name: getattr(batch, name).repeat(times, *([1] * (getattr(batch, name).ndim - 1)))[:size]
        for name in ("tokens", "labels", "samples")
    }
    images = batch.images.repeat(times, 1, 1, 1)[:size].contiguous(memory_format=torch.channels_last)
    return replace(batch, images=images, **tensors)


def search_batch(
    build: Callable[[int], Any], device: torch.device, *, first: int, largest: int, seconds: float
) -> list[dict[str, Any]]:
    """Double the batch from `first` until films/s grow by less than 3 %, memory ends, or `largest` is reached.

    A list of what was tried, {batch_size, images_per_s, ended}; `ended` says why no larger one was; empty where
    `largest` is below `first`. `build` gives a trainer for a batch size.
    """
    tried: list[dict[str, Any]] = []
    size = first
    while size <= largest:
        before = available_memory(device)
        try:
            rate, taken = _rate(build, device, size, seconds)
        except torch.OutOfMemoryError:
            if not tried:
                raise
            tried[-1]["ended"] = f"batch {size}: out of memory"
            break
        finally:
            give_back(device)
        tried.append({"batch_size": size, "images_per_s": rate, "ended": None})
        if len(tried) > 1 and rate < tried[-2]["images_per_s"] * GROWTH:
            tried[-1]["ended"] = f"batch {size}: less than {GROWTH - 1:.0%} faster than batch {size // 2}"
        elif 2 * size > largest:
            tried[-1]["ended"] = f"--largest-batch {largest}"
        elif device.type == "cpu" and 2 * taken > before * (1 - _LEFT_FREE):
            tried[-1]["ended"] = f"batch {2 * size}: memory would not do"
        if tried[-1]["ended"]:
            break
        size *= 2
    return tried


def best_batch(tried: list[dict[str, Any]]) -> int:
    """The size with the most films/s."""
    return max(tried, key=lambda found: found["images_per_s"])["batch_size"]


def _rate(build: Callable[[int], Any], device: torch.device, size: int, seconds: float) -> tuple[float, float]:
    """Films/s at a batch size, and bytes that it took."""
    before = available_memory(device)
    trainer = build(size)
    trainer.run(2)
    finish(device)
    taken = before - available_memory(device)
    steps, begin = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - begin < seconds:
        trainer.run(2)
        finish(device)
        steps += 2
    return steps * size / (time.perf_counter() - begin), taken


def give_back(device: torch.device) -> None:
    """Free what nobody refers to any more. torch keeps a GPU's memory for itself otherwise, and DALI gets none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> float:
    """Bytes that are free: the GPU's, or what the kernel says this machine can still give."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

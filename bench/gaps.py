"""Where a GPU waits for its host: launch time against run time, and the share of a step in which no kernel runs."""

import time
from collections.abc import Callable, Iterable

import torch

_STEPS = 5


def host_seconds(run: Callable[[int], None], device: torch.device, steps: int) -> tuple[float, float]:
    """Seconds a step that the host takes to launch it, and that the device takes to finish it.

    Alike, the host is what a step waits for; far apart, the device is kept busy.
    """
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run(steps)
    launched = time.perf_counter()
    torch.cuda.synchronize(device)
    return (launched - begin) / steps, (time.perf_counter() - begin) / steps


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

"""`python -m bench.scale --json F --png F`: how cost grows with samples, shards, ranks and threads.

Samples, shards: sets that exist as links to one real shard (`bench.simulate`); the first batch counts from building the
`cpu` loader in a fresh process, imports left out. And what the order is worth at that price: how far an epoch is from
random (`bench.order`).
"""

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bench.case import Task, run_child
from bench.kinds import speed
from bench.machine import bench_main, check_positive, environment
from bench.order import shuffle
from bench.simulate import write_set
from pipeline.batch import World
from pipeline.config import LoaderConfig, available_cpus, stream_count
from pipeline.order import Layout, ShuffledOrder
from shards.cli import say
from shards.errors import InputError
from shards.manifest import read_manifest

BATCH = 64
SHARD_ROWS, BLOCK_ROWS = 11_000, 190
"""Of films of 22 KB: shards of 250 MB, blocks of 4 MiB."""
MIDDLE = 42 * SHARD_ROWS
"""Samples of the set that shards, ranks and threads share: 462,000."""
FAR_EPOCH, FAR_STEP = 3, 12_345
LOCATED = 200
"""Batches located, anywhere in an epoch."""
MOST_SHARDS = 60_000
"""A file may have 65,000 links."""
SECONDS = 3.0
"""Measured stretch of each number of threads in each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Measure how start, memory, reads and films/s grow with samples, shards, ranks and threads, on simulated sets."""

    samples: tuple[int, ...] = (4_000, 44_000, 462_000, 4_620_000, 100_001_000)
    """Sizes of the sets; multiples of 11,000 rows a shard, or one shard."""
    shards: tuple[int, ...] = (42, 462, 4_620, 46_200)
    """Numbers of shards of a set of 462,000 samples."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of ranks that share an epoch of such a set."""
    threads: tuple[int, ...] = ()
    """Numbers of decoding threads; none: powers of two up to the CPUs, and these."""
    rounds: int = 3
    """Fresh processes for each first batch, and rounds of the threads; medians are taken."""
    out: Path | None = None
    """Folder for the simulated sets, 250 MB, removed afterwards; the system's for temporary files when not given."""
    json: Path | None = None
    """Where the results go, as JSON."""
    png: Path | None = None
    """Where the plots go."""

    def __post_init__(self) -> None:
        check_positive(self, "samples", "shards", "ranks", "threads", "rounds")
        for samples, shards in self.sets:
            if samples % shards or shards > MOST_SHARDS:
                raise InputError(
                    f"{samples:,} samples do not make {shards:,} equal shards, or those are over {MOST_SHARDS:,}; "
                    f"--samples takes up to {SHARD_ROWS:,}, or a multiple of it"
                )

    @property
    def sets(self) -> list[tuple[int, int]]:
        """Samples and shards of each set: those of --samples, then those of --shards."""
        sized = [(samples, max(1, -(-samples // SHARD_ROWS))) for samples in self.samples]
        return sized + [(MIDDLE, shards) for shards in self.shards]


def run_bench(config: ScaleConfig) -> dict[str, Any]:
    rows = [measure_set(samples, shards, config) for samples, shards in config.sets]
    layout = Layout((SHARD_ROWS,) * (MIDDLE // SHARD_ROWS), BLOCK_ROWS)
    result = {
        "bench": "scale",
        "environment": environment(),
        "settings": {"batch_size": BATCH, "rounds": config.rounds, "seconds": SECONDS, "films": "made up"},
        "samples": rows[: len(config.samples)],
        "shards": rows[len(config.samples) :],
        "ranks": [measure_ranks(layout, ranks) for ranks in config.ranks],
        "shuffle": shuffle(ShuffledOrder(layout, seed=0, streams=48), SHARD_ROWS, BLOCK_ROWS, BATCH),
        "cases": measure_threads(config),
    }
    return result | {"verdict": verdict(result)}


def measure_set(samples: int, shards: int, config: ScaleConfig) -> dict[str, Any]:
    """Start, memory and locating of one set."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=config.out) as name:
        root = Path(name)
        write_set(root, samples, shards)
        task = Task(loader="cpu", shards=str(root), batch_size=BATCH, seconds=1e-3)
        firsts = [run_child(task)["first_batch_s"] for _ in range(config.rounds)]  # in processes that did nothing yet
        manifest_s, manifest = _timed(lambda: read_manifest(root))
        manifest_bytes = (root / "manifest.json").stat().st_size
    row = {"samples": samples, "shards": shards, "block_rows": manifest.block_rows, "manifest_bytes": manifest_bytes}
    row |= {"first_batch_s": statistics.median(firsts), "first_batches_s": firsts, "manifest_s": manifest_s}
    row |= measure_order(lambda: Layout(tuple(shard.rows for shard in manifest.splits["train"]), manifest.block_rows))
    say(f"{samples:>11,} samples, {shards:>6,} shards: first batch {row['first_batch_s']:6.3f} s")
    return row


def measure_order(make_layout: Callable[[], Layout]) -> dict[str, Any]:
    """Seconds and bytes until a batch far into a run is located and its first visit planned; then of any batch."""

    def begin() -> ShuffledOrder:
        layout = make_layout()
        order = ShuffledOrder(layout, seed=0, streams=48)
        position = FAR_EPOCH * layout.samples + FAR_STEP * BATCH
        order.locate(np.arange(position, position + BATCH))
        next(order.visits(position, World(rank=1, size=8)))
        return order

    seconds, order = _timed(begin)
    tracemalloc.start()
    kept_order = begin()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept_order
    steps = np.random.default_rng(0).integers(0, order.samples // BATCH, LOCATED) * BATCH
    started = time.perf_counter()
    for position in steps.tolist():
        order.locate(np.arange(position, position + BATCH))
    located = (time.perf_counter() - started) / LOCATED
    sizes = {"blocks": order.layout.blocks, "kept_bytes": kept, "peak_bytes": peak}
    return {**sizes, "order_s": seconds, "locate_us": located * 1e6}


def _timed(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Median of several, and the last result."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), found


def measure_ranks(layout: Layout, ranks: int) -> dict[str, Any]:
    """Block reads of an epoch over all ranks, the bound, and the time to plan one."""
    streams = stream_count(LoaderConfig(shards=Path(), batch_size=ranks), World(size=ranks))
    order = ShuffledOrder(layout, seed=0, streams=streams)
    order.locate(np.zeros(1, dtype=np.int64))
    started = time.perf_counter()
    visits = (order.visits(0, World(rank=rank, size=ranks)) for rank in range(ranks))
    reads = sum(1 for each in visits for _ in takewhile(lambda visit: visit.first < order.samples, each))
    taken, blocks = time.perf_counter() - started, layout.blocks
    row = {"ranks": ranks, "streams": streams, "reads": reads, "blocks": blocks, "bound": blocks + streams - 1}
    return {**row, "ratio": reads / blocks, "plan_us": taken / reads * 1e6}


def measure_threads(config: ScaleConfig) -> list[dict[str, Any]]:
    """Films/s of the `cpu` loader by its threads, each number once a round."""
    counts = config.threads or thread_counts(available_cpus())
    rounds: dict[int, list[dict[str, Any]]] = {threads: [] for threads in counts}
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=config.out) as name:
        write_set(Path(name), MIDDLE, MIDDLE // SHARD_ROWS)
        for _ in range(config.rounds):
            for threads in counts:
                task = Task(loader="cpu", shards=name, threads=threads, warmup_batches=8, seconds=SECONDS)
                rounds[threads].append(run_child(task))
    return [
        {
            "name": f"{threads} thread" + "s" * (threads > 1),
            "threads": threads,
            **speed([each["images_per_s"] for each in found]),
            "rounds": found,
        }
        for threads, found in rounds.items()
    ]


def thread_counts(cpus: int) -> tuple[int, ...]:
    """Powers of two below the CPUs, and their number."""
    return (*(2**power for power in range(cpus.bit_length()) if 2**power < cpus), cpus)


def verdict(result: dict[str, Any]) -> str:
    """What a larger set, more ranks and more threads cost or bring, in a sentence."""
    told = []
    if rows := sorted(result["samples"], key=lambda row: row["samples"]):
        starts = (f"{row['first_batch_s']:.2f} s with {row['samples']:,} samples" for row in (rows[0], rows[-1]))
        told.append(
            f"first batch after {' and '.join(starts)}, whose order takes {rows[-1]['kept_bytes'] / 1e6:.1f} MB"
        )
    if rows := result["ranks"]:
        most = max(rows, key=lambda row: row["ranks"])
        told.append(f"{most['ranks']} ranks read each block {most['ratio']:.2f} times an epoch, together")
    if len(rows := result["cases"]) > 1:
        gain = rows[-1]["images_per_s"] / rows[0]["images_per_s"]
        told.append(f"{rows[-1]['name']} give {gain:.2f}x the films/s of {rows[0]['name']}")
    return "; ".join(told)


def run_and_draw(config: ScaleConfig) -> dict[str, Any]:
    """And the plots, where asked for."""
    from bench.plots import draw, scale_panels
    from shards.atomic import check_writable, write_atomic

    if config.png:
        check_writable(config.png)
    result = run_bench(config)
    if config.png:
        panels = [panel for panel in scale_panels(result) if panel is not None]
        write_atomic(config.png, draw(panels, "png", columns=2))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    bench_main("bench.scale", ScaleConfig, argv, run_and_draw)


if __name__ == "__main__":
    main()

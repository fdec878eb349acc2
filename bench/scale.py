"""`python -m bench.scale --json F --png F`: how cost grows with samples, shards, ranks and threads.

Samples, shards: sets that exist as links to one real shard (`bench.simulate`): time from building the `cpu` loader to
its first batch, in a fresh process, imports not counted; of it the manifest and the order; memory of the order; time to
say where a batch lies, somewhere in the run. Ranks: block reads of an epoch, all ranks together. Threads: films/s.
"""

import json
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
from bench.processes import bench_guard
from bench.simulate import write_set
from pipeline.batch import World
from pipeline.config import LoaderConfig, available_cpus, stream_count
from pipeline.order import Layout, ShuffledOrder
from pipeline.selection import RowBits
from shards.cli import parse, say
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
    seconds: float = 3.0
    """Measured stretch of each number of threads in each round."""
    out: Path | None = None
    """Folder for the simulated sets, 250 MB, removed afterwards; the system's for temporary files when not given."""
    json: Path | None = None
    """Where the results go, as JSON."""
    png: Path | None = None
    """Where the plots go."""

    def __post_init__(self) -> None:
        for name in ("samples", "shards", "ranks", "threads"):
            if any(value < 1 for value in getattr(self, name)):
                raise InputError(f"--{name} {' '.join(map(str, getattr(self, name)))} has to be of numbers above 0")
        if self.rounds < 1 or not 0 < self.seconds < 1e6:
            raise InputError(f"--rounds {self.rounds} and --seconds {self.seconds} have to be above 0")
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
    """Measure everything; the result is what `--json` writes."""
    from bench.machine import environment

    rows = [measure_set(samples, shards, config) for samples, shards in config.sets]
    cut = len(config.samples)
    layout = Layout((SHARD_ROWS,) * (MIDDLE // SHARD_ROWS), BLOCK_ROWS)
    return {
        "bench": "scale",
        "environment": environment(),
        "settings": {"batch_size": BATCH, "rounds": config.rounds, "seconds": config.seconds, "films": "made up"},
        "samples": [*rows[:cut], *(selected_row(*each) for each in config.sets[:cut])],
        "shards": rows[cut:],
        "ranks": [measure_ranks(layout, ranks) for ranks in config.ranks],
        "cases": measure_threads(config),
    }


def measure_set(samples: int, shards: int, config: ScaleConfig) -> dict[str, Any]:
    """Start, memory and locating of one set."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=config.out) as name:
        root = Path(name)
        write_set(root, samples, shards)
        firsts = [first_batch(root) for _ in range(config.rounds)]
        manifest_s, manifest = _timed(lambda: read_manifest(root))
        manifest_bytes = (root / "manifest.json").stat().st_size
    row = {"samples": samples, "shards": shards, "block_rows": manifest.block_rows, "manifest_bytes": manifest_bytes}
    row |= {"first_batch_s": statistics.median(firsts), "first_batches_s": firsts, "manifest_s": manifest_s}
    row |= measure_order(lambda: Layout(tuple(shard.rows for shard in manifest.splits["train"]), manifest.block_rows))
    say(
        f"{samples:>11,} samples, {shards:>6,} shards: first batch {row['first_batch_s']:6.3f} s, of it manifest "
        f"{manifest_s:6.3f} s, order {row['order_s']:6.3f} s; order {row['kept_bytes'] / 1e6:6.2f} MB, at most "
        f"{row['peak_bytes'] / 1e6:6.2f} MB; a batch located in {row['locate_us']:4.0f} us"
    )
    return row


def first_batch(root: Path) -> float:
    """Seconds from building the loader to its first batch, in a process that has done nothing before."""
    return run_child(Task(loader="cpu", shards=str(root), batch_size=BATCH, seconds=1e-3))["first_batch_s"]


def selected_row(samples: int, shards: int) -> dict[str, Any]:
    """The order alone, where two rows of three are selected."""
    rows = samples // shards
    mask = np.packbits(np.arange(rows) % 3 > 0)
    bits = RowBits(mask.copy() for _ in range(shards))
    found = measure_order(lambda: Layout((rows,) * shards, BLOCK_ROWS, bits))
    return {"samples": samples, "shards": shards, "selected_share": 2 / 3, "selection_bytes": bits.nbytes, **found}


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
    return {
        "selected": order.samples,
        "blocks": order.layout.blocks,
        "order_s": seconds,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "locate_us": located * 1e6,
    }


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
    reads = sum(_visits(order, World(rank=rank, size=ranks)) for rank in range(ranks))
    taken = time.perf_counter() - started
    blocks, bound = layout.blocks, layout.blocks + streams - 1
    say(f"{ranks:>3} ranks, {streams} streams: {reads:,} reads of {blocks:,} blocks, {bound:,} is the bound")
    return {
        "ranks": ranks,
        "streams": streams,
        "reads": reads,
        "blocks": blocks,
        "bound": bound,
        "ratio": reads / blocks,
        "plan_us": taken / reads * 1e6,
    }


def _visits(order: ShuffledOrder, world: World) -> int:
    return sum(1 for _ in takewhile(lambda visit: visit.first < order.samples, order.visits(0, world)))


def measure_threads(config: ScaleConfig) -> list[dict[str, Any]]:
    """Films/s of the `cpu` loader by its threads, each number once a round."""
    counts = config.threads or thread_counts(available_cpus())
    rounds: dict[int, list[dict[str, Any]]] = {threads: [] for threads in counts}
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=config.out) as name:
        write_set(Path(name), MIDDLE, MIDDLE // SHARD_ROWS)
        for _ in range(config.rounds):
            for threads in counts:
                task = Task(loader="cpu", shards=name, threads=threads, warmup_batches=8, seconds=config.seconds)
                rounds[threads].append(run_child(task))
    cases = [_thread_case(threads, found) for threads, found in rounds.items()]
    for case in cases:
        say(f"{case['name']}: {case['images_per_s']:,.0f} films/s")
    return cases


def thread_counts(cpus: int) -> tuple[int, ...]:
    """Powers of two below the CPUs, and their number."""
    return (*(2**power for power in range(cpus.bit_length()) if 2**power < cpus), cpus)


def _thread_case(threads: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    rate = statistics.median(each["images_per_s"] for each in rounds)
    name = f"{threads} thread" + "s" * (threads > 1)
    return {"name": name, "threads": threads, "images_per_s": rate, "rounds": rounds}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says. Exit code 2 for a user's mistake."""
    with bench_guard("bench.scale"):
        config = parse(ScaleConfig, argv, prog="python -m bench.scale")
        from bench.plots import draw, scale_panels
        from shards.atomic import check_writable, write_atomic

        for path in filter(None, (config.json, config.png)):
            check_writable(path)
        result = run_bench(config)
        if config.json:
            write_atomic(config.json, (json.dumps(result, indent=1) + "\n").encode())
        if config.png:
            panels = [panel for panel in scale_panels(result) if panel is not None]
            write_atomic(config.png, draw(panels, "png", columns=2))


if __name__ == "__main__":
    main()

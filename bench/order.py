"""`python -m bench.order --json F`: what the order of DESIGN.md costs and how well it shuffles. Reads no shards.

Time and memory to the first batch of a simulated set of 462,000 and of 100 million samples, all of them and two thirds
selected; blocks read in an epoch by 1 to 8 ranks; and, for the smaller set, how far one epoch is from random.
"""

import itertools
import json
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.environment import environment
from pipeline.batch import World
from pipeline.order import Layout, ShuffledOrder
from pipeline.selection import RowBits
from shards.atomic import write_atomic
from shards.cli import main_guard, parse, say
from shards.counter import permutation

SHARD_ROWS, BLOCK_ROWS, BATCH = 10_000, 190, 64
"""Of CheXpert-Plus and ReXGradient at JPEG q95: 22 KB a film, blocks of 4 MiB."""
FAR_EPOCH, FAR_STEP = 3, 12_345
LAGS = (1, 2, 3, 7, 16, 47, 48)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderBenchConfig:
    """Measure the order of samples: start, memory, block reads, quality of the shuffle."""

    json: Path | None = None
    """Where the results go, as JSON."""
    samples: tuple[int, ...] = (460_000, 100_000_000)
    """Sizes of the simulated sets; reads and shuffle are taken from the first."""
    streams: int = 48
    """Streams of the order."""
    seed: int = 0
    """Seed of the order."""


def run_bench(config: OrderBenchConfig) -> dict[str, Any]:
    """Measure everything; the result is what `--json` writes."""
    starts = [start(samples, selected, config) for samples in config.samples for selected in (False, True)]
    layout = Layout((SHARD_ROWS,) * (config.samples[0] // SHARD_ROWS), BLOCK_ROWS)
    order = ShuffledOrder(layout, seed=config.seed, streams=config.streams)
    return {
        "environment": environment(),
        "settings": {"shard_rows": SHARD_ROWS, "block_rows": BLOCK_ROWS, "batch": BATCH, "streams": config.streams},
        "start": starts,
        "reads": [reads(order, ranks) for ranks in (1, 2, 4, 8)],
        "shuffle": shuffle(order),
    }


def start(samples: int, selected: bool, config: OrderBenchConfig) -> dict[str, Any]:
    """Seconds and bytes until a batch far into a run is located and its first visit planned."""
    shards = samples // SHARD_ROWS
    mask = np.packbits(np.arange(SHARD_ROWS) % 3 > 0)
    bits = RowBits(mask.copy() for _ in range(shards)) if selected else None

    def first_batch() -> ShuffledOrder:
        layout = Layout((SHARD_ROWS,) * shards, BLOCK_ROWS, bits)
        order = ShuffledOrder(layout, seed=config.seed, streams=config.streams)
        position = FAR_EPOCH * layout.samples + FAR_STEP * BATCH
        order.locate(np.arange(position, position + BATCH))
        next(order.visits(position, World(rank=1, size=8)))
        return order

    begin = time.perf_counter()
    blocks = first_batch().layout.blocks
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    order = first_batch()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = {
        "samples": shards * SHARD_ROWS,
        "selected": order.samples,
        "blocks": blocks,
        "seconds": round(seconds, 4),
        "kept_bytes": kept,
        "peak_bytes": peak,
        "selection_bytes": bits.nbytes if bits else 0,
    }
    say(
        f"{result['samples']:>11,} samples, {result['selected']:>11,} used: {seconds:6.3f} s, "
        f"{kept / 1e6:6.2f} MB kept, {peak / 1e6:6.2f} MB at most, {result['selection_bytes'] / 1e6:6.2f} MB of bits"
    )
    return result


def reads(order: ShuffledOrder, ranks: int) -> dict[str, Any]:
    """Block reads of an epoch over all ranks, and the bound."""
    count = 0
    for rank in range(ranks):
        visits = order.visits(0, World(rank=rank, size=ranks))
        count += sum(1 for _ in itertools.takewhile(lambda visit: visit.first < order.samples, visits))
    blocks, bound = order.layout.blocks, order.layout.blocks + order.streams - 1
    say(f"{ranks} ranks: {count:,} reads of {blocks:,} blocks, {bound:,} is the bound")
    return {"ranks": ranks, "reads": count, "blocks": blocks, "bound": bound, "ratio": round(count / blocks, 5)}


def shuffle(order: ShuffledOrder) -> dict[str, Any]:
    """How far epoch 0 is from random order; each figure beside what a perfect shuffle would give."""
    n = order.samples // BATCH * BATCH
    rows = [_rows(order, epoch) for epoch in range(2)]
    # Ingest writes the shards in the order of a global shuffle: what a stored row was in the source.
    source = permutation(order.samples, 1)
    batches = np.arange(n) // BATCH
    same_block = _same_pairs(batches, rows[0][:n] // SHARD_ROWS * 1000 + rows[0][:n] % SHARD_ROWS // BLOCK_ROWS)
    result = {
        "distance": round(float(np.abs(rows[0] - np.arange(len(rows[0]))).mean()) / order.samples, 4),
        "distance_random": round(1 / 3, 4),
        "batch_pairs_of_a_block": round(same_block, 6),
        "batch_pairs_of_a_block_random": round((BLOCK_ROWS - 1) / (order.samples - 1), 6),
        "pairs_met_again": round(_same_pairs(_when(rows[0]) // BATCH, _when(rows[1]) // BATCH), 6),
        "pairs_met_again_random": round((BATCH - 1) / (order.samples - 1), 6),
        "autocorrelation_stored": {lag: _correlation(rows[0], lag) for lag in LAGS},
        "autocorrelation_source": {lag: _correlation(source[rows[0]], lag) for lag in LAGS},
        "autocorrelation_noise": round(order.samples**-0.5, 4),
    }
    for name, value in result.items():
        say(f"{name}: {value}")
    return result


def _rows(order: ShuffledOrder, epoch: int) -> NDArray[np.int64]:
    """Stored rows, counted through the split, in the order of an epoch."""
    places = order.locate(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
    return places.shard * SHARD_ROWS + places.row


def _when(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each stored row in its epoch."""
    return np.argsort(rows)


def _same_pairs(one: NDArray[np.int64], two: NDArray[np.int64]) -> float:
    """Of the pairs that share a value of `one`, the share that also share that of `two`."""
    together = np.unique(one * (int(two.max()) + 1) + two, return_counts=True)[1]
    apart = np.unique(one, return_counts=True)[1]
    return float((together * (together - 1)).sum() / (apart * (apart - 1)).sum())


def _correlation(values: NDArray[np.int64], lag: int) -> float:
    return round(float(np.corrcoef(values[:-lag], values[lag:])[0, 1]), 4)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says. Exit code 2 for a user's mistake."""
    with main_guard("bench.order"):
        config = parse(OrderBenchConfig, argv, prog="bench.order")
        result = run_bench(config)
        if config.json:
            write_atomic(config.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

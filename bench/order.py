"""`python -m bench.order --json F`: how well the order of DESIGN.md shuffles. Reads no shards; `bench.scale` has costs.

How far one epoch of a simulated set is from random, each figure beside what a perfect shuffle would give.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine import environment
from pipeline.order import Layout, ShuffledOrder
from shards.atomic import write_atomic
from shards.cli import main_guard, parse, say
from shards.counter import permutation
from shards.errors import InputError

SHARD_ROWS, BLOCK_ROWS, BATCH = 10_000, 190, 64
"""Of CheXpert-Plus and ReXGradient at JPEG q95: 22 KB a film, blocks of 4 MiB."""
LAGS = (1, 2, 3, 7, 16, 47, 48)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderBenchConfig:
    """Measure how far the order of samples is from random."""

    json: Path | None = None
    """Where the results go, as JSON."""
    samples: int = 460_000
    """Size of the simulated set, a multiple of 10,000."""
    streams: int = 48
    """Streams of the order."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        if self.samples < SHARD_ROWS or self.samples % SHARD_ROWS or self.streams < 1:
            wanted = f"a multiple of {SHARD_ROWS:,}, --streams at least 1"
            raise InputError(f"--samples {self.samples} has to be {wanted}; --streams is {self.streams}")


def run_bench(config: OrderBenchConfig) -> dict[str, Any]:
    """Measure everything; the result is what `--json` writes."""
    layout = Layout((SHARD_ROWS,) * (config.samples // SHARD_ROWS), BLOCK_ROWS)
    order = ShuffledOrder(layout, seed=config.seed, streams=config.streams)
    settings = {"samples": config.samples, "shard_rows": SHARD_ROWS, "block_rows": BLOCK_ROWS, "batch": BATCH}
    return {
        "bench": "order",
        "environment": environment(),
        "settings": settings | {"streams": config.streams},
        "shuffle": shuffle(order),
    }


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

"""How far one epoch of the order of DESIGN.md is from random, each figure beside what a perfect shuffle would give."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.order import ShuffledOrder
from shards.counter import permutation

LAGS = (1, 2, 3, 7, 16, 47, 48)


def shuffle(order: ShuffledOrder, shard_rows: int, block_rows: int, batch: int) -> dict[str, Any]:
    """Of epoch 0, and of what it shares with the next; shards are equal ones of so many rows."""
    n = order.samples // batch * batch
    rows = [_rows(order, epoch, shard_rows) for epoch in range(2)]
    # Ingest writes the shards in the order of a global shuffle: what a stored row was in the source.
    source = permutation(order.samples, 1)
    batches = np.arange(n) // batch
    same_block = _same_pairs(batches, rows[0][:n] // shard_rows * shard_rows + rows[0][:n] % shard_rows // block_rows)
    return {
        "distance": round(float(np.abs(rows[0] - np.arange(len(rows[0]))).mean()) / order.samples, 4),
        "distance_random": round(1 / 3, 4),
        "batch_pairs_of_a_block": round(same_block, 6),
        "batch_pairs_of_a_block_random": round((block_rows - 1) / (order.samples - 1), 6),
        "pairs_met_again": round(_same_pairs(_when(rows[0]) // batch, _when(rows[1]) // batch), 6),
        "pairs_met_again_random": round((batch - 1) / (order.samples - 1), 6),
        "autocorrelation_stored": {lag: _correlation(rows[0], lag) for lag in LAGS},
        "autocorrelation_source": {lag: _correlation(source[rows[0]], lag) for lag in LAGS},
        "autocorrelation_noise": round(order.samples**-0.5, 4),
    }


def _rows(order: ShuffledOrder, epoch: int, shard_rows: int) -> NDArray[np.int64]:
    """Stored rows, counted through the split, in the order of an epoch."""
    places = order.locate(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
    return places.shard * shard_rows + places.row


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

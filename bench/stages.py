"""Where the `cpu` backend's time goes: what each stage takes of a core for a film, and what the loader's threads take.

    alone, one after the other, on one core: fetch (preadv, page cache) -> verify (xxh3) -> rows (Parquet) ->
        plan (order, crops, flips) -> decode -> resize and normalise (one pass)
    in the loader: CPU time of its threads by kind, and of all together

The rest is handing over, queues, waiting for the interpreter's lock, and what two cores lose to each other.
"""

import itertools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from bench.kernels import least_us, parts, read_films, thread_times
from pipeline.augment import DECIDED, decide
from pipeline.batch import World
from pipeline.config import LoaderConfig, stream_count
from pipeline.loader import make_order
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import Manifest


def stages(config: LoaderConfig, seconds: float) -> dict[str, float]:
    """CPU microseconds a film. `seconds` is how long each stage is measured, at most; the threads three times that."""
    manifest = read_manifest(config.shards)
    first = {"fetch_us": _fetch, "verify_us": _verify, "rows_us": _rows, "plan_us": _plan}
    alone = {name: stage(config, manifest, seconds) for name, stage in first.items()} | parts(config, seconds)
    threads = thread_times(config, 3 * seconds)
    threads = {{"decode_us": "decoders_us"}.get(name, name): spent for name, spent in threads.items()}
    total = sum(threads.values())
    return alone | threads | {"all_threads_us": total, "rest_us": total - sum(alone.values())}


def _fetch(config: LoaderConfig, manifest: Manifest, seconds: float) -> float:
    """Blocks of the first shard, in turn, into one buffer, as `pipeline.visits` does it."""
    info = manifest.splits[config.split][0]
    with ShardReader(Path(config.shards), manifest, info) as reader:
        spans = [_span(reader, block) for block in range(reader.blocks)]
        buffer = np.empty(max(size for _, size, _ in spans), dtype=np.uint8)
        turn = itertools.cycle(spans)

        def fetch() -> int:
            offset, size, films = next(turn)
            os.preadv(reader.fd, [buffer.data[:size]], offset)
            return films

        return least_us(fetch, seconds)


def _span(reader: ShardReader, block: int) -> tuple[int, int, int]:
    """Offset, bytes and films of a block."""
    rows = reader.read_rows(block)
    begin = int(rows.offset[0])
    return begin, int(rows.offset[-1] + rows.size[-1]) - begin, len(rows)


def _verify(config: LoaderConfig, manifest: Manifest, seconds: float) -> float:
    films: list[NDArray[np.uint8]] = read_films(Path(config.shards), manifest, config.split)
    turn = itertools.cycle(films)

    def verify() -> int:
        xxh3_64_intdigest(next(turn).data)
        return 1

    return least_us(verify, seconds)


def _rows(config: LoaderConfig, manifest: Manifest, seconds: float) -> float:
    """Each time from the file; a set of up to `handles.ROWS_KEPT` rows pays it in the first epoch only."""
    info = manifest.splits[config.split][0]
    with ShardReader(Path(config.shards), manifest, info) as reader:
        turn = itertools.cycle(range(reader.blocks))
        return least_us(lambda: len(reader.read_rows(next(turn))), seconds)


def _plan(config: LoaderConfig, manifest: Manifest, seconds: float) -> float:
    """Visits, and what becomes of their films, a stretch of them at a time as in `pipeline.augment`."""
    visits = make_order(config, [manifest], stream_count(config, World())).visits(0, World())

    def plan() -> int:
        films = 0
        while films < DECIDED:
            films += len(next(visits).rows)
        decide(config, manifest, np.arange(films), np.zeros(films, dtype=bool))
        return films

    return least_us(plan, seconds)

"""What the tables of a data set know of the rows that a loader embeds: whose film it is, and which report."""

from functools import partial

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.config import LoaderConfig
from pipeline.loader import make_layout
from pipeline.order import Layout
from pipeline.read import ReadStats, retried
from pipeline.selection import scan_shards
from shards.reader import Rows, ShardReader
from shards.schema import Manifest, ShardInfo
from train.scores import Ints


def read_identity(loader: LoaderConfig, manifest: Manifest) -> tuple[Ints, NDArray[np.uint64]]:
    """Patient (N,), NO_GROUP where unknown, and a digest of the report (N,), in the order of a loader of mode `eval`.

    Reports are equal where their tokens are: that is all a model sees of them.
    """
    layout = make_layout(loader, manifest)
    shards = manifest.splits[loader.split]
    numbers = {info.name: number for number, info in enumerate(shards)}

    def scan(info: ShardInfo) -> list[tuple[Ints, NDArray[np.uint64]]]:
        stats = ReadStats()
        with retried(lambda: ShardReader(loader.shards, manifest, info), stats) as reader:
            return [
                _of_block(retried(partial(reader.read_rows, block), stats), layout, numbers[info.name], block)
                for block in range(reader.blocks)
            ]

    groups, reports = zip(*(part for parts in scan_shards(shards, scan) for part in parts), strict=True)
    return np.concatenate(groups), np.concatenate(reports)


def _of_block(rows: Rows, layout: Layout, shard: int, block: int) -> tuple[Ints, NDArray[np.uint64]]:
    chosen = layout.chosen_of(shard, block)
    digests = [xxh3_64_intdigest(tokens.tobytes()) for tokens in rows.tokens[chosen]]
    return rows.group[chosen].astype(np.int64), np.array(digests, np.uint64)

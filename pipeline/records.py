"""What is known of samples, one record each: made once of a block, then copied in one go wherever samples go."""

import numpy as np
from numpy.typing import NDArray

from shards.reader import Rows
from shards.schema import Manifest, sample_key

Records = NDArray[np.void]
"""(n,) of `record_type`."""


def record_type(manifest: Manifest) -> np.dtype:
    """Fields of a record; of a block's records, `shard`, `planned` and `address` say nothing yet."""
    return np.dtype(
        [
            ("shard", np.int64),  # number in the split, or in the mixture
            ("row", np.int64),  # in the shard
            ("planned", np.int64),  # row that the order names; not `row` where that one is bad
            ("source", np.int64),  # with the next: the opaque key
            ("source_row", np.int64),
            ("offset", np.int64),  # first byte of the image in the tar
            ("address", np.int64),  # and in memory
            ("size", np.int64),  # bytes of the image
            ("xxh3", np.uint64),  # of them
            ("token_count", np.int64),
            ("side_words", np.bool_),
            ("labels", np.float32, (len(manifest.labels),)),
            ("tokens", np.uint16, (manifest.tokenizer.context,)),
        ],
        align=True,
    )


def block_records(rows: Rows, manifest: Manifest, first: int) -> Records:
    """Records of a block's rows, of which the first is row `first` of its shard."""
    records = np.zeros(len(rows), dtype=record_type(manifest))
    records["row"] = first + np.arange(len(rows))
    for name in ("source", "source_row", "offset", "size", "xxh3", "token_count", "side_words", "labels", "tokens"):
        records[name] = getattr(rows, name)
    return records


def key_of(record: np.void) -> str:
    """A sample's opaque key."""
    return sample_key(int(record["source"]), int(record["source_row"]))

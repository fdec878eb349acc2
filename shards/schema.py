"""Names, types and constants of the shard format, version 1. `FORMAT.md` shows the bytes; nothing here does I/O.

A data set is a folder: `manifest.json`, `rejects.csv`, and for every shard a trio `NAME.tar`, `NAME.idx`,
`NAME.parquet` with NAME = `{split}-{number:06d}`.
"""

import math
from dataclasses import dataclass, field

import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.csv"
REPORT_NAME, REPORT_PAGE_NAME = "report.json", "report.txt"
"""What the ingest found, for people and programs; no tool of ours reads it."""
INPUTS_NAME = "ingest.json"
"""What it was made of: settings, digests of the CSV files, size and time of the HDF5 files. Of interest to ingest."""
SPLITS = ("train", "val", "test")

CODEC_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "jpeg2k": "jp2", "raw": "raw"}
"""Image codec -> extension of the image's member in the tar."""

NO_GROUP = -1
"""The group number of a sample whose source names none."""

LABEL_PREFIX = "label:"
"""Label columns carry this prefix in Parquet, so that no label can shadow a column of ours."""

TARGET_BLOCK_BYTES = 4 << 20
MINIMUM_BLOCKS = 1000
MINIMUM_BLOCK_ROWS = 16
"""A block is about 4 MiB, and small enough that a set has 1,000 blocks, but never under 16 rows: reading a row group
costs 0.55 ms whatever it holds (pyarrow 26, one EPYC core: 550 us a sample at 1 row, 48 at 16, 19 at 128)."""

SAMPLE_OVERHEAD = 2500
"""Bytes a sample takes in the tar beside its image, about: three headers, report, labels, padding."""

MAX_BLOCK_ROWS = 1 << 16
MAX_BLOCK_TEXT_BYTES = 128 << 20
MAX_BLOCKS = 1 << 21
MAX_IMAGE_PIXELS = 1 << 24
MAX_IMAGE_SIDE = 16_383  # WebP's; the other codecs take more
MAX_CONTEXT = 4096
MAX_LABELS = 1000
MAX_SOURCE_ROWS = 10**10
"""What no data set of ours exceeds. A set may come from anywhere, and a lie beyond these must not fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """What every image of a data set looks like."""

    height: int = 320
    """Rows of pixels."""
    width: int = 320
    """Columns of pixels."""
    channels: int = 1
    """1 (grey) or 3 (RGB)."""
    codec: str = "jpeg"
    """A key of CODEC_EXTENSIONS."""
    quality: int = 95
    """JPEG quality, 1 to 100."""

    def __post_init__(self) -> None:
        if self.codec not in CODEC_EXTENSIONS:
            raise ValueError(f"unknown codec {self.codec!r}; valid: {', '.join(CODEC_EXTENSIONS)}")
        pixels = self.height * self.width
        if min(self.height, self.width) < 1 or self.channels not in (1, 3) or not 1 <= self.quality <= 100:
            raise ValueError(f"impossible image spec {self}")
        if not isinstance(pixels, int) or pixels > MAX_IMAGE_PIXELS or max(self.height, self.width) > MAX_IMAGE_SIDE:
            raise ValueError(
                f"images of {self.height} x {self.width}; {MAX_IMAGE_PIXELS:,} pixels and sides of {MAX_IMAGE_SIDE:,} "
                "are the most"
            )

    @property
    def extension(self) -> str:
        """Extension of the image's member in the tar, without a dot."""
        return CODEC_EXTENSIONS[self.codec]

    @property
    def max_bytes(self) -> int:
        """More than any encoder makes of such an image."""
        return 2 * self.height * self.width * self.channels + (64 << 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec:
    """Which tokenizer made the token columns."""

    name: str
    """Name of the tokenizer, e.g. `clip-bpe`."""
    digest: str
    """xxh3-128 of its vocabulary, 32 hex digits."""
    context: int
    """Tokens a report is cut or padded to."""
    vocab_size: int
    """Number of token ids; at most 65,536, for they are stored as uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """One source of samples, without its path."""

    kind: str
    """`hdf5` or `images`."""
    rows: int
    """Rows in the source."""
    samples: int
    """Rows that became samples."""
    digest: str
    """xxh3-128 over the pixels of all rows in source order, 32 hex digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """Size in bytes and xxh3-128 (32 hex digits) of one file."""

    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard as the manifest holds it to account."""

    name: str
    """`{split}-{number:06d}`, the stem of its three files."""
    rows: int
    """Samples in it."""
    tar: FileInfo
    idx: FileInfo
    parquet: FileInfo
    footer_bytes: int
    """Bytes of the Parquet footer, its length word and magic included."""
    footer_xxh3: str
    """xxh3-128 of those bytes: binds the page offsets to the manifest without reading the whole file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a data set is: read it before anything else."""

    schema_version: int
    image: ImageSpec
    tokenizer: TokenizerSpec
    labels: tuple[str, ...]
    """Names of the label columns, in order."""
    block_rows: int
    """Rows in a block; the last block of a shard may be short."""
    seed: int
    """Seed of the split and of the global shuffle."""
    sources: tuple[SourceInfo, ...]
    splits: dict[str, tuple[ShardInfo, ...]]
    """Split name -> its shards, in the order of their numbers. A split without samples is absent."""
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Split name -> its half-open range of group numbers. Ranges do not overlap, so a sample whose group lies outside
    its split's range is a leak, seen without a table. Empty where the source has no groups."""
    digest: str = ""
    """xxh3-128 of the manifest's bytes as read or written, 32 hex digits; not stored in them."""

    @property
    def samples(self) -> int:
        """Number of samples in all splits."""
        return sum(map(self.rows, self.splits))

    def rows(self, split: str) -> int:
        """Number of samples in a split; 0 where it is absent."""
        return sum(shard.rows for shard in self.splits.get(split, ()))


def block_rows_for(samples: int, mean_bytes: float) -> int:
    """Rows in a block of a set with so many samples whose images take `mean_bytes` each."""
    wanted = min(TARGET_BLOCK_BYTES / max(mean_bytes, 1.0), samples / MINIMUM_BLOCKS)
    return min(max(MINIMUM_BLOCK_ROWS, int(wanted)), MAX_BLOCK_ROWS)


def shard_count(samples: int, mean_bytes: float, shard_bytes: float) -> int:
    """Shards of about `shard_bytes` for so many samples whose images take `mean_bytes` each."""
    return min(samples, math.ceil(samples * (mean_bytes + SAMPLE_OVERHEAD) / shard_bytes))


def shard_name(split: str, number: int) -> str:
    """Stem of a shard's three files."""
    return f"{split}-{number:06d}"


def sample_key(source: int, row: int) -> str:
    """The opaque key of a sample: no path, no patient. source 0..99, row 0..9,999,999,999."""
    return f"{source:02d}-{row:010d}"


def table_schema(context: int, labels: tuple[str, ...]) -> pa.Schema:
    """Columns of `NAME.parquet`, one row a sample."""
    columns = [
        ("key", pa.string()),
        ("source", pa.uint8()),
        ("row", pa.int64()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("xxh3", pa.uint64()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.uint16(), context)),
        ("token_count", pa.uint16()),
        ("truncated", pa.bool_()),
        ("side_words", pa.bool_()),
        ("group", pa.int64()),
    ]
    columns += [(LABEL_PREFIX + name, pa.float32()) for name in labels]
    return pa.schema(columns)

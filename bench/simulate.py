"""Data sets of any size in no time: one real shard of made-up films, and links to it under the other shards' names.

Everything that a loader looks at is there: a manifest that lists all shards, and their files, each of which opens,
checks and decodes. What is missing is their number of bytes: all shards are the same pages of memory.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.encodings import encode
from shards.manifest import signed, write_manifest
from shards.schema import ImageSpec, Manifest, ShardInfo, SourceInfo, TokenizerSpec, block_rows_for, shard_name
from shards.writer import Sample, ShardWriter

FILMS, NOISE = 8, 2.0
"""Different films; grey levels of noise that make a JPEG about as large as one of a real film, 22 KB."""
CONTEXT = 77
_NO_DIGEST = "0" * 32


def write_set(root: Path, samples: int, shards: int) -> Manifest:
    """A data set of so many training samples in so many shards, which divide them, in an empty folder."""
    assert samples % shards == 0
    films = made_up_films()
    block_rows = block_rows_for(samples, float(np.mean([len(film) for film in films])))
    info = _write_shard(root, films, samples // shards, block_rows)
    infos = [info, *(_link(root, info, number) for number in range(1, shards))]
    manifest = Manifest(
        schema_version=1,
        image=ImageSpec(),
        tokenizer=TokenizerSpec(name="none", digest=_NO_DIGEST, context=CONTEXT, vocab_size=49408),
        labels=(),
        block_rows=block_rows,
        seed=0,
        sources=(SourceInfo(kind="hdf5", rows=samples, samples=samples, digest=_NO_DIGEST),),
        splits={"train": tuple(infos)},
    )
    write_manifest(root, signed(manifest))
    return manifest


def made_up_films() -> list[bytes]:
    """Smooth blobs with noise, encoded as films are by default."""
    rng = np.random.default_rng(0)
    row, column = np.indices((320, 320)) / 320
    found = []
    for y, x, width in rng.uniform(0.2, 0.8, (FILMS, 3)):
        soft = 60 + 130 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / width**2)
        noisy = soft + rng.normal(0, NOISE, soft.shape)
        found.append(encode(np.rint(noisy).clip(0, 255).astype(np.uint8), ImageSpec()))
    return found


def _write_shard(root: Path, films: list[bytes], rows: int, block_rows: int) -> ShardInfo:
    fields: dict[str, Any] = {"source": 0, "text": "", "token_count": 2, "truncated": False, "side_words": False}
    tokens = np.zeros(CONTEXT, dtype=np.uint16)
    name = shard_name("train", 0)
    with ShardWriter(root, name, image=ImageSpec(), context=CONTEXT, labels=(), block_rows=block_rows) as writer:
        for row in range(rows):
            writer.add(Sample(**fields, row=row, image=films[row % FILMS], tokens=tokens))
    return writer.info


def _link(root: Path, info: ShardInfo, number: int) -> ShardInfo:
    name = shard_name("train", number)
    for ending in ("tar", "idx", "parquet"):
        os.link(root / f"{info.name}.{ending}", root / f"{name}.{ending}")
    return replace(info, name=name)

"""`python -m shards export DIR --where QUERY --out DIR2`: the samples that a query means, as new shards or as files.

Samples keep their order, which is a shuffle, their split, key and patient's number. Everything is written to a folder
beside DIR2, verified there, and renamed: DIR2 is complete or not there at all, and a killed export is simply run again.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from shards.atomic import TEMPORARY_PREFIX, atomic_file, sync_folder
from shards.cli import check_outside, say
from shards.errors import InputError
from shards.lock import exclusive
from shards.manifest import read_manifest, write_manifest
from shards.progress import progress
from shards.query import Query, parse_query
from shards.scan import read_image, read_samples, scan
from shards.schema import (
    LABEL_PREFIX,
    REJECTS_NAME,
    SAMPLE_OVERHEAD,
    Manifest,
    ShardInfo,
    block_rows_for,
    sample_key,
    shard_count,
    shard_name,
    table_schema,
)
from shards.verify import verify
from shards.writer import Sample, ShardWriter, sample_json, text_bytes

NOT_SELECTED = "not selected by export"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write the samples that a query means to new shards, or to files."""

    root: Positional[Path]
    """Folder of shards."""
    where: str
    """Which samples, e.g. "Cardiomegaly == 1 and not (`Pleural Effusion` == 1) and split == 'train'"."""
    out: Path
    """Folder to make."""
    to: Literal["shards", "files"] = "shards"
    """`shards`: a data set of its own; `files`: SPLIT/KEY.jpg, KEY.txt and KEY.json."""
    shard_mb: float = 256.0
    """Aim for tars of this many megabytes (10^6 bytes)."""

    def __post_init__(self) -> None:
        if not 0.001 <= self.shard_mb <= 1e6:
            raise InputError(f"--shard-mb {self.shard_mb} is not in 0.001..1,000,000")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What a query means in a data set."""

    rows: dict[str, NDArray[np.int64]]
    """Split -> its rows, ascending. A split without any is absent."""
    image_bytes: int
    sources: NDArray[np.int64]
    """(sources,) samples of each source."""

    @property
    def samples(self) -> int:
        """How many samples."""
        return sum(map(len, self.rows.values()))


def run(config: ExportConfig) -> None:
    """Choose, write, verify, rename."""
    manifest = read_manifest(config.root)
    query = parse_query(config.where, manifest.labels)
    _check_out(config.root, config.out)
    chosen = choose(config.root, manifest, query)
    if not chosen.samples:
        raise InputError(f"no sample of {config.root} is meant by --where {config.where!r}")
    with _place(config.root, config.out, chosen) as folder:
        if config.to == "shards":
            _write_rejects(config.root, manifest, query, folder)
            write_shards(config.root, manifest, chosen, folder, config.shard_mb * 1e6)
            _verify(folder)
        else:
            write_files(config.root, manifest, chosen, folder)
        folder.rename(config.out.resolve())
    sync_folder(config.out.resolve().parent)
    sizes = ", ".join(f"{split} {len(rows):,}" for split, rows in chosen.rows.items())
    total = manifest.samples
    say(f"{config.out}: {chosen.samples:,} of {total:,} samples ({sizes}) as {config.to}")


def choose(root: Path, manifest: Manifest, query: Query) -> Chosen:
    """Find the samples that a query means; reads the tables' columns that it names, block by block."""
    rows: dict[str, list[NDArray[np.int64]]] = {split: [] for split in manifest.splits}
    seen = dict.fromkeys(manifest.splits, 0)
    image_bytes, sources = 0, np.zeros(len(manifest.sources), dtype=np.int64)
    for block in scan(root, manifest, sorted({*query.columns, "size", "source"})):
        found = np.flatnonzero(query.mask(block.table, block.split))
        rows[block.split].append(seen[block.split] + found)
        seen[block.split] += block.table.num_rows
        image_bytes += int(block.table["size"].to_numpy()[found].sum())
        sources += np.bincount(block.table["source"].to_numpy()[found], minlength=len(sources))
    joined = {split: np.concatenate(parts) for split, parts in rows.items()}
    joined = {split: found.astype(np.int64) for split, found in joined.items() if len(found)}
    return Chosen(rows=joined, image_bytes=image_bytes, sources=sources)


def write_shards(root: Path, manifest: Manifest, chosen: Chosen, folder: Path, shard_bytes: float) -> None:
    """Write the chosen samples as a data set."""
    mean_bytes = chosen.image_bytes / chosen.samples
    subset = replace(
        manifest,
        block_rows=block_rows_for(chosen.samples, mean_bytes),
        sources=tuple(
            replace(source, samples=int(count)) for source, count in zip(manifest.sources, chosen.sources, strict=True)
        ),
        groups={split: manifest.groups[split] for split in chosen.rows if split in manifest.groups},
        splits={},
    )
    splits: dict[str, tuple[ShardInfo, ...]] = {}
    with progress("export", chosen.samples, "film") as advance:
        for split, rows in chosen.rows.items():
            for number, part in enumerate(np.array_split(rows, shard_count(len(rows), mean_bytes, shard_bytes))):
                with ShardWriter.of(subset, folder, shard_name(split, number)) as writer:
                    for sample in _samples(root, manifest, split, part):
                        writer.add(sample)
                        advance(1)
                splits[split] = (*splits.get(split, ()), writer.info)
    write_manifest(folder, replace(subset, splits=splits))


def _samples(root: Path, manifest: Manifest, split: str, rows: NDArray[np.int64]) -> Iterator[Sample]:
    columns = table_schema(manifest.tokenizer.context, manifest.labels).names
    for reader, row in read_samples(root, manifest, split, rows, columns):
        yield Sample(
            source=row["source"],
            row=row["row"],
            image=read_image(reader, row),
            text=row["text"],
            tokens=np.array(row["tokens"], dtype=np.uint16),
            token_count=row["token_count"],
            truncated=row["truncated"],
            side_words=row["side_words"],
            group=row["group"],
            labels=tuple(row[LABEL_PREFIX + name] for name in manifest.labels),
        )


def write_files(root: Path, manifest: Manifest, chosen: Chosen, folder: Path) -> None:
    """Write the chosen samples as files, with the contents that the members of the tar have."""
    with progress("export", chosen.samples, "film") as advance:
        for split, rows in chosen.rows.items():
            (folder / split).mkdir()
            for sample in _samples(root, manifest, split, rows):
                labels = dict(zip(manifest.labels, sample.labels, strict=True))
                stem = folder / split / sample_key(sample.source, sample.row)
                stem.with_suffix(f".{manifest.image.extension}").write_bytes(sample.image)
                stem.with_suffix(".txt").write_bytes(text_bytes(sample.text))
                stem.with_suffix(".json").write_bytes(sample_json(labels, sample.row, sample.source))
                advance(1)


def _write_rejects(root: Path, manifest: Manifest, query: Query, folder: Path) -> None:
    """Every source row that is not in the subset: those that ingest rejected, and those not chosen."""
    with atomic_file(folder / REJECTS_NAME) as file:
        _copy_rejects(root / REJECTS_NAME, file)
        for block in scan(root, manifest, sorted({*query.columns, "source", "row"})):
            others = np.flatnonzero(~query.mask(block.table, block.split))
            rows: list[dict[str, Any]] = block.table.select(["source", "row"]).take(others).to_pylist()
            file.write("".join(f"{row['source']},{row['row']},{NOT_SELECTED}\n" for row in rows).encode())


_REJECTS_HEADER = b"source,row,reason\n"


def _copy_rejects(path: Path, into: BinaryIO) -> None:
    if not path.exists():
        into.write(_REJECTS_HEADER)
        return
    if not path.is_file():
        raise InputError(f"{path} is no file; restore or remove it")
    with open(path, "rb") as file:
        if file.readline(len(_REJECTS_HEADER)) != _REJECTS_HEADER:
            raise InputError(f"{path} is no list of rejects; restore or remove it")
        file.seek(0)
        shutil.copyfileobj(file, into)


def _check_out(root: Path, out: Path) -> None:
    check_outside(out, root, "--out")
    place = out.resolve()  # where a link leads, or `gone/..`
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise InputError(f"{out} is there already and not an empty folder; choose another")


@contextlib.contextmanager
def _place(root: Path, out: Path, chosen: Chosen) -> Iterator[Path]:
    """The folder to write in, empty, with room for what was chosen, and nobody else's; removed after an error."""
    place = out.resolve()
    folder = place.with_name(f"{TEMPORARY_PREFIX}{place.name}")
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(Path(f"{folder}.lock"), f"another export is writing to {out}"))
            _check_out(root, out)  # that other one may have ended since
            shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
            folder.mkdir()
        except OSError as error:
            raise InputError(
                f"cannot make a folder in {folder.parent} ({error.strerror}); give another --out"
            ) from None
        try:
            need, free = chosen.image_bytes + chosen.samples * SAMPLE_OVERHEAD, shutil.disk_usage(folder).free
            if need > free:
                raise InputError(
                    f"{folder.parent} has {free / 1e6:,.0f} MB free, {chosen.samples:,} samples need "
                    f"{need / 1e6:,.0f} MB: make room, or choose fewer"
                )
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _verify(folder: Path) -> None:
    problems = [problem for _, problem in verify(folder) if problem]
    if problems:
        raise InputError(f"what was written does not verify ({problems[0]}); verify the source, then try again")

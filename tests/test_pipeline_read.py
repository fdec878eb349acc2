"""The block reader: damage is caught and named, transient errors are retried, memory is bounded."""

import ctypes
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import read, visits
from pipeline.batch import DIGEST_MODULUS, World, digest_batch
from pipeline.blocks import BlockReader
from pipeline.buffers import PAGE, Buffers
from pipeline.config import LoaderConfig
from pipeline.handles import OpenShards, ShardSet
from pipeline.loader import build_loader
from pipeline.order import Layout, ShuffledOrder
from pipeline.quarantine import Quarantine, ShardNames
from pipeline.stall import Busy
from pipeline.visits import VisitLoader, give_all, read_images
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import Rows, ShardReader

BACKENDS = ("cpu", "dali")


@pytest.fixture
def copy(shards_dir: Path, tmp_path: Path) -> Path:
    """A copy of the made-up shards, to be damaged."""
    return Path(shutil.copytree(shards_dir, tmp_path / "set"))


def image_row(root: Path, shard: int, row: int) -> tuple[Rows, int]:
    """The rows of a row's block and its index in them."""
    manifest = read_manifest(root)
    with ShardReader(root, manifest, manifest.splits["train"][shard]) as reader:
        return reader.read_rows(row // manifest.block_rows), row % manifest.block_rows


def flip_bit(path: Path, offset: int, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def run(root: Path, backend: str = "cpu", batches: int = 12, **settings: object) -> dict[str, float]:
    """Load an epoch or more."""
    config = LoaderConfig(shards=root, backend=backend, batch_size=8, threads=1, **settings)  # type: ignore[arg-type]
    with build_loader(config, World()) as loader:
        for _ in range(batches):
            next(loader)
        return loader.stats()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_of_an_image_is_named(copy: Path, backend: str, where: str) -> None:
    rows, index = image_row(copy, 1, 5)
    offset, size = int(rows.offset[index]), int(rows.size[index])
    flip_bit(copy / "train-000001.tar", offset + {"first": 0, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(InputError, match=r"train-000001: image ..-.{10} at offset") as error:
        run(copy, backend)
    assert rows.keys()[index] in str(error.value) and f"offset {offset} " in str(error.value)


def test_a_flipped_bit_of_any_parquet_page_is_named(copy: Path) -> None:
    """Every page that training reads: one byte in each column chunk of a block."""
    import pyarrow.parquet as pq

    path = copy / "train-000001.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    manifest = read_manifest(copy)
    for column in range(group.num_columns):
        chunk = group.column(column)
        if chunk.path_in_schema in ("key", "text", "truncated"):
            continue
        offset = chunk.data_page_offset + chunk.total_compressed_size - 1
        flip_bit(path, offset)
        with (
            ShardReader(copy, manifest, manifest.splits["train"][1]) as reader,
            pytest.raises(InputError, match="train-000001"),
        ):
            reader.read_rows(0)
        flip_bit(path, offset)
    flip_bit(path, offset)
    with pytest.raises(InputError, match="train-000001"):
        run(copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_with_a_valid_digest_that_cannot_be_decoded_is_named(
    copy: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, index = image_row(copy, 0, 2)
    offset, size = int(rows.offset[index]), int(rows.size[index])
    with open(copy / "train-000000.tar", "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    monkeypatch.setattr(visits, "find_damaged", lambda *_: [])
    with pytest.raises(InputError, match=f"train-000000: image {rows.keys()[index]}"):
        run(copy, backend)


@pytest.mark.parametrize("change", [lambda size: size - 1000, lambda size: size + 512, lambda _: 0])
def test_a_tar_that_changes_size_while_open_is_named(copy: Path, change: Callable[[int], int]) -> None:
    manifest = read_manifest(copy)
    shard = read.OpenShard(lambda: ShardReader(copy, manifest, manifest.splits["train"][0]), read.ReadStats(), Busy())
    path = copy / "train-000000.tar"
    buffer = np.empty(path.stat().st_size - 4096, dtype=np.uint8)
    shard.read_into([(4096, buffer)])
    os.truncate(path, change(path.stat().st_size))
    with pytest.raises(InputError, match=r"train-000000.*changed while in use"):
        shard.read_into([(4096, buffer)])
    shard.close()


@pytest.mark.parametrize("suffix", ["tar", "parquet", "idx"])
def test_a_shard_that_changed_before_the_start_is_named(copy: Path, suffix: str) -> None:
    with open(copy / f"train-000001.{suffix}", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"train-000001.*changed after ingest"):
        run(copy)


class Flaky:
    """os.preadv that fails every so often, and gives short reads in between."""

    def __init__(self, every: int, error: int) -> None:
        self.calls, self.every, self.error = 0, every, error
        self.preadv = os.preadv

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.calls += 1
        if self.calls % self.every == 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.preadv(descriptor, [buffers[0][:50_000]], offset)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_transient_errors_are_retried_and_counted(
    shards_dir: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(read, "BACKOFF_S", (0.001,) * 40)  # threads take turns: one may meet every fifth call often
    flaky = Flaky(5, error)
    monkeypatch.setattr(read.os, "preadv", flaky)
    stats = run(shards_dir)
    assert stats["images"] == 96 and 0 < stats["retries"] <= flaky.calls // 5


def test_an_error_that_stays_ends_the_run_and_names_the_shard(
    shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BACKOFF_S", (0.001, 0.001))
    monkeypatch.setattr(read.os, "preadv", Flaky(1, errno.EIO))
    with pytest.raises(InputError, match=r"train-00000\d: cannot read .* bytes at offset .*3 times"):
        run(shards_dir)


def test_an_error_that_stays_was_tried_after_every_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    pauses, mended, stats = list[float](), list[int](), read.ReadStats()
    monkeypatch.setattr(read.time, "sleep", pauses.append)
    with pytest.raises(OSError, match="Input/output"):
        read.retried(fail, stats, mended.append)
    assert tuple(pauses) == read.BACKOFF_S
    assert stats.retries == len(pauses) and mended == [errno.EIO] * len(pauses)


def test_an_error_that_will_not_pass_is_not_retried(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(1, errno.EACCES)
    monkeypatch.setattr(read.os, "preadv", flaky)
    with pytest.raises(InputError, match="Permission denied"):
        run(shards_dir)
    assert flaky.calls <= 4  # one for each reading thread


def test_memory_is_given_out_by_first_fit_and_holes_grow_together() -> None:
    buffers = Buffers(9 << 17)
    first, second, third = (buffers.take(size) for size in (200_000, 400_000, 300_000))
    assert buffers.used == buffers.total >= 900_000
    buffers.give(first)
    assert buffers.take(100_000).ctypes.data == first.ctypes.data
    before = buffers.total
    beyond = buffers.take(500_000)  # no hole is as large: memory of its own, which leaves with it
    assert beyond.nbytes >= 500_000 and buffers.total == before + beyond.nbytes
    beyond[:] = 1
    for buffer in (second, beyond, third, first[:102_400]):
        buffers.give(buffer)
    assert buffers.used == 0
    assert buffers.take(9 << 17).ctypes.data == first.ctypes.data, "the holes did not become one"
    assert buffers.total == before + beyond.nbytes


@given(sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_buffers_that_are_out_never_overlap(sizes: list[int], seed: int) -> None:
    buffers, out, rng = Buffers(200_000), list[tuple[int, NDArray[np.uint8]]](), np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        buffer = buffers.take(size)
        buffer[:] = number
        out.append((number, buffer))
        while out and rng.random() < 0.5:
            mark, given_back = out.pop(rng.integers(len(out)))
            assert (given_back == mark).all()
            buffers.give(given_back)
    assert buffers.used == sum(buffer.nbytes for _, buffer in out)


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(InputError, match="more than this machine has"):
        Buffers(1 << 60)


def test_what_lies_between_scattered_images_takes_no_memory(tmp_path: Path) -> None:
    """Bytes are where they belong, also over many short reads, and where images come twice."""
    content = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(content.tobytes())
    info = SimpleNamespace(name=path.stem, tar=SimpleNamespace(bytes=len(content)))
    with open(path, "rb") as file:
        source = SimpleNamespace(fd=file.fileno(), info=info)
        shard = read.OpenShard(lambda: source, read.ReadStats(), Busy())  # type: ignore[arg-type,return-value]
        records = np.zeros(6, dtype=[("offset", np.int64), ("size", np.int64), ("address", np.int64)])
        records["offset"] = 2_900_000, 1_000, 900_000, 910_000, 1_000, 400_000
        records["size"] = 100_000, 90_000, 10_000, 120_000, 90_000, 1
        buffers = Buffers(1 << 20)
        for most, part in itertools.product((None, 7_777, 90_000), (1_000, 200_000)):  # 90,000: where an image ends
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(visits, "PART_BYTES", part)
                if most:
                    patch.setattr(read, "MOST_PARTS", 2)
                    patch.setattr(read.os, "preadv", short_reads(most))
                taken, images = read_images(shard, records, buffers)
            # 6 images in 2 parts, or in 6, at most one for each; what comes twice is in the last of its parts.
            sizes = (110_000, 210_001) if part == 200_000 else (100_000, 1, 10_000, 120_000, 90_000, 1)
            assert [each.nbytes for each in taken] == [-(-size // PAGE) * PAGE for size in sizes]
            for record, image in zip(records, images, strict=True):
                begin, size = int(record["offset"]), int(record["size"])
                assert np.array_equal(image, content[begin : begin + size])
                assert ctypes.string_at(int(record["address"]), size) == image.tobytes()
            give_all(taken, buffers)
            assert not buffers.used


def short_reads(most: int) -> Callable[[int, list[memoryview], int], int]:
    """os.preadv that reads so many bytes at most."""
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert len(buffers) <= read.MOST_PARTS
        room, kept = most, []
        for each in buffers:
            kept.append(each[:room])
            room -= len(kept[-1])
        return preadv(descriptor, kept, offset)

    return short


def test_read_ahead_stays_within_its_memory(shards_dir: Path) -> None:
    """The threads stop where the limit is, which two of these visits nearly reach, and everything arrives in order.
    One thread takes memory in the order of need. Of several one may find only holes that are too small for what the
    consumer waits for, which then lies apart."""
    manifest = read_manifest(shards_dir)
    shards = manifest.splits["train"]
    limit, visit_bytes = 1 << 20, max(shard.tar.bytes for shard in shards)
    assert limit < 2.2 * visit_bytes
    for seed, threads in itertools.product(range(12), (1, 4)):
        layout = Layout(tuple(shard.rows for shard in shards), manifest.block_rows)
        order = ShuffledOrder(layout, seed=seed, streams=2)
        files = OpenShards([ShardSet(root=shards_dir, manifest=manifest, shards=shards, layout=layout)])
        loader = VisitLoader(files, Quarantine(ShardNames(split="train"), 0))
        reader = BlockReader(loader, order.visits(0, World()), limit, threads=threads, stall_abort_s=30)
        for expected, _ in zip(order.visits(0, World()), range(40), strict=False):
            assert reader.next_first() == expected.first
            loaded = reader.get()
            assert np.concatenate([part.visit.rows for part in loaded]).tolist() == expected.rows.tolist()
            assert reader.buffer_bytes <= limit + (threads > 1) * visit_bytes
            reader.release(loaded)
        reader.close()


def test_memory_of_films_that_were_used_is_free_before_all_of_their_block_are(
    shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream, and nothing read ahead: what is out falls by parts; samples and pixels stay what they are."""
    monkeypatch.setattr(BlockReader, "_has_room", lambda *_: False)
    config = LoaderConfig(shards=shards_dir, backend="cpu", batch_size=2, threads=1, ahead=1, streams=1)

    def look() -> tuple[int, float, set[int]]:
        digest, pixels, used = 0, 0.0, set()
        with build_loader(config, World()) as loader:
            for _ in range(48):
                batch = next(loader)
                digest, pixels = digest + digest_batch(batch, World()), pixels + float(batch.images.double().sum())
                assert loader._reader is not None
                used.add(loader._reader._buffers.used)
        return digest % DIGEST_MODULUS, pixels, used

    whole = look()
    monkeypatch.setattr(visits, "PART_BYTES", 20_000)
    parts = look()
    assert parts[:2] == whole[:2] and max(parts[2]) <= max(whole[2]) + 16 * PAGE
    assert min(parts[2] - {0}) < 0.4 * min(whole[2] - {0})


def test_a_second_reading_that_fails_gives_its_buffer_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a copy on a failing disk: the shared folder is read instead, and the memory must not be lost to it."""
    manifest = read_manifest(copy)
    shards = manifest.splits["train"]
    order = ShuffledOrder(Layout(tuple(shard.rows for shard in shards), manifest.block_rows), seed=0, streams=2)
    files = OpenShards([ShardSet(root=copy, manifest=manifest, shards=shards, layout=order.layout)])
    visit, buffers = next(order.visits(0, World())), Buffers(1 << 20)
    rows, _ = image_row(copy, visit.shard, visit.block * manifest.block_rows)
    flip_bit(copy / f"{shards[visit.shard].name}.tar", int(rows.offset[visit.rows[0]]) + 9)

    def fail(*_: object) -> None:
        raise InputError("the disk is failing")

    monkeypatch.setattr(read.OpenShard, "reread", fail)
    with pytest.raises(InputError, match="the disk is failing"):
        VisitLoader(files, Quarantine(ShardNames(split="train"), 0)).load(visit, buffers)
    files.close()
    assert not buffers.used


def test_the_least_memory_is_enough_and_less_is_refused_with_the_arithmetic(shards_dir: Path) -> None:
    assert run(shards_dir, streams=1, memory_mb=2)["images"] == 96
    with pytest.raises(InputError, match=r"memory_mb 1 is too little: the 48 streams .* hold \d\.\d MiB, .* 0\.\d MiB"):
        run(shards_dir, memory_mb=1)

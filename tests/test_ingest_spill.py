"""Spills: every image comes back in the order of the shards, by few large reads, and damage is seen."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

import ingest.spill
from ingest.spill import Images, SpillReader, open_spill, read_records, spill_path, whole_spill
from shards.errors import InputError

STAMP = "0123456789abcdef" * 2


def write(folder: Path, images: list[bytes], places: np.ndarray, starts: list[int]) -> None:
    """Spills that begin at `starts`; an empty image is a row that was not encoded."""
    for first, end in zip(starts, [*starts[1:], len(images)], strict=True):
        with open_spill(spill_path(folder, first), end - first, STAMP) as spill:
            for row in range(first, end):
                if images[row]:
                    spill.add(row - first, int(places[row]), images[row])


def wanted(folder: Path, starts: list[int], rows: np.ndarray) -> Images:
    records = read_records(folder, np.array(starts))
    return Images(rows=rows, **{name: records[field][rows] for name, field in
                                (("offsets", "offset"), ("sizes", "size"), ("hashes", "xxh3"))})  # fmt: skip


def read(folder: Path, starts: list[int], rows: np.ndarray) -> list[bytes]:
    reader = SpillReader(folder, np.array(starts))
    try:
        return [bytes(image) for image in reader.read(wanted(folder, starts, rows))]
    finally:
        reader.close()


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 40_000), st.integers(0, 2**32 - 1))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_images_come_back_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, spills: int, part: int, seed: int
) -> None:
    """Runs and parts of any size, from less than an image to more than all of them; some rows were not encoded."""
    random = np.random.default_rng(seed)
    monkeypatch.setattr(ingest.spill, "_RUN_BYTES", part * 3)
    monkeypatch.setattr(ingest.spill, "_PART_BYTES", part)
    images = [random.bytes(int(size)) for size in random.integers(0, 9000, rows) * (random.random(rows) < 0.9)]
    starts = sorted({0, *random.integers(0, rows, spills - 1).tolist()})
    places = random.permutation(rows)
    write(tmp_path, images, places, starts)
    order = np.argsort(places)
    order = order[[bool(images[row]) for row in order]]
    for taken in (order, order[len(order) // 3 : len(order) // 2], random.permutation(order)):
        if len(taken):
            assert read(tmp_path, starts, taken) == [images[row] for row in taken]


def test_a_shard_needs_one_piece_of_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the order within a run is for: 40 images of 4 kB out of 400, at random, by 2 reads and not by 40."""
    monkeypatch.setattr(ingest.spill, "_RUN_BYTES", 200 * 5000)
    random = np.random.default_rng(0)
    images = [random.bytes(5000) for _ in range(400)]
    places = random.permutation(400)
    write(tmp_path, images, places, [0])
    taken: list[list[tuple[int, int]]] = []
    real = ingest.spill.read_extents
    monkeypatch.setattr(
        ingest.spill, "read_extents", lambda path, extents, to: (taken.append(extents), real(path, extents, to))[1]
    )
    shard = np.argsort(places)[120:160]
    assert read(tmp_path, [0], shard) == [images[row] for row in shard]
    assert len(taken) == 1 and len(taken[0]) == 2
    assert sum(size for _, size in taken[0]) < 40 * 5000 + 4 * 4096


def test_damage_is_seen(tmp_path: Path) -> None:
    """A byte that changed on the disk: the reader says so, and a rerun makes the spill anew."""
    images = [bytes([number]) * 6000 for number in range(20)]
    write(tmp_path, images, np.arange(20)[::-1], [0])
    path = spill_path(tmp_path, 0)
    assert whole_spill(path) == (20, STAMP)
    content = bytearray(path.read_bytes())
    content[7 * 6000 + 5] ^= 1
    path.write_bytes(content)
    assert whole_spill(path) is None
    with pytest.raises(InputError, match=r"0000000000\.spill .* is not what was written there"):
        read(tmp_path, [0], np.arange(20))


def test_a_hash_of_each_image_is_kept(tmp_path: Path) -> None:
    images = [b"first" * 100, b"", b"third" * 50]
    write(tmp_path, images, np.arange(3), [0])
    records = read_records(tmp_path, np.array([0]))
    assert records["size"].tolist() == [500, 0, 250]
    assert records["xxh3"].tolist() == [xxh3_64_intdigest(images[0]), 0, xxh3_64_intdigest(images[2])]

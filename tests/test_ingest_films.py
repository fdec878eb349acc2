"""How rows come out of HDF5 files: through the page cache or past it, ahead of time or not, and always the same."""

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import made_up_images, write_h5

from bench.machine import file_system
from bench.storage import evict, resident_bytes
from ingest.config import SourceConfig
from ingest.films import H5Films
from ingest.source import H5Source
from shards.errors import InputError

NUMBERS = np.random.default_rng(0).integers(0, 256, (37, 50, 33))
SPANS = [(row, min(row + 5, 37)) for row in range(3, 37, 5)]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return made_up_images(40)


@pytest.mark.parametrize("layout", ["contiguous", "chunked"])
@pytest.mark.parametrize("first_read", ["from the cache", "waited", "found no CPU", "fetched"])
def test_how_the_first_rows_came_decides_how_the_others_do(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, layout: str, first_read: str
) -> None:
    """The same films in every way; no thread and no file is left open where the reader gives up."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(
            "cxr", data=images.astype(np.float32), chunks=(1, 320, 320) if layout == "chunked" else None
        )
    monkeypatch.setattr("ingest.films.READ_ROWS", 3)
    fetched = 1e9 if first_read == "fetched" else 0.0
    used = {"waited": (1.0, 0.1, 0.0), "found no CPU": (1.0, 0.1, 0.9)}.get(first_read, (0.1, 0.1, 0.0))
    usage = iter([(0.0, 0.0, 0.0, 0.0), (*used, fetched)] * 2)
    monkeypatch.setattr("ingest.films._usage", lambda: np.array(next(usage)))
    reads: list[tuple[str, bool]] = []
    for name in ("read", "_read_direct"):
        monkeypatch.setattr(H5Source, name, recorded(getattr(H5Source, name), name, reads))
    before = set(threading.enumerate())
    with H5Films(SourceConfig(h5=(tmp_path / "a.h5",))) as films:
        assert np.array_equal([film.copy() for film in films.read(1, len(images))], images[1:])
        direct = layout == "contiguous" and first_read in ("waited", "fetched")
        by_thread = direct or first_read == "waited"
        assert reads == [("read", False), *[("_read_direct" if direct else "read", by_thread)] * 12]
        abandoned = films.read(0, len(images))
        assert all(np.array_equal(next(abandoned), image) for image in images[:4])
        abandoned.close()
    assert set(threading.enumerate()) <= before and not open_files(tmp_path)


def open_files(folder: Path) -> list[str]:
    """This process's open files of a folder. Those of tests before may be closed at any time."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return [name for name in found if name.startswith(str(folder))]


def recorded(call, name: str, reads: list[tuple[str, bool]]):
    """`call`, noting that it was called and whether by another thread."""

    def recording(*arguments):
        reads.append((name, threading.current_thread() is not threading.main_thread()))
        return call(*arguments)

    return recording


@pytest.mark.parametrize("ahead", [True, False])
def test_films_that_memory_does_not_hold_stay_out_of_it(tmp_path: Path, images: np.ndarray, ahead: bool) -> None:
    """With the kernel's own account of what it fetched: 50 MB that nobody else has asked for."""
    if file_system(tmp_path)["type"] == "tmpfs":
        pytest.skip("the tests' folder is in memory, which cannot be evicted")
    path = write_h5(tmp_path / "a.h5", np.concatenate([images] * 3).astype(np.float32))
    evict([path])
    with H5Films(SourceConfig(h5=(path,))) as films:
        for number, film in enumerate(films.read(0, 3 * len(images), ahead=ahead)):
            assert np.array_equal(film, images[number % len(images)])
    assert resident_bytes(path) < 0.6 * path.stat().st_size  # the first 32 rows, and what Linux read ahead of them


@pytest.mark.parametrize("ahead", [0, 2, 50])
@pytest.mark.parametrize("before", [0, 512, 1 << 20])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "|u1", "<u2", ">u2"])
def test_rows_past_the_page_cache_are_the_rows(tmp_path: Path, kind: str, before: int, ahead: int) -> None:
    """Whatever their numbers are, and wherever they begin: HDF5 leaves room before itself to those who ask."""
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=before) as file:
        file.create_dataset("cxr", data=NUMBERS.astype(kind))
    with H5Source(tmp_path / "a.h5") as source:
        assert source.contiguous
        for (first, end), rows in zip(SPANS, source.read_direct(SPANS, ahead), strict=True):
            assert rows.dtype == kind and np.array_equal(rows, NUMBERS[first:end])


def test_numbers_that_numpy_does_not_have_are_left_to_hdf5(tmp_path: Path) -> None:
    """12 bits in 16, as a scanner may store them: their bytes are not the numbers' own by right."""
    twelve = h5py.h5t.STD_U16LE.copy()
    twelve.set_precision(12)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"cxr", twelve, h5py.h5s.create_simple((5, 4, 4)))
        file["cxr"][:] = 200
    with H5Source(tmp_path / "a.h5") as source:
        assert not source.contiguous and (source.read(0, 5) == 200).all()


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_h5(path, NUMBERS.astype(np.float32))
    with H5Source(path) as source:
        rows = source.read_direct(SPANS, 0)
        next(rows)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(InputError, match=r"dataset 'cxr' of .* changed while it was read"):
            list(rows)


@pytest.mark.parametrize("event", ["replaced", "removed"])
def test_a_file_that_loses_its_name_is_read_to_its_end(tmp_path: Path, event: str) -> None:
    """As HDF5 does, which has it open."""
    path = write_h5(tmp_path / "a.h5", NUMBERS.astype(np.float32))
    with H5Source(path) as source:
        if event == "replaced":
            os.replace(write_h5(tmp_path / "b.h5", NUMBERS.astype(np.float32)[::-1]), path)
        else:
            path.unlink()
        for (first, end), rows in zip(SPANS, source.read_direct(SPANS, 2), strict=True):
            assert np.array_equal(rows, NUMBERS[first:end])


def test_a_file_that_cannot_be_opened_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    with H5Source(write_h5(tmp_path / "a.h5", NUMBERS.astype(np.float32))) as source:
        monkeypatch.setattr("ingest.source.open_direct", refuse)
        with pytest.raises(InputError, match=r"rows 3 to 8 of dataset 'cxr' of .* \(Too many open files\); restore"):
            next(source.read_direct(SPANS, 2))


def test_a_film_that_is_refused_ends_the_threads_that_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the file is closed, even where somebody keeps the error, and with it what stood where it was raised."""
    numbers = np.zeros((200, 16, 16), np.float32)
    numbers[40] = 300
    usage = iter([(0.0, 0.0, 0.0, 0.0), (0.1, 0.1, 0.0, 1e9)])
    monkeypatch.setattr("ingest.films._usage", lambda: np.array(next(usage)))
    before = set(threading.enumerate())
    with H5Films(SourceConfig(h5=(write_h5(tmp_path / "a.h5", numbers),))) as films:
        with pytest.raises(InputError, match="row 40") as kept:
            list(films.read(0, 200))
        assert set(threading.enumerate()) <= before
    assert kept.value.__traceback__ and not open_files(tmp_path)


@pytest.mark.parametrize("first_read", ["fetched", "from the cache"])
def test_large_films_are_read_fewer_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_read: str) -> None:
    """32 films of 1024 x 1024 float64, twice, were half a gigabyte a worker; the first read goes before the rest."""
    path = write_h5(tmp_path / "a.h5", np.zeros((40, 64, 64)))
    monkeypatch.setattr("ingest.films._READ_BYTES", 5 * 64 * 64 * 8 + 1)
    fetched = 1e9 if first_read == "fetched" else 0.0
    usage = iter([(0.0, 0.0, 0.0, 0.0), (0.1, 0.1, 0.0, fetched)])
    monkeypatch.setattr("ingest.films._usage", lambda: np.array(next(usage)))
    read, sizes, alive = H5Source.read, [], []

    def noted(source: H5Source, first: int, end: int) -> np.ndarray:
        rows = read(source, first, end)
        sizes.append(end - first)
        alive.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(H5Source, "read", noted)
    with H5Films(SourceConfig(h5=(path,))) as films:
        for number, _ in enumerate(films.read(0, 40)):
            assert number < 10 or alive[0]() is None
    assert set(sizes) == {5} and len(sizes) == (1 if first_read == "fetched" else 8)

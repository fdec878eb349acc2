"""The HDF5 source: opened with suspicion, read in large contiguous slices.

HDF5 can make a plain slice read another file (external links, external storage, virtual datasets) or run a filter
plug-in. All are refused before a pixel is read.
"""

import contextlib
import errno
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from mmap import mmap
from pathlib import Path
from typing import Self

# Must stand before h5py loads the HDF5 library: no filter plug-ins from the environment.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py
import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.stream import ALIGNMENT, new_buffer, open_direct, read_at

DTYPES = ("float32", "float64", "uint8", "uint16")
FILTERS = {*range(1, h5py.h5z.FILTER_SCALEOFFSET + 1), h5py.h5z.FILTER_LZF}
"""Compressions and checksums that HDF5 and h5py bring themselves: gzip, shuffle, fletcher32, szip, n-bit, ..., lzf."""
MAX_CHUNK_BYTES = 256 << 20
"""Chunks are read as a whole, with all rows they reach into; more would not leave a worker its memory."""
MAX_PIECES = 1024
"""Chunks that a film may be cut into, side by side, and about as many as one read touches: HDF5 takes 7 KB for each."""
_MOST_NAMED, _MOST_VISITED = 8, 1000
"""Datasets in a file that a message lists, and those that are looked for at most."""
_CACHE_BYTES = 1 << 20
"""Of chunks that HDF5 keeps. Each is read once, and whole: 32 MiB of them cost a worker 55 MiB, for nothing."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""What a file system without locks, as NFS and Lustre may be, says to HDF5."""


class H5Source:
    """A dataset of grey images, (N, H, W). One file handle, not to be shared across processes."""

    def __init__(self, path: Path, dataset: str = "cxr") -> None:
        """InputError where the file or the dataset is missing, unsafe, or of another shape or dtype."""
        self._name = f"dataset {dataset!r} of {path}"
        self._file = _open(path)
        try:
            self._data = _dataset(self._file, dataset, self._name)
        except InputError:
            self._file.close()
            raise
        except Exception as error:  # HDF5 says nearly anything of damaged metadata
            self._file.close()
            raise InputError(f"{self._name} is damaged ({_reason(error)}); restore the file") from None
        self.rows, self.height, self.width = self._data.shape
        self.dtype = self._data.dtype
        self.row_bytes: int = self.height * self.width * self.dtype.itemsize
        self.stored_bytes: int = self._data.id.get_storage_size()
        """Bytes in the file, compressed or not."""
        self.chunk_rows: int = self._data.chunks[0] if self._data.chunks else 1
        """Rows that are stored, and if compressed can only be read, together."""
        self.pieces = _pieces(self._data) if self._data.chunks else 1
        """Chunks that a row is cut into."""
        self.contiguous = _is_plain(self._data)
        """Whether the rows lie in the file end to end, as the bytes of a numpy array of `dtype`."""

    def read(self, first: int, end: int) -> NDArray:
        """Rows first..end as stored, (end - first, H, W). InputError where the file cannot be read."""
        try:
            return self._data[first:end]
        except (OSError, RuntimeError) as error:
            raise self._unreadable(first, end, error) from None

    def read_direct(self, spans: Sequence[tuple[int, int]], ahead: int) -> Iterator[NDArray]:
        """Each span of rows as `read` gives it, past the page cache; good until the next is asked for.

        `ahead` spans are read by threads while one is used. Only where `contiguous`. InputError as of `read`.
        """
        largest = max(end - first for first, end in spans) * self.row_bytes + 2 * ALIGNMENT
        buffers = cycle([new_buffer(largest) for _ in range(min(ahead, len(spans)) + 1)])
        pending: deque[Future[NDArray]] = deque()
        with contextlib.ExitStack() as stack:
            try:  # by its descriptor: the file may have another name by now, or none, and its name another file
                handle = stack.enter_context(open_direct(Path(f"/proc/self/fd/{self._file.id.get_vfd_handle()}")))
            except OSError as error:
                raise self._unreadable(*spans[0], error) from None
            threads = stack.enter_context(ThreadPoolExecutor(max(ahead, 1)))
            for span in spans:
                pending.append(threads.submit(self._read_direct, handle, *span, next(buffers)))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _read_direct(self, handle: int, first: int, end: int, buffer: mmap) -> NDArray:
        start, stop = (self._data.id.get_offset() + row * self.row_bytes for row in (first, end))
        begin = start // ALIGNMENT * ALIGNMENT
        target = memoryview(buffer)[: -(-stop // ALIGNMENT) * ALIGNMENT - begin]
        try:
            if read_at(handle, target, begin) < stop - begin:
                raise OSError("the file ends before them")
        except OSError as error:
            raise self._unreadable(first, end, error) from None
        return np.ndarray((end - first, self.height, self.width), self.dtype, target, start - begin)

    def _unreadable(self, first: int, end: int, error: Exception) -> InputError:
        return InputError(f"rows {first} to {end} of {self._name} cannot be read ({_reason(error)}); restore the file")

    def films(
        self, images: NDArray, first: int, value_range: tuple[float, float] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """Rows that were read, from row `first` on, as (H, W) grey levels: exactly, or scaled from `value_range`.

        One by one, for each stays in the CPU's cache then. InputError names the first bad row.
        """
        for row, film in enumerate(images, first):
            yield (
                to_uint8(film, row, self._name)
                if value_range is None
                else scale_to_uint8(film, value_range, row, self._name)
            )

    def read_uint8(self, first: int, end: int, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
        """Rows first..end as `films` gives them, (end - first, H, W)."""
        return np.stack(list(self.films(self.read(first, end), first, value_range)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_plain(data: h5py.Dataset) -> bool:
    # HDF5 has numbers that numpy has not, of 12 bits in 16 for example, and turns them into the nearest when it reads.
    same_numbers = data.id.get_type() == h5py.h5t.py_create(data.dtype)
    return data.chunks is None and data.id.get_offset() is not None and same_numbers


def to_uint8(film: NDArray, row: int, name: str) -> NDArray[np.uint8]:
    """(H, W) to uint8, exactly. InputError names the row where a value is another one, be it NaN."""
    if film.dtype == np.uint8:
        return film
    with np.errstate(invalid="ignore"):
        exact = film.astype(np.uint8)
    if not np.equal(exact, film).all():
        _check_numbers(film, row, name)
        raise InputError(
            f"row {row} of {name} has values from {film.min():g} to {film.max():g}, not all whole numbers 0..255; "
            "say with --value-range LO HI which values are black and white"
        )
    return exact


def scale_to_uint8(film: NDArray, value_range: tuple[float, float], row: int, name: str) -> NDArray[np.uint8]:
    """(H, W) to uint8: LO becomes 0, HI 255, rounded, clipped. InputError for NaN and infinity."""
    low, high = value_range
    _check_numbers(film, row, name)
    with np.errstate(over="ignore"):
        scaled = (film.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _check_numbers(film: NDArray, row: int, name: str) -> None:
    if not np.isfinite(film).all():
        raise InputError(f"row {row} of {name} has pixels that are no number (NaN or infinite); mend or drop it")


def _open(path: Path) -> h5py.File:
    if not Path(path).is_file():
        raise InputError(f"no HDF5 file at {path}")
    try:
        try:
            return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES, locking=False)
    except OSError as error:
        reason = _reason(error)
        if "unable to lock" in str(error):
            reason = "another program is writing to it; if none is, set HDF5_USE_FILE_LOCKING=FALSE"
        raise InputError(f"{path} cannot be opened as HDF5 ({reason})") from None


def _reason(error: Exception) -> str:
    """What the system says, else the beginning of what HDF5 says."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else " ".join(str(error).split())[:160]


def _dataset(file: h5py.File, dataset: str, name: str) -> h5py.Dataset:
    group: h5py.Group = file
    for part in filter(None, dataset.split("/")):
        if not isinstance(group, h5py.Group) or group.get(part, getlink=True) is None:
            raise InputError(f"no {name}; {_describe(file)}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise InputError(f"{name} is reached through a link, which may lead to another file; copy the data in")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        raise InputError(f"{name} is a group; {_describe(file)}")
    _check_dataset(group, name)
    return group


def _describe(file: h5py.File) -> str:
    """The datasets of a file in whatever groups, for a message, which are looked for without following links.

    A file with a dataset a patient has patients' names in it, or thousands.
    """
    names: list[str] = []

    def visit(name: str) -> bool | None:
        if h5py.h5o.get_info(file.id, name.encode("utf-8", "surrogateescape")).type == h5py.h5o.TYPE_DATASET:
            names.append(name)
        return True if len(names) > _MOST_VISITED else None

    file.visit(visit)
    if not names:
        return "there is no dataset in it"
    if len(names) > _MOST_NAMED or any(map(str.isdigit, "".join(names))):
        count = f"more than {_MOST_VISITED:,}" if len(names) > _MOST_VISITED else f"{len(names):,}"
        return f"there are {count} other names (h5ls -r lists them)"
    return f"it holds {', '.join(map(repr, names))}"


def _check_dataset(data: h5py.Dataset, name: str) -> None:
    if data.is_virtual or data.external:
        raise InputError(f"{name} takes its data from other files (virtual or external storage); copy the data in")
    if data.dtype.name not in DTYPES:
        raise InputError(f"{name} has dtype {data.dtype}, not {', '.join(DTYPES)}; convert it first")
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"{name} has shape {data.shape}, not (films, height, width); convert it first")
    if data.chunks is None:
        _check_contiguous(data, name)
    else:
        _check_chunks(data, name)


def _check_contiguous(data: h5py.Dataset, name: str) -> None:
    # A contiguous dataset cannot hold less than its shape says unless the file is cut short or the shape is a lie.
    size = data.size * data.dtype.itemsize
    if data.id.get_storage_size() != size:
        raise InputError(f"{name} declares {size:,} bytes but stores less; restore the file")


def _pieces(data: h5py.Dataset) -> int:
    return math.prod(-(-side // chunk) for side, chunk in zip(data.shape[1:], data.chunks[1:], strict=True))


def _check_chunks(data: h5py.Dataset, name: str) -> None:
    plist = data.id.get_create_plist()
    if not FILTERS.issuperset(plist.get_filter(number)[0] for number in range(plist.get_nfilters())):
        raise InputError(f"{name} is compressed by a filter that HDF5 does not bring itself; repack it (h5repack)")
    pieces = _pieces(data)
    row = data.shape[1] * data.shape[2]
    read_bytes = max(math.prod(data.chunks), min(data.chunks[0], data.shape[0]) * row) * data.dtype.itemsize
    if read_bytes > MAX_CHUNK_BYTES or pieces > MAX_PIECES:
        layout = f"CHUNK=32x{data.shape[1]}x{data.shape[2]}"
        raise InputError(
            f"{name} has chunks of {data.chunks}: {read_bytes:,} bytes have to be read at once, "
            f"{MAX_CHUNK_BYTES:,} are the most, and films are cut into {pieces:,} pieces, "
            f"{MAX_PIECES:,} are the most; "
            f"repack it (h5repack -l {data.name.strip('/')}:{layout} OLD NEW)"
        )
    # A chunk costs the file some bytes, however well it is compressed; a shape far beyond the file is a lie.
    stored, wanted = data.id.get_num_chunks(), -(-data.shape[0] // data.chunks[0]) * pieces
    if stored < wanted:
        raise InputError(
            f"{name} declares {wanted:,} chunks but stores {stored:,}, the others are lost or were never written; "
            "restore the file"
        )

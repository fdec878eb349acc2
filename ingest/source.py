"""The HDF5 source, read in large contiguous slices. How it is opened: `ingest.h5`."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from mmap import mmap
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ingest.h5 import is_plain, open_dataset, pieces, reason
from ingest.images import scaled
from shards.errors import InputError
from shards.stream import ALIGNMENT, new_buffer, open_direct, read_at


class H5Source:
    """A dataset of grey images, (N, H, W). One file handle, not to be shared across processes."""

    def __init__(self, path: Path, dataset: str = "cxr", *, counted: bool = False) -> None:
        """InputError where the file or the dataset is missing, unsafe, or of another shape or dtype.

        `counted`: it was opened before, and its chunks are not counted again.
        """
        self._name = f"dataset {dataset!r} of {path}"
        self._data = open_dataset(path, dataset, self._name, counted=counted)
        self._file = self._data.file
        self.rows, self.height, self.width = self._data.shape
        self.dtype = self._data.dtype
        self.row_bytes: int = self.height * self.width * self.dtype.itemsize
        self.chunk_rows: int = self._data.chunks[0] if self._data.chunks else 1
        """Rows that are stored, and if compressed can only be read, together."""
        self.pieces = pieces(self._data) if self._data.chunks else 1
        """Chunks that a row is cut into."""
        self.contiguous = is_plain(self._data)
        """Whether the rows lie in the file end to end, as the bytes of a numpy array of `dtype`."""
        self._stamp = self._size_and_time()

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, compressed or not: HDF5 looks at each chunk for it."""
        return self._data.id.get_storage_size()

    def read(self, first: int, end: int) -> NDArray:
        """Rows first..end as stored, (end - first, H, W). InputError where the file cannot be read."""
        try:
            return self._data[first:end]
        except (OSError, RuntimeError) as error:
            raise self._unreadable(first, end, error) from None

    def check_unchanged(self) -> None:
        """InputError where the file was written to since it was opened: HDF5 reads zeros where one ends too early."""
        if changed := self._changed():
            raise changed

    def _changed(self) -> InputError | None:
        if self._size_and_time() == self._stamp:
            return None
        return InputError(f"{self._name} changed while it was read; leave the file alone and ingest again")

    def _size_and_time(self) -> tuple[int, int]:
        found = os.fstat(self._file.id.get_vfd_handle())
        return found.st_size, found.st_mtime_ns

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
        return self._changed() or InputError(
            f"rows {first} to {end} of {self._name} cannot be read ({reason(error)}); restore the file"
        )

    def films(
        self, images: NDArray, first: int, value_range: tuple[float, float] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """Rows that were read, from row `first` on, as (H, W) grey levels: exactly, or scaled from `value_range`.

        One by one, for each stays in the CPU's cache then. InputError names the first bad row.
        """
        for row, film in enumerate(images, first):
            if value_range is None:
                yield to_uint8(film, row, self._name)
            else:
                _check_numbers(film, row, self._name)
                yield scaled(film, value_range)

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


def _check_numbers(film: NDArray, row: int, name: str) -> None:
    if not np.isfinite(film).all():
        raise InputError(f"row {row} of {name} has pixels that are no number (NaN or infinite); mend or drop it")

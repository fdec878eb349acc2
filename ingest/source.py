"""The HDF5 source: opened with suspicion, read in large contiguous slices.

HDF5 can make a plain slice read another file (external links, external storage, virtual datasets) or run a filter
plug-in. All are refused before a pixel is read.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

# Must stand before h5py loads the HDF5 library: no filter plug-ins from the environment.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py
import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

DTYPES = ("float32", "uint8")


class H5Source:
    """A dataset of grey images, (N, H, W) float32 or uint8. One file handle, not to be shared across processes."""

    def __init__(self, path: Path, dataset: str = "cxr") -> None:
        """InputError where the file or the dataset is missing, unsafe, or of another shape or dtype."""
        self._file = _open(path)
        self._name = f"dataset {dataset!r} of {path}"
        try:
            self._data = _dataset(self._file, dataset, self._name)
        except BaseException:
            self._file.close()
            raise
        self.rows, self.height, self.width = self._data.shape
        self.dtype = self._data.dtype

    def read(self, first: int, end: int) -> NDArray:
        """Rows first..end as stored, (end - first, H, W). InputError where the file cannot be read."""
        try:
            return self._data[first:end]
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"rows {first} to {end} of {self._name} cannot be read ({error}); restore the file"
            ) from None

    def read_uint8(self, first: int, end: int) -> NDArray[np.uint8]:
        """Rows first..end as uint8; InputError naming the first row with a value that is not a whole number 0..255."""
        return to_uint8(self.read(first, end), first, self._name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_uint8(images: NDArray, first_row: int, name: str) -> NDArray[np.uint8]:
    """(n, H, W) float32 to uint8, exactly. InputError names the first row with another value, be it NaN."""
    if images.dtype == np.uint8:
        return images
    with np.errstate(invalid="ignore"):
        exact = images.astype(np.uint8)
    wrong = (exact != images).any(axis=(1, 2))
    if wrong.any():
        row = int(wrong.argmax())
        low, high = images[row].min(), images[row].max()
        raise InputError(
            f"row {first_row + row} of {name} has values from {low:g} to {high:g}, not all whole numbers 0..255; "
            "convert the file to grey levels first"
        )
    return exact


def _open(path: Path) -> h5py.File:
    if not Path(path).is_file():
        raise InputError(f"no HDF5 file at {path}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be opened as HDF5 ({' '.join(str(error).split())[:160]})") from None


def _dataset(file: h5py.File, dataset: str, name: str) -> h5py.Dataset:
    group: h5py.Group = file
    parts = [part for part in dataset.split("/") if part]
    for part in parts:
        if not isinstance(group, h5py.Group) or part not in group:
            raise InputError(f"no {name}; it holds {', '.join(map(repr, list(group)[:8])) or 'nothing'}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise InputError(f"{name} is reached through a link, which may lead to another file; copy the data in")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        raise InputError(f"{name} is not a dataset")
    _check_dataset(group, name)
    return group


def _check_dataset(data: h5py.Dataset, name: str) -> None:
    if data.is_virtual or data.external:
        raise InputError(f"{name} takes its data from other files (virtual or external storage); copy the data in")
    if data.dtype.name not in DTYPES:
        raise InputError(f"{name} has dtype {data.dtype}, not {' or '.join(DTYPES)}; convert it first")
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"{name} has shape {data.shape}, not (films, height, width); convert it first")
    # A contiguous dataset cannot hold less than its shape says unless the file is cut short or the shape is a lie.
    if data.chunks is None and data.id.get_storage_size() != data.size * data.dtype.itemsize:
        raise InputError(f"{name} declares {data.size * data.dtype.itemsize:,} bytes but stores less; restore the file")

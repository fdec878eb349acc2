"""An HDF5 file opened with suspicion.

HDF5 can make a plain slice read another file (external links, external storage, virtual datasets) or run a filter
plug-in. All are refused before a pixel is read.
"""

import errno
import itertools
import math
import os
from pathlib import Path

# Must stand before h5py loads the HDF5 library: no filter plug-ins from the environment.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

import h5py

from shards.errors import InputError

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


def open_dataset(path: Path, dataset: str, name: str, *, counted: bool) -> h5py.Dataset:
    """A dataset of films, its file open; `name` is what messages call it.

    InputError where the file or the dataset is missing, unsafe, or of another shape or dtype. `counted`: it was opened
    before, and its chunks are not counted again, for which HDF5 looks at each: half a second for half a million.
    """
    file = _open(path)
    try:
        return _dataset(file, dataset, name, counted)
    except InputError:
        file.close()
        raise
    except Exception as error:  # HDF5 says nearly anything of damaged metadata
        file.close()
        raise InputError(f"{name} is damaged ({reason(error)}); restore the file") from None


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
        why = reason(error)
        if "unable to lock" in str(error):
            why = "another program is writing to it; if none is, set HDF5_USE_FILE_LOCKING=FALSE"
        raise InputError(f"{path} cannot be opened as HDF5 ({why}); mend that, or give another --h5") from None


def reason(error: Exception) -> str:
    """What the system says, else the beginning of what HDF5 says."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number else " ".join(str(error).split())[:160]


def _dataset(file: h5py.File, dataset: str, name: str, counted: bool) -> h5py.Dataset:
    group: h5py.Group = file
    for part in filter(None, dataset.split("/")):
        if not isinstance(group, h5py.Group) or group.get(part, getlink=True) is None:
            raise InputError(f"no {name}; {_describe(file)}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise InputError(f"{name} is reached through a link, which may lead to another file; copy the data in")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        raise InputError(f"{name} is a group; {_describe(file)}")
    _check_dataset(group, name, counted)
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


def _check_dataset(data: h5py.Dataset, name: str, counted: bool) -> None:
    if data.is_virtual or data.external:
        raise InputError(f"{name} takes its data from other files (virtual or external storage); copy the data in")
    if data.dtype.name not in DTYPES:
        raise InputError(f"{name} has dtype {data.dtype}, not {', '.join(DTYPES)}; convert it first")
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"{name} has shape {data.shape}, not (films, height, width); convert it first")
    if data.chunks is None:
        # It cannot hold less than its shape says unless the file is cut short or the shape is a lie.
        size = data.size * data.dtype.itemsize
        if data.id.get_storage_size() != size:
            raise InputError(f"{name} declares {size:,} bytes but stores less; restore the file")
    else:
        _check_chunks(data, name)
        if not counted:
            _count_chunks(data, name)


def pieces(data: h5py.Dataset) -> int:
    return math.prod(-(-side // chunk) for side, chunk in zip(data.shape[1:], data.chunks[1:], strict=True))


def _check_chunks(data: h5py.Dataset, name: str) -> None:
    plist = data.id.get_create_plist()
    if not FILTERS.issuperset(plist.get_filter(number)[0] for number in range(plist.get_nfilters())):
        raise InputError(f"{name} is compressed by a filter that HDF5 does not bring itself; repack it (h5repack)")
    cut = pieces(data)
    row = data.shape[1] * data.shape[2]
    read_bytes = max(math.prod(data.chunks), min(data.chunks[0], data.shape[0]) * row) * data.dtype.itemsize
    if read_bytes > MAX_CHUNK_BYTES or cut > MAX_PIECES:
        layout = f"CHUNK=32x{data.shape[1]}x{data.shape[2]}"
        raise InputError(
            f"{name} has chunks of {data.chunks}: {read_bytes:,} bytes have to be read at once, "
            f"{MAX_CHUNK_BYTES:,} are the most, and films are cut into {cut:,} pieces, "
            f"{MAX_PIECES:,} are the most; "
            f"repack it (h5repack -l {data.name.strip('/')}:{layout} OLD NEW)"
        )


def _count_chunks(data: h5py.Dataset, name: str) -> None:
    """InputError where rows were never written: HDF5 would give them as black, as a job leaves them that was killed.

    A chunk costs the file some bytes, however well it is compressed, so a shape far beyond the file is a lie.
    """
    stored, wanted = data.id.get_num_chunks(), -(-data.shape[0] // data.chunks[0]) * pieces(data)
    if stored < wanted:
        first = next(row for row in range(0, data.shape[0], data.chunks[0]) if not _is_stored(data, row))
        raise InputError(
            f"{name} declares {wanted:,} chunks but stores {stored:,}; the others, from row {first} on, were never "
            "written or are lost: run to its end what writes the file, or cut file and CSV to the rows that are there"
        )


def _is_stored(data: h5py.Dataset, row: int) -> bool:
    """Whether the file has all chunks of the film at the first row of a chunk."""
    sides = zip(data.shape[1:], data.chunks[1:], strict=True)
    corners = itertools.product([row], *(range(0, side, chunk) for side, chunk in sides))
    return all(data.id.get_chunk_info_by_coord(corner).byte_offset is not None for corner in corners)


def is_plain(data: h5py.Dataset) -> bool:
    """Whether the rows lie in the file end to end, as the bytes of a numpy array."""
    # HDF5 has numbers that numpy has not, of 12 bits in 16 for example, and turns them into the nearest when it reads.
    same_numbers = data.id.get_type() == h5py.h5t.py_create(data.dtype)
    return data.chunks is None and data.id.get_offset() is not None and same_numbers

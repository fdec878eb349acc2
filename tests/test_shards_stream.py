"""Large files past the page cache: the bytes are those that were written, whatever the sizes and the file system."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from bench.storage import resident_bytes
from shards.stream import ALIGNMENT, atomic_stream, read_extents

MIB = 1 << 20
SIZES = (0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 13 * MIB + 77)


def write_in_pieces(path: Path, content: bytes, piece: int) -> None:
    with atomic_stream(path, durable=False) as stream:
        for first in range(0, len(content), piece):
            assert stream.write(memoryview(content)[first : first + piece]) == len(content[first : first + piece])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [24_321, 5 * MIB])
def test_what_is_written_is_in_the_file(tmp_path: Path, size: int, piece: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    for name in ("first", "second"):  # the second takes the buffers of the first
        write_in_pieces(tmp_path / name, content, piece)
        assert (tmp_path / name).read_bytes() == content


def refuses_direct(call, handle: int, *arguments):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no direct transfers here")
    return call(handle, *arguments)


def test_a_file_system_that_refuses_direct_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSE may: it takes the flag when the file is opened, and says no to the transfer itself."""
    for name in ("write", "preadv"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda handle, *rest, call=call: refuses_direct(call, handle, *rest))
    content = np.random.default_rng(0).bytes(9 * MIB + 5)
    write_in_pieces(tmp_path / "file", content, MIB)
    assert (tmp_path / "file").read_bytes() == content
    target = mmap.mmap(-1, MIB)
    read_extents(tmp_path / "file", [(MIB, MIB)], memoryview(target))
    assert target[:] == content[MIB : 2 * MIB]


def test_nothing_of_it_stays_in_the_page_cache(tmp_path: Path) -> None:
    with atomic_stream(tmp_path / "file") as stream:
        if not fcntl.fcntl(stream.handle, fcntl.F_GETFL) & os.O_DIRECT:
            pytest.skip("this file system has no direct transfers")
        stream.write(bytes(9 * MIB + 5))
    assert resident_bytes(tmp_path / "file") <= ALIGNMENT  # its end, which is no whole block


@pytest.mark.parametrize("size", [100, 20 * MIB])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    full = tmp_path / ".tmp-file"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, atomic_stream(tmp_path / "file") as stream:
        for _ in range(0, size, MIB):
            stream.write(bytes(min(size, MIB)))
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_stream(tmp_path / "file") as stream:
        stream.write(bytes(9 * MIB))
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_extents_are_read_one_behind_the_other(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(5 * MIB + 100)
    (tmp_path / "file").write_bytes(content)
    extents = [(3 * ALIGNMENT, 7 * ALIGNMENT), (0, ALIGNMENT), (5 * MIB, ALIGNMENT)]  # the last ends beyond the file
    target = mmap.mmap(-1, 9 * ALIGNMENT)
    read_extents(tmp_path / "file", extents, memoryview(target))
    wanted = b"".join(content[offset : offset + size] for offset, size in extents)
    assert target[: len(wanted)] == wanted

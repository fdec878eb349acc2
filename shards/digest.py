"""xxh3-128 of files: read back, or running along while they are written."""

from pathlib import Path
from typing import BinaryIO, Protocol

from xxhash import xxh3_128

DIGEST_SIZE = 16
"""Bytes."""
_PIECE = 1 << 20


def file_digest(path: Path) -> str:
    """Digest of a file's content, 32 hex digits. OSError where it cannot be read."""
    with open(path, "rb") as file:
        return stream_digest(file, None).hex()


def stream_digest(file: BinaryIO, size: int | None) -> bytes:
    """Digest of the next `size` bytes of a file, or of all that is left; fewer bytes are no error."""
    digest = xxh3_128()
    left = float("inf") if size is None else size
    while left > 0 and (piece := file.read(int(min(_PIECE, left)))):
        digest.update(piece)
        left -= len(piece)
    return digest.digest()


class Writable(Protocol):
    """Anything that takes bytes."""

    def write(self, content: bytes, /) -> int:
        """Append; returns the number of bytes."""
        ...


class HashingFile:
    """A file being written whose digest runs along."""

    def __init__(self, file: Writable) -> None:
        self._file, self._digest, self.written = file, xxh3_128(), 0

    def write(self, content: bytes) -> int:
        """Append; returns the number of bytes."""
        self._file.write(content)
        self._digest.update(content)
        self.written += len(content)
        return len(content)

    @property
    def digest(self) -> bytes:
        """Of everything written so far, 16 bytes."""
        return self._digest.digest()

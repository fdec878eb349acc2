"""Checkpoint files: one hashed, atomic file each, and which of them to go on from.

A file is one header line, `shardclip-checkpoint 2 XXH3 BYTES`, and then what `torch.save` made, whose 128-bit digest
and length the header holds: `torch.save` itself takes a flipped bit silently. It is read with `weights_only=True`, so
that a file from elsewhere cannot run code. The rename is the moment of truth: a kill before it leaves the older files,
one after it leaves this one too. Written and read as a stream: nothing holds a second copy in memory.
"""

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from xxhash import xxh3_128

from shards.atomic import atomic_file
from shards.errors import InputError

MAGIC = "shardclip-checkpoint"
VERSION = 2
_HEADER = re.compile(rb"shardclip-checkpoint (\d+) ([0-9a-f]{32}) (\d+)\n")
_HEADER_BYTES = len(f"{MAGIC} {VERSION} ") + 32 + 1 + 20 + 1
_NAME = re.compile(r"step-(\d{7,})\.pt")
_PIECE = 1 << 20


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be trusted: cut short, changed, or not one of ours."""


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` steps."""
    return f"step-{step:07d}.pt"


class _Hashing(io.RawIOBase):
    """Passes on what is written, and counts and hashes it; keeps why it could not be."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size = file, xxh3_128(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.digest.update(piece)
        self.size += len(piece)
        try:
            return self._file.write(piece)
        except OSError as error:
            self.failure = error
            raise


def write_stream(file: BinaryIO, payload: dict[str, Any]) -> None:
    """Write a checkpoint to a seekable file. `payload` holds tensors, numbers, strings, lists and dicts only.

    OSError where the file does not take it.
    """
    file.write(bytes(_HEADER_BYTES))  # no checkpoint until it is whole
    content = _Hashing(file)
    try:
        torch.save(payload, content)  # type: ignore[arg-type]  # it needs no more than write
    except RuntimeError:
        if content.failure is None:
            raise
        raise content.failure from None  # torch closes its archive all the same, and complains of that
    file.seek(0)
    file.write(f"{MAGIC} {VERSION} {content.digest.hexdigest()} {content.size:020d}\n".encode())


def write_checkpoint(path: Path, payload: dict[str, Any], *, check: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint, read it back, then give it its name. OSError where it cannot be; older files stay.

    `check` may raise an InputError at the last moment, before the name is given.
    """
    with atomic_file(path) as file:
        write_stream(file, payload)
        file.flush()
        os.fsync(file.fileno())
        try:
            verify_checkpoint(Path(file.name))
        except DamagedCheckpoint as error:
            raise OSError(None, f"read back, it was not what had been written: {error}") from None
        check()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The payload of a file, on the CPU, every byte checked. DamagedCheckpoint says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            file.seek(_verify(path, file))
            return _load(path, file)
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path} ({error.strerror})") from None


def _load(path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        payload = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file from elsewhere makes an unpickler say
        raise DamagedCheckpoint(
            f"{path} is refused: it holds more than tensors and plain values ({why(error)})"
        ) from None
    if not isinstance(payload, dict):
        raise DamagedCheckpoint(f"{path} is refused: it holds a {type(payload).__name__}, not a checkpoint's fields")
    return payload


def why(error: Exception) -> str:
    """Why a file was not taken, in few words; torch's own advise to load it all the same."""
    named, said = re.search(r"GLOBAL (\S+)", str(error)), " ".join(str(error).split())[:200]
    if named:
        return named[1]
    return type(error).__name__ if "weights_only" in said or not said else said


def verify_checkpoint(path: Path) -> None:
    """Check every byte of a file against its header. DamagedCheckpoint says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            _verify(path, file)
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path} ({error.strerror})") from None


def header_digest(path: Path) -> str | None:
    """The digest of the content that a file's header tells; None where it has none, or cannot be read."""
    try:
        with open(path, "rb") as file:
            header = _HEADER.match(file.read(2 * _HEADER_BYTES))
    except OSError:
        return None
    return header[2].decode() if header else None


def _verify(path: Path, file: BinaryIO) -> int:
    """Where the content begins, once its length and digest are found to be right."""
    header = _HEADER.match(file.read(2 * _HEADER_BYTES))
    if header is None:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this program, or its beginning is damaged")
    version, expected, size = int(header[1]), header[2].decode(), int(header[3])
    if version != VERSION:
        raise DamagedCheckpoint(f"{path} is a checkpoint of version {version}; this program reads version {VERSION}")
    file.seek(header.end())
    found = os.fstat(file.fileno()).st_size - header.end()
    if found != size:
        raise DamagedCheckpoint(f"{path} is damaged: {found:,} bytes where its header says {size:,}")
    digest = xxh3_128()
    while piece := file.read(_PIECE):
        digest.update(piece)
    if digest.hexdigest() != expected:
        raise DamagedCheckpoint(f"{path} is damaged: its bytes do not have the digest in its header")
    return header.end()


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the files in a folder that are named as checkpoints, newest first by step."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_good(
    folder: Path, warn: Callable[[str], None], *, check: Callable[[dict[str, Any]], None] = lambda _: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read and that `check` takes, None where there are no files at all.

    `warn` is told of each one on the way that is damaged, or that `check` refuses by an InputError. InputError where
    there are files and none will do: starting again from step 0 would throw the run away without a word. It is that of
    the newest that can be read, where there is one.
    """
    refusals: list[InputError] = []
    for _, path in list_checkpoints(folder):
        try:
            payload = read_checkpoint(path)
            check(payload)
        except InputError as error:
            refusals.append(error if path.name in str(error) else type(error)(f"{path}: {error}"))
            continue
        for refusal in refusals:
            warn(f"{refusal}; an older one is taken")
        return path, payload
    for refusal in refusals:
        if not isinstance(refusal, DamagedCheckpoint):
            raise refusal
    if refusals:
        raise InputError(
            f"none of the {len(refusals)} checkpoints in {folder} can be read ({refusals[0]}); restore one, "
            "or start again in another --out"
        )
    return None

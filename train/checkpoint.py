"""Checkpoint files: one hashed, atomic file each, written off the critical path, the newest good ones kept.

A file is one header line, `shardclip-checkpoint 1 XXH3 BYTES`, and then what `torch.save` made, whose 128-bit digest
and length the header holds: `torch.save` itself takes a flipped bit silently. It is read with `weights_only=True`, so
that a file from elsewhere cannot run code. The rename is the moment of truth: a kill before it leaves the older files,
one after it leaves this one too.
"""

import io
import pickle
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128_hexdigest

from shards.atomic import TEMPORARY_PREFIX, write_atomic
from shards.errors import InputError

MAGIC = "shardclip-checkpoint"
VERSION = 1
_HEADER = re.compile(rb"shardclip-checkpoint (\d+) ([0-9a-f]{32}) (\d+)\n")
_NAME = re.compile(r"step-(\d{7,})\.pt")
_HEADER_LIMIT = 128


class DamagedCheckpoint(InputError):
    """A checkpoint that cannot be trusted: cut short, changed, or not one of ours."""


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` steps."""
    return f"step-{step:07d}.pt"


def encode(payload: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file. `payload` holds tensors, numbers, strings, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = buffer.getvalue()
    return f"{MAGIC} {VERSION} {xxh3_128_hexdigest(content)} {len(content)}\n".encode() + content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The payload of a file, on the CPU, every byte checked. DamagedCheckpoint says what is wrong with it."""
    content = read_verified(path)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path} is refused: it holds more than tensors and plain values ({reason})") from None


def read_verified(path: Path) -> memoryview:
    """The file's content behind the header, once its length and digest are found to be right."""
    try:
        file = memoryview(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read the checkpoint {path} ({error.strerror})") from None
    header = _HEADER.match(file[:_HEADER_LIMIT])
    if header is None:
        raise DamagedCheckpoint(f"{path} is not a checkpoint of this program, or its beginning is damaged")
    version, digest, size = int(header[1]), header[2].decode(), int(header[3])
    if version != VERSION:
        raise DamagedCheckpoint(f"{path} is a checkpoint of version {version}; this program reads version {VERSION}")
    content = file[header.end() :]
    if len(content) != size:
        raise DamagedCheckpoint(f"{path} is damaged: {len(content):,} bytes where its header says {size:,}")
    if xxh3_128_hexdigest(content) != digest:
        raise DamagedCheckpoint(f"{path} is damaged: its bytes do not have the digest in its header")
    return content


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the files in a folder that are named as checkpoints, newest first by step."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_good(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, None where there are no files at all.

    `warn` is told of each damaged one on the way. InputError where there are files and none is good: starting again
    from step 0 would throw the run away without a word.
    """
    checkpoints = list_checkpoints(folder)
    for _, path in checkpoints:
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpoint as error:
            warn(str(error))
    if checkpoints:
        raise InputError(
            f"none of the {len(checkpoints)} checkpoints in {folder} can be read; restore one, "
            "or start again in another --out"
        )
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete checkpoints older than the newest `keep` good ones; damaged ones do not count."""
    good = 0
    for _, path in list_checkpoints(folder):
        if good == keep:
            path.unlink()
            continue
        try:
            read_verified(path)
            good += 1
        except DamagedCheckpoint:
            continue


class CheckpointWriter:
    """Writes payloads in a thread, one at a time, in order."""

    def __init__(self, folder: Path, *, keep: int, best: Path) -> None:
        """Files go to `folder`; the best one also to `best`."""
        self._folder, self._keep, self._best = folder, keep, best
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, payload: dict[str, Any], *, is_best: bool) -> None:
        """Hand over a payload, which must not change any more; waits for the one before, and raises its error."""
        self.wait()
        self._pending = self._threads.submit(self._write, payload, is_best)

    def wait(self) -> None:
        """Return when all is on disk. InputError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, then end the thread."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()

    def _write(self, payload: dict[str, Any], is_best: bool) -> None:
        content = encode(payload)
        path = self._folder / checkpoint_name(payload["step"])
        try:
            write_atomic(path, content)
            if is_best:
                write_atomic(self._best, content)
            prune(self._folder, self._keep)
        except OSError as error:
            raise InputError(
                f"cannot write the checkpoint {path} of {len(content):,} bytes ({error.strerror}); older ones are whole"
            ) from None


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink()

"""The index DALI's `fn.readers.webdataset` wants, version 1.2: `v1.2 N`, then a line a sample with `extension offset
size name` for each member. Written from the writer's own offsets, never by scanning a tar: DALI trusts it blindly.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

VERSION = "v1.2"


class Member(NamedTuple):
    """One file of a sample: where its content lies in the tar, in bytes."""

    extension: str
    offset: int
    size: int
    name: str


def index_line(members: Iterable[Member]) -> str:
    """The line of one sample."""
    return " ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members)


def encode_index(lines: Sequence[str]) -> bytes:
    """The whole index file, from its samples' lines."""
    return ("\n".join([f"{VERSION} {len(lines)}", *lines]) + "\n").encode("ascii")

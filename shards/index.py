"""The index DALI's `fn.readers.webdataset` wants, version 1.2: `v1.2 N`, then a line a sample with `extension offset
size name` for each member. Written from the writer's own offsets, never by scanning a tar: DALI trusts it blindly.
"""

from dataclasses import dataclass

VERSION = "v1.2"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: where its content lies in the tar, in bytes."""

    extension: str
    offset: int
    size: int
    name: str


def encode_index(samples: list[tuple[Member, ...]]) -> bytes:
    """The whole index file."""
    lines = [f"{VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    return ("\n".join(lines) + "\n").encode("ascii")

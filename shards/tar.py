"""Plain USTAR: the header of a regular file, byte for byte, and nothing else.

IEEE Std 1003.1-1988, as GNU tar and Python's `tarfile` read it. Owner, group and time are zero, so that the same
samples give the same bytes on any host at any time.
"""

BLOCK = 512
END = bytes(2 * BLOCK)
"""Two zero blocks end an archive."""
MAX_NAME = 100
MAX_SIZE = 8**11 - 1
"""USTAR's size field has 11 octal digits: 8 GiB less a byte."""


def header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file of `size` bytes. `name` is ASCII, at most 100 bytes, without a slash."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= MAX_NAME or "/" in name or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a tar member cannot be called {name!r} with {size} bytes")
    block = bytearray(_TEMPLATE)
    block[: len(encoded)] = encoded
    block[124:136] = b"%011o\0" % size
    # The checksum counts its own field as spaces, as the template has it.
    block[148:156] = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(block[124:136]))
    return bytes(block)


def _template() -> bytes:
    """A header with a name of nothing and, for a size, zero bytes."""
    fields = [
        bytes(100),  # name
        b"0000644\0",  # mode
        b"0000000\0",  # uid
        b"0000000\0",  # gid
        bytes(12),  # size
        b"%011o\0" % 0,  # mtime
        b" " * 8,  # checksum, counted as spaces
        b"0",  # regular file
        bytes(100),  # link name
        b"ustar\0" + b"00",
        bytes(32 + 32),  # owner and group names
        bytes(8 + 8),  # device numbers: none
        bytes(155 + 12),  # prefix, padding
    ]
    return b"".join(fields)


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE)


def padding(size: int) -> bytes:
    """The zero bytes that follow a member of `size` bytes up to the next block."""
    return bytes(-size % BLOCK)


def member(name: str, content: bytes | memoryview) -> bytes:
    """Header, content and padding of one member."""
    return b"".join((header(name, len(content)), content, padding(len(content))))

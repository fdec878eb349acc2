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
    digits = b"%011o\0" % size
    # The checksum counts its own field as spaces.
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(MAX_NAME, b"\0"), _BEFORE_SIZE, digits, _BEFORE_CHECKSUM, checksum, _REST))


_BEFORE_SIZE = b"0000644\0" + b"0000000\0" + b"0000000\0"
"""Mode, owner, group."""
_BEFORE_CHECKSUM = b"%011o\0" % 0
"""Time of change."""
_REST = b"".join(
    (
        b"0",  # regular file
        bytes(100),  # link name
        b"ustar\0" + b"00",
        bytes(32 + 32),  # owner and group names
        bytes(8 + 8),  # device numbers: none
        bytes(155 + 12),  # prefix, padding
    )
)
_CONSTANT_SUM = sum(_BEFORE_SIZE) + sum(_BEFORE_CHECKSUM) + sum(b" " * 8) + sum(_REST)


def padding(size: int) -> bytes:
    """The zero bytes that follow a member of `size` bytes up to the next block."""
    return bytes(-size % BLOCK)


def member(name: str, content: bytes) -> bytes:
    """Header, content and padding of one member."""
    return b"".join(pieces(name, content))


def pieces(name: str, content: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
    """The same three, not yet copied into one."""
    return header(name, len(content)), content, padding(len(content))

"""The headers of a column's pages in Parquet, read before anything is unpacked: a footer may say less than they hold.

A header is a struct in Thrift's compact protocol; of its fields those are taken that say what a page will take.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Callable
from typing import Any

_HEADER_BYTES = 512
"""A header without statistics takes some 30."""
_TYPE, _UNPACKED, _PACKED, _DATA_PAGE = 1, 2, 3, 5
"""Fields of PageHeader."""
_ENCODING = 2
"""Field of DataPageHeader."""
_PLAIN, _RLE = 0, 3
_MAX_DEPTH = 8


def unpacked_bytes(read_at: Callable[[int, int], bytes], start: int, size: int) -> int:
    """Bytes that the pages of a column from `start` on, `size` bytes in all, unpack to. `read_at(size, offset)`.

    ValueError for what is no header, and for pages in which a byte can stand for many: dictionaries, deltas.
    """
    total, place, end = 0, start, start + size
    while place < end:
        header = _Header(read_at(min(_HEADER_BYTES, end - place), place))
        fields = header.struct()
        unpacked, packed = fields[_UNPACKED], fields[_PACKED]
        if fields[_TYPE] != 0 or fields[_DATA_PAGE][_ENCODING] not in (_PLAIN, _RLE) or min(unpacked, packed) < 0:
            raise ValueError("a page that our writer does not make")
        total += unpacked
        place += header.place + packed
    return total


class _Header:
    """Bytes that are read from the left."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Field number -> its value; None for kinds that no field of interest has."""
        if depth > _MAX_DEPTH:
            raise ValueError("a header that is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true, false: no more bytes
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 8:
            self.place += self._unsigned()
            return None
        raise ValueError("a header with fields that our writer does not make")

    def _byte(self) -> int:
        if self.place >= len(self._content):
            raise ValueError("a header that does not end")
        self.place += 1
        return self._content[self.place - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

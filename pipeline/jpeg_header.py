"""What stands before the pixels of a JPEG: its tables, in the form that `jpeg` decodes with.

Only what ingest writes is read: baseline, 8 bits, one component, no restart markers. The header of such a file is the
same for every film of a data set, so it is parsed once (in Python, 10 ms) and compared from then on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOOK = 12
"""Bits of a Huffman code that are looked up at once; longer codes are rare and searched."""
END = 128
"""Coefficients that an end-of-block skips: more than a block has, so that the loop ends."""
ZIGZAG = np.array(sorted(range(64), key=lambda at: (d := at // 8 + at % 8, at // 8 if d % 2 else -(at // 8))))
"""Place in a block, row by row, of each coefficient in the order of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A parsed header."""

    content: bytes
    """The header itself, up to the first byte of the coded pixels."""
    height: int
    """Rows of pixels."""
    width: int
    """Columns of pixels."""
    quant: NDArray[np.int32]
    """(64,) quantisation steps, row by row."""
    codes: NDArray[np.uint32]
    """(2, 2 ** LOOK) DC and AC: what the next bits say, see `_entry`; 0 for a code that is longer or none."""
    pairs: NDArray[np.uint64]
    """(2 ** LOOK,) what the next bits say where they hold one or two whole AC symbols, see `_pair`; else 0."""
    long_codes: NDArray[np.int64]
    """(2, 17, 2) for each length: one more than its last code, what to add to a code for its place in `symbols`."""
    symbols: NDArray[np.uint32]
    """(2, 256) entries in the order of their codes."""


NO_HEADER = Header(
    content=b"",
    height=0,
    width=0,
    quant=np.zeros(64, dtype=np.int32),
    codes=np.zeros((2, 1 << LOOK), dtype=np.uint32),
    pairs=np.zeros(1 << LOOK, dtype=np.uint64),
    long_codes=np.zeros((2, 17, 2), dtype=np.int64),
    symbols=np.zeros((2, 256), dtype=np.uint32),
)
"""Of images that have none, for what is compiled for both."""


def parse_header(image: bytes) -> Header | None:
    """The header of a JPEG; None for one of another kind and for what is none."""
    try:
        return _parse(image)
    except (IndexError, ValueError, KeyError):
        return None


def _parse(image: bytes) -> Header | None:
    if image[:2] != b"\xff\xd8":
        return None
    place, shape = 2, None
    quants: dict[int, bytes] = {}
    tables: dict[tuple[int, int], tuple[bytes, bytes]] = {}
    while True:
        if image[place] != 0xFF:
            return None
        marker, size = image[place + 1], int.from_bytes(image[place + 2 : place + 4], "big")
        body = image[place + 4 : place + 2 + size]
        if len(body) != size - 2:
            return None
        place += 2 + size
        if marker == 0xDB:
            quants |= _quants(body)
        elif marker == 0xC0:
            shape = _shape(body)
        elif marker == 0xC4:
            tables |= _tables(body)
        elif marker == 0xDA:
            break
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            return None
    if shape is None or len(body) != 6 or body[0] != 1 or body[1] != shape[2] or tuple(body[3:]) != (0, 63, 0):
        return None
    return _header(image[:place], shape, quants[shape[3]], tables[0, body[2] >> 4], tables[1, body[2] & 15])


def _shape(body: bytes) -> tuple[int, int, int, int] | None:
    """(height, width, component, quantisation table) of a grey image of 8 bits."""
    if len(body) != 9 or body[0] != 8 or body[5] != 1:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    return (height, width, body[6], body[8]) if height and width else None


def _quants(body: bytes) -> dict[int, bytes]:
    if len(body) % 65:
        raise ValueError("not of 8 bits")
    return {body[i] & 15: body[i + 1 : i + 65] for i in range(0, len(body), 65) if body[i] < 16}


def _tables(body: bytes) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """{(class, number): (counts by length, symbols)}."""
    found, place = {}, 0
    while place < len(body):
        counts = body[place + 1 : place + 17]
        symbols = body[place + 17 : place + 17 + sum(counts)]
        if len(counts) != 16 or len(symbols) != sum(counts) or len(symbols) > 256:
            raise ValueError("a Huffman table is cut short")
        found[body[place] >> 4, body[place] & 15] = counts, symbols
        place += 17 + len(symbols)
    return found


def _header(
    content: bytes, shape: tuple[int, int, int, int], quant: bytes, dc: tuple[bytes, bytes], ac: tuple[bytes, bytes]
) -> Header:
    steps = np.zeros(64, dtype=np.int32)
    steps[ZIGZAG] = np.frombuffer(quant, dtype=np.uint8)
    codes, long_codes = np.zeros((2, 1 << LOOK), dtype=np.uint32), np.zeros((2, 17, 2), dtype=np.int64)
    symbols = np.zeros((2, 256), dtype=np.uint32)
    for kind, (counts, values) in enumerate((dc, ac)):
        code = number = 0
        for length, count in enumerate(counts, 1):
            long_codes[kind, length] = code + count, number - code
            for value in values[number : number + count]:
                symbols[kind, number] = _entry(value, length, ac=kind == 1)
                if length <= LOOK:
                    codes[kind, code << LOOK - length : code + 1 << LOOK - length] = symbols[kind, number]
                code, number = code + 1, number + 1
            if code > 1 << length:
                raise ValueError("more codes than there are bits")
            code <<= 1
    return Header(
        content=content,
        height=shape[0],
        width=shape[1],
        quant=steps,
        codes=codes,
        pairs=_pairs(codes[1]),
        long_codes=long_codes,
        symbols=symbols,
    )


def _entry(symbol: int, length: int, *, ac: bool) -> int:
    """What a code means, a byte each: bits of code and value, of the code, coefficients to go on by, the value's."""
    run, size = (symbol >> 4, symbol & 15) if ac else (0, symbol)
    if size > 15:
        raise ValueError("a value of more than 15 bits")
    advance = END if ac and size == 0 and run != 15 else run + 1
    return length + size | length << 8 | advance << 16 | size << 24


def _pairs(codes: NDArray[np.uint32]) -> NDArray[np.uint64]:
    entries = codes.tolist()
    return np.array([_pair(entries, bits) for bits in range(len(entries))], dtype=np.uint64)


def _pair(codes: list[int], bits: int) -> int:
    """The one or two symbols that LOOK bits hold whole, 0 for none. From the lowest bit on:

    8 bits of both, 8 coefficients to go on by, 16 value, then of the second 8 coefficients to go on by; 8 bits of the
    first alone; 16 value of the second. One symbol is followed by itself, 0 coefficients further: that changes nothing.
    """
    if (first := _symbol(codes, bits, LOOK)) is None:
        return 0
    used, advance, value = first
    rest = (bits << used) & ((1 << LOOK) - 1)
    second = _symbol(codes, rest, LOOK - used) if advance < END else None
    more, further, other = second or (0, 0, value)
    return used + more | advance << 8 | value << 16 | further << 32 | used << 40 | other << 48


def _symbol(codes: list[int], bits: int, present: int) -> tuple[int, int, int] | None:
    """(bits, coefficients to go on by, value as uint16) of the symbol at the top of LOOK bits if it is whole."""
    entry = codes[bits]
    used, advance, size = entry & 255, entry >> 16 & 255, entry >> 24
    if not entry or used > present:
        return None
    value = bits >> LOOK - used & (1 << size) - 1
    return used, advance, (value if value >> size - 1 else value + 1 - (1 << size)) & 0xFFFF if size else 0

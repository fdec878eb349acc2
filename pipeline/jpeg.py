"""A compiled JPEG decoder for grey baseline films: libjpeg-turbo's pixels to the bit, in 60 % of its time.

    coded pixels -> take the stuffing out -> Huffman codes of a row of blocks -> inverse DCT, 16 blocks at once

libjpeg-turbo spends most of a film of quality 95 on its 27,000 Huffman codes, each a chain of dependent steps. Here a
table entry has up to two codes with their values, bits are refilled without a branch, what can be checked after a block
is not checked within it, and the inverse DCT (jidctint.c, the accurate one) has a block in each lane, so that it needs
no transpose. What is not such a film, or is damaged, is left to libjpeg-turbo, which says what is wrong with it: the
result is libjpeg-turbo's for any bytes (fuzzed). `LoaderConfig.own_jpeg` switches all of this off.

Nothing is read or written outside of the memory it is given, whatever the bytes: tables and `places` have room for
every index that can occur, and where a block has read beyond the end is seen before the next one begins.
"""

from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import int64, njit, types, uint32, uint64

from pipeline import dct, jpeg_header
from pipeline.compiled import compiled, emitted, load, stamp_of
from pipeline.dct import _store, _transform
from pipeline.jpeg_header import END, LOOK

SLACK = 512
"""Bytes that may be read beyond the coded pixels before the end of a block shows it: 64 codes of 31 bits."""
DUMMY = 64
"""Row of the coefficients that takes what belongs nowhere."""
PLACES = 256
"""More than a block's coefficients with two symbols too many."""

_I8, _I64 = ir.IntType(8), ir.IntType(64)


@emitted(types.uint64(types.intp))
def _load_bits(builder, address):
    """Eight bytes as a number, the first the highest."""
    return builder.bswap(load(builder, address, _I64))


@emitted(types.uint64(types.intp))
def _load_word(builder, address):
    """Eight bytes as a number, in the machine's order."""
    return load(builder, address, _I64)


@emitted(types.void(types.uint64, types.intp))
def _store_word(builder, word, address):
    """A number as eight bytes, in the machine's order."""
    _store(builder, word, address)


@emitted(types.uint64(types.intp))
def _load_byte(builder, address):
    """The byte at an address."""
    return builder.zext(load(builder, address, _I8), _I64)


@njit(nogil=True)
def _unstuff(source, size, target):
    """Copy coded bytes up to the end-of-image marker, without the zero after each 255; how many, -1 without marker."""
    read = written = 0
    while read < size:
        if read + 8 <= size:
            word = _load_word(source + read)
            if not (~word - uint64(0x0101010101010101)) & word & uint64(0x8080808080808080):  # no byte of it is 255
                _store_word(word, target + written)
                read, written = read + 8, written + 8
                continue
        byte = _load_byte(source + read)
        _store_word(byte, target + written)
        read, written = read + 1, written + 1
        if byte == 255:
            following = _load_byte(source + read) if read < size else uint64(255)
            if following:
                return written - 1 if following == 0xD9 else -1
            read += 1
    return -1


@njit(nogil=True)
def _long_code(bits, long_codes, symbols):
    """Entry of a code of more than LOOK bits at the top of `bits`; 0 where there is none."""
    for length in range(LOOK + 1, 17):
        code = int64(bits >> uint64(64 - length))
        if code < long_codes[length, 0]:
            return symbols[code + long_codes[length, 1]]
    return uint32(0)


@njit(nogil=True)
def _value(bits, entry):
    """The value that follows a code at the top of `bits`."""
    size = entry >> uint64(24)
    rest = bits << ((entry >> uint64(8)) & uint64(255))
    value = int64((rest >> uint64(1)) >> (uint64(63) - size))
    return value if int64(rest) < 0 else value + 1 - (1 << int64(size))


@njit(nogil=True)
def _read_row(place, end, bits, count, level, header, places, coefficients, columns):
    """Codes of a row of blocks to coefficients. `bits` has `count` bits, the next first; `place`: where to go on.

    Returns (place, bits, count, level), place 0 where the codes are not sound. A refill leaves 56 bits at least, a code
    and its value are 31 at most.
    """
    codes, pairs, long_codes, symbols = header
    dc, ac = codes[0], codes[1]
    for column in range(uint64(columns)):
        bits |= _load_bits(place) >> count
        place += int64((uint64(63) - count) >> uint64(3))
        count |= uint64(56)
        entry = uint64(dc[bits >> uint64(64 - LOOK)])
        if entry == 0:
            entry = uint64(_long_code(bits, long_codes[0], symbols[0]))
            if entry == 0:
                return 0, bits, count, level
        level += _value(bits, entry)
        coefficients[column] = level
        bits <<= entry & uint64(63)
        count -= entry & uint64(255)
        k = uint64(0)
        while k < uint64(63):
            bits |= _load_bits(place) >> count
            place += int64((uint64(63) - count) >> uint64(3))
            count |= uint64(56)
            pair = pairs[bits >> uint64(64 - LOOK)]
            if pair != 0:
                k += (pair >> uint64(8)) & uint64(255)
                coefficients[places[k] + column] = pair >> uint64(16)
                if k == uint64(63):  # the second symbol is the next block's
                    bits <<= (pair >> uint64(40)) & uint64(63)
                    count -= (pair >> uint64(40)) & uint64(255)
                    break
                k += (pair >> uint64(32)) & uint64(255)
                coefficients[places[k] + column] = pair >> uint64(48)
                bits <<= pair & uint64(63)
                count -= pair & uint64(255)
                continue
            entry = uint64(ac[bits >> uint64(64 - LOOK)])
            if entry == 0:
                entry = uint64(_long_code(bits, long_codes[1], symbols[1]))
                if entry == 0:
                    return 0, bits, count, level
            k += (entry >> uint64(16)) & uint64(255)
            coefficients[places[k] + column] = _value(bits, entry)
            bits <<= entry & uint64(63)
            count -= entry & uint64(255)
        sound = k == uint64(63) or uint64(END) <= k < uint64(END + 63)
        if not sound or place - int64(count >> uint64(3)) > end:
            return 0, bits, count, level
    return place, bits, count, level


@njit(nogil=True)
def _decode_one(source, size, rows, columns, target, step, scratch, quant, header, places, stuffed, coefficients):
    """The coded pixels of a film -> rows x columns blocks of pixels; whether they are sound.

    source, size: address and bytes of the coded pixels. quant: (64,) int32. header: codes, pairs, long_codes, symbols
    of a `Header`. places: (PLACES,) where in `coefficients` each of the first block's lies, DUMMY's for what lies
    nowhere. Space to work in: stuffed (size + SLACK,) uint8; coefficients (65 * columns, up to whole LANES,) int16;
    scratch SCRATCH bytes. `target`, an address, has room for whole LANES of blocks in each row of blocks, `step` bytes
    between rows of pixels.
    """
    stride = len(coefficients) // (DUMMY + 1)
    begin = stuffed.ctypes.data
    end = begin + _unstuff(source, size, begin)
    if end < begin:
        return False
    place, bits, count, level = int64(begin), uint64(0), uint64(0), 0
    for row in range(rows):
        coefficients[:] = 0
        place, bits, count, level = _read_row(place, end, bits, count, level, header, places, coefficients, columns)
        if place == 0:
            return False
        if not _transform(coefficients.ctypes.data, stride, quant.ctypes.data, scratch, target + 8 * row * step, step):
            return False
    return end == place - int64(count >> uint64(3))


_FLAT = [types.Array(kind, 1, "C") for kind in (types.int32, types.uint64, types.uint8, types.int16)]
_HEADER = types.Tuple([types.uint32[:, ::1], types.uint64[::1], types.int64[:, :, ::1], types.uint32[:, ::1]])
ARRAYS = _FLAT[0], _HEADER, *_FLAT[1:]
"""Types of `_decode_one`'s arguments from `quant` on."""


def _make(stamp: int) -> Callable[..., bool]:
    """`_decode_one` for compiling, see `stamp_of`."""

    def run(source, size, rows, columns, target, step, scratch, quant, header, places, stuffed, coefficients):
        if stamp == 0:  # so that it is part of the function
            return False
        return _decode_one(
            source, size, rows, columns, target, step, scratch, quant, header, places, stuffed, coefficients
        )

    return run


@cache
def decode_function() -> Callable[..., bool]:
    """`_decode_one`, compiled. Seconds the first time on a machine, 0.1 s from the cache on disk."""
    return compiled(_make(stamp_of(dct, jpeg_header)), types.boolean(*[types.intp] * 7, *ARRAYS))

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
from typing import Any

from llvmlite import ir
from numba import extending, int64, njit, types, uint32, uint64

from pipeline.compiled import compiled
from pipeline.jpeg_header import END, LOOK

intrinsic: Any = extending.intrinsic
"""Its own type does not know that the first argument is not for callers."""
LANES = 16
"""Blocks that are transformed at once."""
SLACK = 512
"""Bytes that may be read beyond the coded pixels before the end of a block shows it: 64 codes of 31 bits."""
SCRATCH = 4 * LANES * (64 + 1)
"""Bytes of the space that 16 blocks are transformed in, and the sums of their coefficients' sizes."""
MOST = 5900
"""Sum of a block's coefficients, each without its sign, from which on 16 bits may be too few in libjpeg-turbo's inverse
DCT (5900 * 1.387 * 4 < 2 ** 15), so that what it makes of them is its own. Nothing but damage and noise has as much."""
DUMMY = 64
"""Row of the coefficients that takes what belongs nowhere."""
PLACES = 256
"""More than a block's coefficients with two symbols too many."""

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, LANES)


class _Lanes:
    """A vector of int32 in LLVM's code with Python's operators."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    def _with(self, other: "_Lanes | int") -> Any:
        return other.value if isinstance(other, _Lanes) else ir.Constant(_WORDS, [other] * LANES)

    def __add__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.add(self.value, self._with(other)))

    def __sub__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.sub(self.value, self._with(other)))

    def __mul__(self, other: "_Lanes | int") -> "_Lanes":
        return _Lanes(self.builder, self.builder.mul(self.value, self._with(other)))

    def __lshift__(self, other: int) -> "_Lanes":
        return _Lanes(self.builder, self.builder.shl(self.value, self._with(other)))

    def __rshift__(self, other: int) -> "_Lanes":
        return _Lanes(self.builder, self.builder.ashr(self.value, self._with(other)))


def inverse_dct(x: list[Any], shift: int) -> list[Any]:
    """Eight values (anything with + - * << >>) through jidctint.c's inverse DCT, scaled down by `shift` bits."""
    z1 = (x[2] + x[6]) * 4433
    low, high = z1 - x[6] * 15137, z1 + x[2] * 6270
    plus, minus = (x[0] + x[4]) << 13, (x[0] - x[4]) << 13
    even = [plus + high, minus + low, minus - low, plus - high]
    z5 = (x[7] + x[3] + x[5] + x[1]) * 9633
    z1, z2 = (x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995
    z3, z4 = (x[7] + x[3]) * -16069 + z5, (x[5] + x[1]) * -3196 + z5
    odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3]
    half = 1 << shift - 1
    sums = [each + half for each in even]
    return [(sums[i] + odd[i]) >> shift for i in range(4)] + [(sums[i] - odd[i]) >> shift for i in (3, 2, 1, 0)]


def _load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _at(builder: ir.IRBuilder, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(base.type, offset))


@intrinsic
def _load_bits(typing, address):  # noqa: ARG001
    """Eight bytes as a number, the first the highest."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        return builder.bswap(_load(builder, args[0], _I64))

    return types.uint64(types.intp), generate


@intrinsic
def _load_word(typing, address):  # noqa: ARG001
    """Eight bytes as a number, in the machine's order."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        return _load(builder, args[0], _I64)

    return types.uint64(types.intp), generate


@intrinsic
def _store_word(typing, word, address):  # noqa: ARG001
    """A number as eight bytes, in the machine's order."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        _store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.uint64, types.intp), generate


@intrinsic
def _transform_columns(typing, source, step, quant, target, sums):  # noqa: ARG001
    """Column of 16 blocks: eight int16 coefficients, 8 * step bytes apart, to eight int32, 8 * 64 bytes apart.

    The 64 bytes after the 4096 of the columns gain the sums of the coefficients' sizes.
    """

    def generate(context, builder, signature, args):  # noqa: ARG001
        source, step, quant, target, sums = args
        values, total = [], _load(builder, sums, _WORDS)
        for i in range(8):
            place = builder.add(source, builder.mul(step, ir.Constant(step.type, 8 * i)))
            stored = builder.sext(_load(builder, place, ir.VectorType(_I16, LANES)), _WORDS)
            factor = builder.insert_element(
                ir.Constant(_WORDS, ir.Undefined),
                _load(builder, _at(builder, quant, 32 * i), _I32),
                ir.Constant(_I32, 0),
            )
            same = builder.shuffle_vector(factor, factor, ir.Constant(_WORDS, [0] * LANES))
            values.append(_Lanes(builder, builder.mul(stored, same)))
            total = builder.add(total, _size(builder, values[-1].value))
        _store(builder, total, sums)
        for i, each in enumerate(inverse_dct(values, 11)):
            _store(builder, each.value, _at(builder, target, 8 * 4 * LANES * i))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


def _size(builder: ir.IRBuilder, value: Any) -> Any:
    zero = ir.Constant(_WORDS, [0] * LANES)
    return builder.select(builder.icmp_signed("<", value, zero), builder.sub(zero, value), value)


@intrinsic
def _clear(typing, sums):  # noqa: ARG001
    """Set 16 int32 to 0."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        _store(builder, ir.Constant(_WORDS, [0] * LANES), args[0])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _within(typing, sums):  # noqa: ARG001
    """Whether all of 16 int32 are at most MOST."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        above = builder.icmp_signed(">", _load(builder, args[0], _WORDS), ir.Constant(_WORDS, [MOST] * LANES))
        return builder.icmp_unsigned("==", builder.bitcast(above, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(types.intp), generate


@intrinsic
def _transform_row(typing, source, target):  # noqa: ARG001
    """A row of 16 blocks: eight int32 values each, 64 bytes apart, to 128 neighbouring pixels."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        source, target = args
        values = [_Lanes(builder, _load(builder, _at(builder, source, 4 * LANES * i), _WORDS)) for i in range(8)]
        zero, top = ir.Constant(_WORDS, [0] * LANES), ir.Constant(_WORDS, [255] * LANES)
        pixels = []
        for each in inverse_dct(values, 18):
            level = (each + 128).value
            level = builder.select(builder.icmp_signed("<", level, zero), zero, level)
            level = builder.select(builder.icmp_signed(">", level, top), top, level)
            pixels.append(builder.trunc(level, ir.VectorType(_I8, LANES)))
        while len(pixels) > 1:  # interleave: 0 with 4, 1 with 5 ..., until one vector has the pixels in order
            half = len(pixels) // 2
            pixels = [_interleave(builder, pixels[i], pixels[i + half]) for i in range(half)]
        _store(builder, pixels[0], target)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _interleave(builder: ir.IRBuilder, one: Any, two: Any) -> Any:
    count = one.type.count
    order = [i // 2 + count * (i % 2) for i in range(2 * count)]
    return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(_I32, 2 * count), order))


@intrinsic
def _load_byte(typing, address):  # noqa: ARG001
    """The byte at an address."""

    def generate(context, builder, signature, args):  # noqa: ARG001
        return builder.zext(_load(builder, args[0], _I8), _I64)

    return types.uint64(types.intp), generate


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
def _transform(coefficients, stride, quant, scratch, target, step):
    """Coefficients of a row of blocks to eight rows of pixels, 16 blocks at a time. False where they are too large."""
    sums = scratch + 8 * 8 * 4 * LANES
    for first in range(0, stride, LANES):
        _clear(sums)
        for column in range(8):
            source = coefficients + 2 * (column * stride + first)
            _transform_columns(source, 2 * stride, quant + 4 * column, scratch + 4 * LANES * column, sums)
        if not _within(sums):
            return False
        for row in range(8):
            _transform_row(scratch + 8 * 4 * LANES * row, target + row * step + 8 * first)
    return True


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


@cache
def decode_function() -> Callable[..., bool]:
    """`_decode_one`, compiled. Seconds the first time on a machine, 0.1 s from the cache on disk."""
    flat = [types.Array(kind, 1, "C") for kind in (types.int32, types.uint64, types.uint8, types.int16)]
    header = types.Tuple([types.uint32[:, ::1], types.uint64[::1], types.int64[:, :, ::1], types.uint32[:, ::1]])
    size = types.intp
    return compiled(
        _decode_one.py_func,
        types.boolean(*[size] * 7, flat[0], header, *flat[1:]),
    )
